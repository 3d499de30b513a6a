"""Curves while a stage runs, by DVCLive: `dvc plots` and the DVC view of VS Code show them as they
grow."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# takes numbers by name
Log = Callable[[Mapping[str, float]], None]


@contextmanager
def live(folder: Path, *, step: str) -> Iterator[Log]:
    """Within it, each call adds a point to the curve of each name.

    folder: has the curves in plots/metrics/NAME.tsv, and their ends in metrics.json; it is made
        anew.
    step: the name of what they are drawn over.
    """
    # takes a second, which other stages spare
    from dvclive import Live

    # the pipeline has a dvc.yaml and experiments of its own
    with Live(f"{folder}", save_dvc_exp=False, dvcyaml=False) as one:

        def log(values: Mapping[str, float]) -> None:
            # DVCLive counts steps, and takes what it is told for one
            one.step = round(values.get(step, 0), 1)
            for name in values.keys() - {step}:
                one.log_metric(name, float(values[name]))
            one.next_step()

        yield log
