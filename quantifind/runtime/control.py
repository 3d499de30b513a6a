"""The control of what is trained: float weights that had the same training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.folding import Pairs, prepared
from quantifind.runtime.student import Student


class FloatStudent(Student):
    """A student whose weights are not rounded, and whose activations stay in float.

    Batches, blends, loss and rates are those of the codes that learn.

    latents: by name, the float values of each parameter that is quantized.
    log_factors: none.
    """

    def __init__(self, model: nn.Module, *given: Any) -> None:
        """Of what `Student` takes, the same."""
        super().__init__(model, *given)
        net = prepared(model, self.start.folded).eval().requires_grad_(False)
        self.net = self.run.net = net
        self.prefix, self.log_factors = "", {}
        own = dict(net.named_parameters())
        self.latents = {
            name: own[name].detach().float().clone().requires_grad_() for name in self.latents
        }

    def _weight(self, name: str) -> Tensor:
        return self.latents[name].to(self.start.tensors[name].dtype)

    @torch.no_grad()
    def trained(self) -> nn.Module:
        """The network with its weights as trained."""
        own = dict(self.net.named_parameters())
        for name in self.latents:
            own[name].copy_(self._weight(name))
        return self.net


@dataclass(frozen=True)
class Control:
    """What became of float weights by the recipe of the codes that learned from labels.

    weights: by name, parameters of the network; none where there is a fault.
    folded: pairs of names, of the norms that the network has folded.
    ratio: the loss over the float network's, on validation data; NaN where there is a fault.
    fault: why nothing can be held against these weights, as where their training diverged.
    """

    weights: Mapping[str, Tensor]
    folded: Pairs
    ratio: float
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"The control of what was trained gives no matched ratio: {self.fault}"
        said = (
            f"The control, float weights trained further by the same recipe, has {self.ratio:.4g} "
            "times the float network's loss on validation data"
        )
        if self.ratio > 1:
            said += "; where it is worse than the float network, a ratio to it flatters"
        return said

    def network(self, model: nn.Module) -> nn.Module:
        """A copy of the network that the search was given, with these weights, in eval mode."""
        net = prepared(model, self.folded).eval()
        own = dict(net.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                own[name].copy_(weight)
        return net
