"""The control of what a search trained further: float weights that had the same training."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.learning import train_control
from quantifind.mixed_precision.measurements import Measurements
from quantifind.network.folding import Pairs, prepared
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import Strategy


@dataclass(frozen=True)
class Control:
    """What became of float weights by the recipe of the codes that learned from labels.

    weights: by name, parameters of the network; none where the training diverged.
    folded: pairs of names, of the norms that the network has folded.
    ratio: the loss over the float network's, on validation data; NaN where the training diverged.
    fault: how it ended then.
    """

    weights: Mapping[str, Tensor]
    folded: Pairs
    ratio: float
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"The control's training diverged ({self.fault}): there is no matched ratio"
        said = (
            f"The control, float weights trained further by the same recipe, has {self.ratio:.4g} "
            "times the float network's loss on validation data"
        )
        if self.ratio > 1:
            said += ": the recipe spoils float weights, and a ratio to them flatters"
        return said

    def network(self, model: nn.Module) -> nn.Module:
        """A copy of the network that the search was given, with these weights, in eval mode."""
        net = prepared(model, self.folded).eval()
        own = dict(net.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                own[name].copy_(weight)
        return net


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
        except ValueError as error:
            ratio, fault = math.nan, str(error)
        made: dict[str, Tensor] = {} if fault else {**dict(net.named_parameters())}
        store.put(key, made, {"ratio": None if fault else ratio, "fault": fault})
        entry = store.get(key)
        assert entry is not None
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    weights, facts = entry
    return Control(weights, folded, math.nan if facts["fault"] else facts["ratio"], facts["fault"])
