"""In dvc.yaml, the code that each stage depends on, from what it imports: python -m stages.deps"""

import re
from pathlib import Path

import grimp
import yaml

PIPELINE = Path("dvc.yaml")
# by stage, the packages whose modules it loads by their names; the plot stage takes only the names
# of the costs, with which plots/candidates.csv changes
PLUGINS = {
    "prepare": ("data", "models"),
    "quantize": ("costs", "schemes"),
    "evaluate": ("costs", "schemes"),
}
# the stages that depend on single files, so that a change of the search trains nothing again and a
# change of a picture only draws: test_a_change_runs_what_depends_on_it_and_no_more
BY_FILE = ("prepare", "train", "plot")
# the folders of the project that a stage reads beside what it imports
READ = {"plot": ("stages/templates",)}
# the packages that are never taken as folders: each stage uses one module of many
NEVER_FOLDED = ("stages", "quantifind.workflow")


def code_of(stage: str, graph: grimp.ImportGraph) -> list[str]:
    """The files and folders of code that a stage depends on, sorted.

    stage: a module of stages/.
    graph: of the imports of the packages quantifind and stages.
    """
    plugins = {f"quantifind.{package}" for package in PLUGINS.get(stage, ())}
    # the network itself stands in out/network.py, what it imports does not
    loaded = plugins | ({"quantifind.models"} if stage != "plot" else set())
    start = {f"stages.{stage}"}.union(*map(graph.find_descendants, loaded))
    used = {f"stages.{stage}"}.union(*map(graph.find_upstream_modules, start))
    entries = {package.replace(".", "/") for package in plugins}.union(READ.get(stage, ()))
    for module in used:
        package = module.rpartition(".")[0]
        if package not in plugins:
            fold = stage not in BY_FILE and "." in package and package not in NEVER_FOLDED
            entries.add(package.replace(".", "/") if fold else f"{module.replace('.', '/')}.py")
    return sorted(entries)


def updated(text: str) -> str:
    """A pipeline in which the dependencies in quantifind/ and stages/ are those of the imports.

    text: of dvc.yaml; its other dependencies, and its comments, stay as they are.
    """
    # what only a type checker imports runs nothing
    graph = grimp.build_graph(
        "quantifind", "stages", exclude_type_checking_imports=True, cache_dir=None
    )
    for stage, facts in yaml.safe_load(text)["stages"].items():
        if facts.get("always_changed"):
            continue
        found = re.search(rf"\n  {stage}:\n(?:    .*\n)+?    deps:\n((?:      .*\n)+)", text)
        assert found is not None, stage
        by_hand = re.sub(r"      - (quantifind|stages)/.*\n", "", found[1])
        code = "".join(f"      - {entry}\n" for entry in code_of(stage, graph))
        text = text[: found.start(1)] + by_hand + code + text[found.end(1) :]
    return text


if __name__ == "__main__":
    PIPELINE.write_text(updated(PIPELINE.read_text(encoding="utf-8")), encoding="utf-8")
