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
            ratio, fault = judged / measurements.original.criterion, ""
            if not math.isfinite(ratio):
                fault = f"its loss on validation data is {judged}"
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
