"""One page that shows how networks differ: python -m stages.compare [REVISION|EXPERIMENT …]"""

import argparse

from stages import files, revisions
from stages.comparison import comparison
from stages.params import Params

PAGE = files.PLOTS / "comparison.html"


def main(_: Params) -> None:
    """Write the page; without a revision, of all models that have results.

    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", nargs="*", help="a revision, an experiment, or workspace")
    found = revisions.results(parser.parse_args().revision)
    files.write_text(PAGE, comparison(found))
    print(f"{PAGE}: {', '.join(found)}")


if __name__ == "__main__":
    files.run(main, staged=False)
