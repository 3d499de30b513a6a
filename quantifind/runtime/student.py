"""A network whose codes, scales and codebooks are trained to follow the float network's outputs."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from quantifind.network.activations import QuantizedActivations
from quantifind.network.folding import prepared
from quantifind.network.memory import view_places
from quantifind.network.modules import put_values
from quantifind.runtime.blending import Blend, blended
from quantifind.runtime.checks import independent
from quantifind.runtime.labels import (
    CLASSES,
    are_shares,
    class_labels,
    cross_entropies,
    to_learn,
)
from quantifind.tensor import sparsity
from quantifind.tensor.qparams import QParams, from_rows, to_rows, with_table
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.tensor.ste import in_float32, round_through
from quantifind.tensor.stored_scales import stored_scale
from quantifind.utils.batches import Batch, tensors_of
from quantifind.utils.console import console
from quantifind.utils.criteria import BY_CLASS, IGNORED, aligned, class_axes, told
from quantifind.utils.devices import device_of, is_out_of_memory

# scales and tables are trained by the logarithm of the factor that they are multiplied with
SCALE_LEARNING_RATE = 2e-3
# both networks' logits are divided by it, so that more than the likeliest class has a say
SOFTENING = 2.0
# latent weights start at most this fraction of the way from their level to the rounding boundary
INSIDE = 0.9
# batches after which it is told anew which codes are 0
OFTEN = 10


class Student:
    """A quantized network whose codes are those nearest to latent float values.

    latents: by name, float32 values of each quantized parameter.
    log_factors: by name, the logarithm of what its scales, or the entries of its table, are
        multiplied with.
    micro_batch: examples that go through the networks at a time, None for a whole batch.
    thresholds: by name, of those of few codes other than 0, up to which magnitude they are 0.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Quantized,
        label_weight: float,
        micro_batch: int | None = None,
        density: float | None = None,
        criterion: Any = None,
    ) -> None:
        self.label_weight, self.micro_batch, self.criterion = label_weight, micro_batch, criterion
        self.classes = criterion if isinstance(criterion, BY_CLASS) else CLASSES
        # whether a batch may be taken in parts, None until the first that would be
        self.divisible: bool | None = None
        self.teacher = prepared(model, start.folded).eval().requires_grad_(False)
        self.net: nn.Module = prepared(model, start.folded).eval().requires_grad_(False)
        self.start, self.prefix = start, ""
        # whose values follow their owner's: test_views_follow_wherever_they_are_measured
        self.views = view_places(dict(self.teacher.named_parameters()))
        put_values(self.net, start.tensors)  # buffers, which are not learned, among them
        if start.activations:
            self.net, self.prefix = QuantizedActivations(self.net, start.activations), "model."
        self.latents: dict[str, Tensor] = {}
        self.log_factors: dict[str, Tensor] = {}
        for name, parameter in self.teacher.named_parameters():
            if name in start.tensors:
                tensor = start.tensors[name]
                self.latents[name] = _latent(parameter, tensor).requires_grad_()
                scale, table = tensor.qparams.scale, tensor.qparams.grid.table
                trained = table if scale is None else scale
                assert trained is not None
                factor = torch.zeros(trained.shape, device=parameter.device)
                self.log_factors[name] = factor.requires_grad_()
        if not self.latents:
            raise ValueError("the strategy leaves every parameter in float: nothing can be learned")
        self.shares: dict[str, float] = {}
        self.thresholds: dict[str, Tensor] = {}
        if density is not None:
            self._begin_sparse(density)
        self.run = _Run(self.net)
        alike = {start.tensors[name].dtype for name in self.latents} == {torch.float32}
        self.precision = _precision(device_of(self.teacher)) if alike else nullcontext()

    def optimizer(self, learning_rate: float) -> Optimizer:
        return torch.optim.Adam(
            [
                {"params": list(self.latents.values()), "full_rate": learning_rate},
                {"params": list(self.log_factors.values()), "full_rate": SCALE_LEARNING_RATE},
            ]
        )

    @torch.no_grad()
    def _begin_sparse(self, density: float) -> None:
        """Latents are the float values, of which the largest will have codes other than 0."""
        able = {n: t.shape for n, t in self.latents.items() if t.dim() > 1}
        able = {n: s for n, s in able.items() if sparsity.is_sparse(self.start.tensors[n].qparams)}
        if not able:
            raise ValueError(
                f"density is {density:g}: it needs a weight on a uniform grid with a level 0 and "
                "others on both sides"
            )
        self.shares = sparsity.shares(able, density)
        own = dict(self.teacher.named_parameters())
        for name, share in self.shares.items():
            self.latents[name].copy_(_mixed(own[name], self.start.tensors[name]))
            qparams = self.start.tensors[name].qparams
            factor = sparsity.first_factor(self.latents[name], qparams, share)
            self.log_factors[name].fill_(math.log(factor))
            self.thresholds[name] = torch.full((), -1.0, device=self.latents[name].device)

    def at(self, batches: int, done: float) -> None:
        """Choose which codes are 0, where only a share may be others: every `OFTEN` batches, and
        after each one in the end.

        batches: that were taken.
        done: the part of the training that is over, 0 to 1.
        """
        if batches % OFTEN == 0 or done >= 1:
            for name, share in self.shares.items():
                now = sparsity.falling(share, done)
                self.thresholds[name].copy_(sparsity.threshold(self.latents[name], now))

    def backward(self, batch: Batch) -> Tensor:
        """Add a batch's gradients to those of the latents and factors.

        Returns: the loss: how far the outputs are from the float network's, and from the labels.
        Raises: ValueError for a batch that is to be taken in parts, and can't be.
        """
        # of the whole batch: test_parts_of_a_batch_give_what_the_batch_gives
        batch, blend = blended(batch)
        weights = {name: self._weight(name) for name in self.latents}
        while True:
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            try:
                loss = self._by_parts(batch, blend, leaves)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not self._halve(batch):
                    raise
        met = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        torch.autograd.backward([weights[name] for name in met], list(met.values()))
        return loss

    def _by_parts(self, batch: Batch, blend: Blend | None, leaves: Mapping[str, Tensor]) -> Tensor:
        """Gradients of the weights, of the mean over all examples."""
        examples = len(batch)
        size = self.micro_batch or examples
        if size >= examples:
            loss = self._loss(batch, blend, leaves)
            loss.backward()
            return loss.detach()
        if not self._is_divisible(batch):
            raise ValueError(
                f"micro_batch is {self.micro_batch}: an example's outputs depend on the rest of "
                "its batch, which can't be taken in parts"
            )
        total = torch.zeros((), device=device_of(self.teacher))
        for first in range(0, examples, size):
            rows = slice(first, first + size)
            part = batch[rows]
            loss = self._loss(part, blend and blend[rows], leaves) * (len(part) / examples)
            loss.backward()
            total += loss.detach()
        return total

    def _is_divisible(self, batch: Batch) -> bool:
        if self.divisible is None:
            with torch.no_grad(), torch.random.fork_rng():
                self.divisible = independent(self.teacher, batch)
        return self.divisible

    def _halve(self, batch: Batch) -> bool:
        """Take half as many examples at a time; False where that can't be."""
        size = min(self.micro_batch or len(batch), len(batch))
        if size < 2 or not self._is_divisible(batch):
            return False
        self.micro_batch = size // 2
        said = f"Out of memory: learning goes on with {self.micro_batch} examples at a time"
        console.print(said, markup=False)
        return True

    def _loss(self, batch: Batch, blend: Blend | None, leaves: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted, *targets = batch.clone().run(self.teacher)
        weights = dict(leaves)
        for name, (owner, places) in self.views.items():
            if owner in weights:
                weights[name] = weights[owner].flatten()[places]
        weights = {f"net.{self.prefix}{name}": weight for name, weight in weights.items()}
        with self.precision:
            outputs, *_ = functional_call(self.run, weights, (batch,))
        self.classes = told(self.classes, class_axes(outputs, targets))
        known = class_labels(outputs, targets, self.classes)
        if are_shares(self.criterion, outputs, targets):
            known = outputs, targets[0]
        if known is None:
            return self._numbers_loss(outputs, wanted, targets, blend)
        wanted = aligned(self.classes, wanted, targets)[0]
        return self._classes_loss(known[0], known[1], wanted, blend)

    def _numbers_loss(
        self, outputs: Any, wanted: Any, targets: list[Any], blend: Blend | None
    ) -> Tensor:
        pairs = zip(tensors_of(outputs), tensors_of(wanted), strict=True)
        apart = [F.mse_loss(o.float(), w.float()) for o, w in pairs if o.is_floating_point()]
        loss = torch.stack(apart).sum()
        alike = len(targets) == 1 and isinstance(outputs, Tensor) and isinstance(targets[0], Tensor)
        if self.label_weight and alike and outputs.shape == targets[0].shape:
            truth = targets[0] if blend is None else blend.mixed(targets[0], blend.targets)
            loss = loss + self.label_weight * F.mse_loss(outputs.float(), truth.float())
        return loss

    def _classes_loss(
        self, outputs: Tensor, targets: Tensor, wanted: Tensor, blend: Blend | None
    ) -> Tensor:
        outputs, wanted = outputs.float(), wanted.float()
        apart = F.kl_div(
            (outputs / SOFTENING).log_softmax(1),
            (wanted / SOFTENING).log_softmax(1),
            reduction="none",
            log_target=True,
        ).sum(1)
        # of positions that no label judges, such as padding, nothing is learned
        first = to_learn(self.criterion, targets, outputs.shape[1])
        if not first.is_floating_point():
            apart = apart * (first != IGNORED)
        loss = SOFTENING**2 * apart.sum() / len(outputs)
        if self.label_weight:
            truth = cross_entropies(self.criterion, outputs, first)
            if blend is not None:
                others = blend.targets.to(targets.device)
                others = to_learn(self.criterion, others, outputs.shape[1])
                other = cross_entropies(self.criterion, outputs, others)
                # a target may have several positions: test_labels_of_several_positions
                share = blend.shares(truth)
                truth = share * truth + (1 - share) * other
            loss = loss + self.label_weight * truth.mean()
        return loss

    def _weight(self, name: str) -> Tensor:
        latent, qparams = self.latents[name], self._qparams(name)
        qparams = replace(qparams, grid=in_float32(qparams.grid, latent.device))
        rows = to_rows(latent, qparams.axis, qparams.group)
        if name in self.thresholds:
            rows = sparsity.sparse_through(rows, qparams, self.thresholds[name])
        else:
            rows = round_through(rows, qparams)
        values = from_rows(rows, latent.shape, qparams.axis, qparams.group)
        tensor = self.start.tensors[name]
        rotation = tensor.rotation
        return (
            values.to(tensor.dtype) if rotation is None else rotation.undone(values, tensor.dtype)
        )

    def _qparams(self, name: str) -> QParams:
        """A tensor's parameters as trained: float32 values of what is stored, with the gradient of
        what they are rounded from."""
        qparams, factor = self.start.tensors[name].qparams, self.log_factors[name].exp()
        if qparams.scale is not None:
            trained = qparams.scale.float() * factor
            stored = stored_scale(trained.detach().double(), qparams.scale.dtype).float()
            return replace(qparams, scale=stored + (trained - trained.detach()))
        assert qparams.grid.table is not None
        trained, dtype = qparams.grid.table.float() * factor, qparams.grid.table.dtype
        largest = min(torch.finfo(kind).max for kind in (dtype, torch.float32))
        stored = trained.detach().clamp(-largest, largest).to(dtype).float()
        table = stored + (trained - trained.detach())
        return with_table(qparams, table.sort(-1)[0])

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The tensors with the codes, scales and tables as learned."""
        tensors = dict(self.start.tensors)
        for name, latent in self.latents.items():
            start, qparams = tensors[name].qparams, self._qparams(name)
            if name in self.thresholds:
                rows = to_rows(latent, start.axis, start.group)
                rows = sparsity.sparse_codes(rows, qparams, self.thresholds[name])
            else:
                rows = qparams.nearest(to_rows(latent.double(), start.axis, start.group))
            codes = from_rows(rows.int(), latent.shape, start.axis, start.group)
            if start.scale is not None and qparams.scale is not None:
                qparams = replace(qparams, scale=qparams.scale.to(start.scale.dtype))
            elif start.grid.table is not None and qparams.grid.table is not None:
                qparams = with_table(qparams, qparams.grid.table.to(start.grid.table.dtype))
            tensors[name] = replace(tensors[name], codes=codes, qparams=qparams)
        return replace(self.start, tensors=tensors)

    def state(self) -> dict[str, dict[str, Tensor]]:
        factors = {"latents": self.latents, "log_factors": self.log_factors}
        return factors | ({"thresholds": self.thresholds} if self.thresholds else {})

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, own in self.state().items():
            for key, tensor in own.items():
                tensor.copy_(state[name][key])


def _mixed(values: Tensor, tensor: QuantizedTensor) -> Tensor:
    return values if tensor.rotation is None else tensor.rotation.of(values)


def _latent(values: Tensor, tensor: QuantizedTensor) -> Tensor:
    """The float values, moved where need be to round to the codes there are, and not beyond the
    outermost levels, where no gradient would bring them back."""
    grid = tensor.qparams.grid
    values, tensor = _mixed(values, tensor), replace(tensor, rotation=None)
    codes = tensor.codes.long()
    level, below, above = (
        replace(tensor, codes=moved.clamp(grid.lowest_code, grid.highest_code)).dequantize().float()
        for moved in (codes, codes - 1, codes + 1)
    )
    within = values.float().clamp((level + below) / 2, (level + above) / 2)
    return level + INSIDE * (within - level)


class _Run(nn.Module):
    """A pass of a batch through a network, as a module, whose tensors torch can swap."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> tuple[Any, ...]:
        return batch.run(self.net)


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    """That of the student's passes: products in bfloat16 where a GPU has it, else as it is."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
