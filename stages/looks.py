"""Where ladders that were judged on test data are counted."""

from pathlib import Path

LOOKS = Path("looks.json")
# where dvc runs experiments beside the project, which are of its looks:
# test_each_ladder_is_a_look_and_the_cache_none
BESIDE = Path(".dvc/tmp/exps")


def ledger() -> Path:
    """The ledger of the project, of which an experiment in a folder of dvc's is a copy.

    It is neither output nor dependency of a stage: what comes from the cache changes nothing, and
    what is judged anew only adds to it. It belongs under version control.
    """
    for folder in Path.cwd().parents:
        if Path.cwd().is_relative_to(folder / BESIDE):
            return folder / LOOKS
    return LOOKS
