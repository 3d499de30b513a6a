"""Trains the control of what a search trained further, once."""

import math
import shutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantifind.learning import train_control
from quantifind.mixed_precision.measurements import Measurements
from quantifind.runtime.control import Control
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import Strategy
from quantifind.utils.naming import NotFinite

# a training that works leaves no network so many times as bad as it began: beside one that is,
# any codes would do well (test_a_control_far_worse_than_it_began_has_no_matched_ratio)
DIVERGED = 100


def control_of(
    measurements: Measurements, start: Strategy, key: str, recipe: Mapping[str, Any]
) -> Control:
    """The control of codes that learned, or as it is kept.

    start: that the codes began with.
    key: of its training.
    recipe: as `quantifind.learning.learn` was given it.
    """
    store, folded = measurements.store, (*dict.fromkeys((*measurements.folded, *start.folded)),)
    entry, resume = store.get(key), recipe["checkpoints"]
    if entry is None:
        try:
            net = train_control(measurements.model, start, measurements.train_loader, **recipe)
            given = measurements.evaluator.given_batches()
            judged = Evaluator(net, given, measurements.criterion).outcome().criterion
            ratio, fault = beside(judged, measurements.original.criterion)
        except NotFinite as error:
            ratio, fault = math.nan, str(error)
        made: dict[str, Tensor] = {} if fault else {**dict(net.named_parameters())}
        store.put(key, made, {"ratio": None if fault else ratio, "fault": fault})
        entry = store.get(key)
        assert entry is not None
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    weights, facts = entry
    return Control(weights, folded, math.nan if facts["fault"] else facts["ratio"], facts["fault"])


def beside(loss: float, original: float) -> tuple[float, str]:
    """The ratio of a control's loss to the float network's, and what is wrong with it."""
    if original == 0:
        return math.nan, "the float network's loss on validation data is 0"
    ratio = loss / original
    if not ratio <= DIVERGED:
        return math.nan, f"its loss on validation data is {loss:g}, the float one's {original:g}"
    return ratio, ""
