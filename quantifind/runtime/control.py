"""The control of what is trained: float weights that had the same training."""

from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.folding import prepared
from quantifind.runtime.student import Student


class Control(Student):
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
