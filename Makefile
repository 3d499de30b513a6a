# make repro: from raw data to pictures; make test: every test. Both make .venv first.
PYTHON ?= python3
ACTIVATE = . .venv/bin/activate

.PHONY: repro test docs deps table bench
repro: .venv/installed
	$(ACTIVATE) && dvc repro

test: .venv/installed
	$(ACTIVATE) && python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# The pages of docs/ with the tour and the API, in out/docs/index.html; links are checked.
docs: .venv/installed
	$(ACTIVATE) && NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet

# In dvc.yaml, the code that each stage depends on, after a change of imports.
deps: .venv/installed
	$(ACTIVATE) && python -m stages.deps

# The table of docs/results.md: all four networks, from the cache where they ran before.
table: .venv/installed
	$(ACTIVATE) && python -m benchmarks.table

# Every table and figure of README.md and docs/; hours. Best on a machine with nothing else to do.
BENCHMARKS = recipes table names rounding_speed speed grids search search_quality stability coverage peers
BENCHMARKS += fuzz scale rotation effects ladders artifacts readme architecture
bench: .venv/installed
	$(ACTIVATE) && for name in $(BENCHMARKS); do python -m benchmarks.$$name || exit; done

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(ACTIVATE) && python -m pip install --quiet --editable '.[test]'
	touch $@
