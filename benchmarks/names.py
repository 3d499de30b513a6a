"""Is the language transformer any good? Beside logistic regression on character 1- to 3-grams.

    python -m benchmarks.names

after `make table`, whose experiment language_transformer it reads. Both learn from the same names
and are judged on the same test names. Writes benchmarks/results/names.csv and the table of
docs/results.md.
"""

import dvc.api
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from benchmarks.grids import ROOT, markers, write_table
from quantifind.data import language_names
from quantifind.utils.loaders import whole_split
from quantifind.utils.name_archive import alphabet, read_names

RESULTS = ROOT / "benchmarks/results/names.csv"
MARKERS = markers("python -m benchmarks.names")


def markdown(results: pd.DataFrame) -> str:
    """The table, a line per classifier."""
    rows = zip(results["classifier"], results["test_accuracy"], strict=True)
    lines = [f"| {classifier} | {accuracy:.2%} |" for classifier, accuracy in rows]
    return "\n".join(["| classifier | accuracy on test |", "|---|---|", *lines]) + "\n"


def main() -> None:
    letters = alphabet(read_names())
    train, _, test = (whole_split(loader) for loader in language_names.create_dataloaders())
    names, test_names = (
        ["".join(letters[code - 1] for code in row if code) for row in codes.tolist()]
        for codes, _ in (train, test)
    )
    rows = []
    # with analyzer char_wb the n-grams also hold the start and the end of a name
    for analyzer in ("char", "char_wb"):
        n_grams = CountVectorizer(analyzer=analyzer, ngram_range=(1, 3), lowercase=False)
        regression = make_pipeline(n_grams, LogisticRegression(max_iter=1000))
        accuracy = regression.fit(names, train[1]).score(test_names, test[1])
        rows.append({"classifier": f"logistic regression, {analyzer}", "test_accuracy": accuracy})
    metrics = dvc.api.metrics_show(repo=str(ROOT), rev="language_transformer")
    accuracy = metrics["float"]["accuracy"]
    rows.append({"classifier": "language_transformer", "test_accuracy": accuracy})
    results = pd.DataFrame(rows)
    results.to_csv(RESULTS, index=False)
    write_table(MARKERS, markdown(results))
    print(results.to_string(index=False))


if __name__ == "__main__":
    main()
