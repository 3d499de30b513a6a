"""Examples blended with others of their batch (mixup, arXiv:1710.09412)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantifind.utils.batches import Batch, rows_of
from quantifind.utils.forwards import DefaultForward


@dataclass(frozen=True)
class Blend:
    """Each example's share (examples,), and the targets (examples, …) of the other one that it is
    blended with, None where they are no tensor."""

    share: Tensor
    targets: Any

    def __getitem__(self, rows: slice) -> "Blend":
        return Blend(self.share[rows], _rows(self.targets, rows))

    def shares(self, values: Tensor) -> Tensor:
        """The shares, to multiply values (examples, …) with."""
        return self.share.to(values).reshape(-1, *(1,) * (values.dim() - 1))

    def mixed(self, values: Tensor, others: Tensor) -> Tensor:
        share = self.shares(values)
        return share * values + (1 - share) * others.to(values.device)


def blended(batch: Batch) -> tuple[Batch, Blend | None]:
    """Half of the examples, the first of a shuffled batch, blended with others of it: of batches
    (inputs, targets) with floating point inputs; others stay."""
    data, count = batch.data, (rows_of(batch.data) or 0) // 2
    pair = isinstance(data, list | tuple) and len(data) == 2
    if not pair or count == 0 or not isinstance(batch.forward, DefaultForward):
        return batch, None
    inputs, targets = data
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return batch, None
    share = torch.ones(len(inputs), device=inputs.device)
    share[:count] = torch.rand(count).to(inputs.device)
    others = torch.arange(len(inputs), device=inputs.device)
    others[:count] = torch.randperm(len(inputs))[:count].to(inputs.device)
    blend = Blend(share, _rows(targets, others))
    return Batch([blend.mixed(inputs, inputs[others]), targets], batch.forward), blend


def _rows(targets: Any, rows: Any) -> Any:
    if not isinstance(targets, Tensor):
        return None
    return targets[rows.to(targets.device) if isinstance(rows, Tensor) else rows]
