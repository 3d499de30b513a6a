"""Select: what params.yaml selects, as files that the other stages depend on; runs each time.

DVC can't depend on a file that is named inside params.yaml, nor on an entry whose name has a dot.
"""

from dataclasses import asdict

from stages import files, selection
from stages.params import Params


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    selection.check(params)
    sources, weights = selection.digests(params)
    files.write_json(files.SELECTED, asdict(params.entry))
    files.write_json(files.SELECTED_SOURCES, sources)
    files.write_json(files.SELECTED_WEIGHTS, weights)


if __name__ == "__main__":
    files.run(main)
