"""Judge what was trained further beside float weights that had the same training."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from quantifind.certification.measures import matched
from quantifind.runtime.evaluator import Evaluator
from quantifind.utils.batches import Forward


def matched_ratios(
    columns: Sequence[Mapping[str, Any] | None],
    control: nn.Module,
    test_loader: Iterable[Any],
    criterion: Any,
    *,
    forward: Forward | None = None,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """A row per strategy, as `quantifind.certification.measures.matched` has it; with nothing for
    one that was not trained further.

    columns: of those that were trained further, what
        `quantifind.workflow.evaluation_workflow.evaluate_strategies` measured, else None.
    control: float weights that had the same training.
    test_loader, criterion, forward, confidence: as that takes them.
    """
    losses = (
        Evaluator(control, test_loader, criterion, forward=forward).outcome()["loss"].cpu().numpy()
    )
    rows = [{} if c is None else matched(dict(c), losses, confidence=confidence) for c in columns]
    return pd.DataFrame(rows)
