"""Predicted loss increases of many options from one pass forward and back per batch.

The loss increase here is the divergence from the float network's outputs
(`quantifind.utils.divergences.divergences`), whose second derivative is the Fisher information of
those outputs. For outputs y that are drawn from what the network itself says, ½·E[(∇ log p(y)·d)²]
is the second-order term of a change d (Martens 2020, arXiv:1412.1193): no labels are needed, and
the changes of an example's positions, and of a weight that is used several times, are added before
they are squared.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantifind.metrics import judged
from quantifind.mixed_precision.proxies import differentiable, products_of, replaced
from quantifind.network.products import Product
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils.batches import Batch, rows_of
from quantifind.utils.criteria import Criterion

Uses = list[tuple[Product, Tensor, Tensor]]


def score_options(
    model: nn.Module,
    criterion: Criterion | None,
    batches: Sequence[Batch],
    options: Mapping[str, Sequence[QuantizedTensor]],
    *,
    gain: float = 1.0,
    seed: int = 0,
) -> dict[str, list[float]]:
    """By tensor, for each of its options, the predicted mean
    `quantifind.utils.divergences.divergences`, by what examples count.

    Of a weight or a bias the change of its product's output is what the option does on the same
    inputs; of any other parameter, the change itself is taken with its gradient.

    criterion: by which the outputs are seen as classes, or as numbers; None for numbers.
    batches: of training data; the fewer examples in each, the surer the scores of what is in no
        product.
    gain: what logits are multiplied with, as the divergence has them.
    seed: of the outputs that are drawn.
    Raises: ValueError for batches without examples.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {name: [0.0] * len(some) for name, some in options.items()}
    count = 0.0
    with differentiable(model) as (work, parameters):
        for batch in batches:
            others = {name: parameters[name] for name in options}
            given = _Projected(work, criterion, batch, generator, gain)
            uses, gradients = products_of(work, given, others)
            count += given.count
            for name, some in options.items():
                for i, option in enumerate(some):
                    values = option.dequantize().to(parameters[name])
                    if name in uses:
                        with replaced(parameters[name], values):
                            change = _changes(uses[name], rows_of(batch.data))
                    else:
                        change = ((values - parameters[name]) * gradients[name]).sum()
                    sums[name][i] += 0.5 * change.double().square().sum().item()
    if not count:
        raise ValueError("there are no examples to score with")
    return {name: [found / count for found in each] for name, each in sums.items()}


@dataclass
class _Projected:
    """A pass of a batch → a number whose gradient's square, times a change's, has the mean wanted:
    outputs in a random direction v, by a root of their Fisher information and of what they count.

    count: what the batch's examples count in all, once it has been called.
    """

    work: nn.Module
    criterion: Criterion | None
    batch: Batch
    generator: torch.Generator
    gain: float
    count: float = 0.0

    def __call__(self) -> Tensor:
        found = judged(self.criterion, *self.batch.run(self.work))
        outputs, weight = (found.parts[0][name] for name in ("outputs", "weight"))
        self.count = float(weight.sum())
        signs = torch.randint(2, outputs.shape, generator=self.generator).to(outputs.device)
        values, places = outputs.detach().float(), max(math.prod(outputs.shape[1:]), 1)
        signs = 2.0 * signs - 1
        if found.classes == "softmax":
            root = (self.gain * values).softmax(1).sqrt()
            direction = root * signs - root.square() * (root * signs).sum(1, keepdim=True)
            if weight.dim() == 1:
                weight = weight * outputs.shape[1] / places
            weight = weight.reshape(len(outputs), 1, *weight.shape[1:])
            weight = weight.reshape(*weight.shape, *(1,) * (outputs.dim() - weight.dim()))
            direction = self.gain * direction * weight.sqrt()
        elif found.classes == "sigmoid":
            share = (self.gain * values).sigmoid()
            direction = self.gain * signs * (share * (1 - share) / places).sqrt()
        else:
            direction = signs * math.sqrt(2 / places)
        # such as masked classes, which no change reaches
        finite = outputs.isfinite()
        return (direction.where(finite, 0.0) * outputs.where(finite, 0.0)).sum()


def _changes(uses: Uses, examples: int | None) -> Tensor:
    """By example, (examples,), the sum of gradient times change over all uses of a weight; where
    examples can't be told apart, that of the batch, whose square is as large in the mean."""
    found: dict[int, Tensor] = defaultdict(lambda: torch.zeros(()))
    for product, output, gradient in uses:
        change = (product.compute(*product.operands) - output) * gradient
        each = _by_example(change, examples)
        found[len(each)] = found[len(each)].to(each.device) + each
    if len(found) == 1:
        return next(iter(found.values()))
    return torch.stack([each.sum() for each in found.values()]).sum()


def _by_example(change: Tensor, examples: int | None) -> Tensor:
    """Sums over all axes but that of the examples: the first that is as long, or the first one
    where it is a multiple."""
    if examples:
        for axis in range(min(change.dim(), 2)):
            if change.shape[axis] == examples:
                return change.movedim(axis, 0).flatten(1).sum(1) if change.dim() > 1 else change
        if change.dim() and len(change) and len(change) % examples == 0:
            return change.reshape(examples, -1).sum(1)
    return change.sum().reshape(1)
