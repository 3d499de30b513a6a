"""Scales of fixed codes fitted by gradients, so that a network's outputs follow the float network's
on training inputs, without labels."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.metrics import judged
from quantifind.network.activations import QuantizedActivations
from quantifind.network.folding import prepared
from quantifind.network.memory import view_places
from quantifind.network.modules import PASS_FAILS, put_values, unpad
from quantifind.runtime.checks import FEW, independent
from quantifind.tensor.qparams import to_rows
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.tensor.stored_scales import stored_scale
from quantifind.utils.batches import Batch, joined
from quantifind.utils.criteria import Criterion, aligned, values_of
from quantifind.utils.devices import device_of, evaluating
from quantifind.utils.divergences import divergences
from quantifind.utils.naming import first_line

# times through the training examples at most, and of the logarithm of a factor the first steps
EPOCHS, LEARNING_RATE = 3, 1e-2
# both networks' logits are divided by it: outputs that are sure of training examples say little,
# and scales that follow them alone do worse on others (seen: a divergence 8% higher, not 8% lower)
SOFTENING = 2.0
# of the examples, one of so many is held out
HELD_OUT = 5
# examples through the network that fitting takes for each of its examples, at most
TAKEN = 1 + 3 * EPOCHS * (1 - 1 / HELD_OUT) + (EPOCHS + 1) / HELD_OUT
# examples that go through the network at a time; fewer where an epoch would have fewer steps
TOGETHER, STEPS = 128, 16
# bytes of the float network's outputs that are kept; beyond, they are computed again
KEPT = 2**28


@dataclass(frozen=True)
class Fitted:
    """What has become of scales.

    quantized: with the same codes; with the scales that it had, where others gained nothing.
    before, after: mean divergence (`quantifind.utils.divergences.divergences`) of the
        examples held out.
    examples: that went through the network; forward and back counts as three.
    note: why nothing could be fitted, in words; else empty.
    """

    quantized: Quantized
    before: float = math.nan
    after: float = math.nan
    examples: float = 0.0
    note: str = ""


def fit_scales(
    model: nn.Module,
    quantized: Quantized,
    batches: Sequence[Batch],
    criterion: Criterion | None = None,
    *,
    gain: float = 1.0,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Fitted:
    """All scales of a network's parameters learned together, by Adam on the logarithm of what they
    are multiplied with; codes, and the dtype of scales, stay.

    The loss is the divergence of the outputs from the float network's
    (`quantifind.utils.divergences.divergences`), of classes with both networks' logits divided
    by `SOFTENING`. A fifth of the examples is held out: the scales of the epoch with the least
    divergence there, not softened, are returned; or those given, where no epoch's divergence is
    less. Dropout is off, norms keep their statistics. No label is used.

    model: the float network.
    batches: of training data; examples that don't depend on their batch's others are put in batches
        of `TOGETHER`.
    criterion: by which outputs are seen as classes, or as numbers, and positions count; its losses
        are not asked for. None for numbers.
    gain: what logits are multiplied with, as the divergence has them.
    epochs, learning_rate: at most, and of the first steps; it falls to zero along a cosine.
    seed: of what is held out, and of the order of the others.
    step: called before each step, which it may end by what it raises.
    Raises: ValueError for batches that the network does not take.
    """
    names = [n for n, _ in model.named_parameters() if _scales(quantized, n)]
    if not names:
        return Fitted(quantized, note="no parameter has a scale")
    generator = torch.Generator().manual_seed(seed)
    training, held_out = _split(model, batches, generator)
    if not training:
        return Fitted(quantized, note="too few batches of training data to hold one out")
    fit = _Fit(model, quantized, names, criterion, gain)
    with fit.differentiable():
        return fit.run(training, held_out, epochs, learning_rate, generator, step)


def _scales(quantized: Quantized, name: str) -> bool:
    return name in quantized.tensors and quantized.tensors[name].qparams.scale is not None


def _split(
    model: nn.Module, batches: Sequence[Batch], generator: torch.Generator
) -> tuple[list[Batch], list[Batch]]:
    """Batches to train with, and those held out; none of either where there are too few."""
    whole = joined(batches)
    with evaluating(model):
        apart = whole is not None and independent(model, whole[:FEW])
    count = len(whole) if whole is not None and apart else len(batches)
    order = torch.randperm(count, generator=generator)
    out = max(count // HELD_OUT, 1)
    if count <= out:
        return [], []
    if whole is None or not apart:
        chosen = [batches[i] for i in order.tolist()]
        return chosen[out:], chosen[:out]
    size = max(1, min(TOGETHER, (count - out) // STEPS))
    return (
        [whole[rows] for rows in order[out:].split(size)],
        [whole[rows] for rows in order[:out].split(TOGETHER)],
    )


class _Fit:
    """Scales that are being fitted.

    start: what they belong to.
    scales: by name, float64, as they were.
    log_factors: by name, the logarithm of what they are multiplied with.
    examples: as of `Fitted`.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Quantized,
        names: Sequence[str],
        criterion: Criterion | None,
        gain: float,
    ) -> None:
        self.teacher, self.start, self.criterion, self.gain = model, start, criterion, gain
        self.own = prepared(model, start.folded).eval().requires_grad_(False)
        unpad(self.own)
        put_values(self.own, start.tensors)
        self.net: nn.Module = self.own
        if start.activations:
            self.net = QuantizedActivations(self.own, start.activations)
        self.parameters = dict(self.own.named_parameters())
        self.views = {
            name: (owner, places.to(device_of(model)))
            for name, (owner, places) in view_places(self.parameters).items()
            if owner in names
        }
        for name in (*names, *self.views):
            self.parameters[name].requires_grad_()
        # where gradients are: test_scales_of_kept_codes_are_fitted
        device = device_of(model)
        self.scales = {name: _scale(start.tensors[name]).double().to(device) for name in names}
        self.log_factors = {name: torch.zeros_like(s) for name, s in self.scales.items()}
        self.wanted: dict[int, tuple[Tensor, Tensor, float, str | None]] = {}
        self.kept, self.examples = 0, 0.0

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Full float32, gradients on."""
        # whose recurrent layers have gradients in training mode only
        enabled = not any(isinstance(m, nn.RNNBase) for m in self.own.modules())
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=enabled, allow_tf32=False):
            yield

    def run(
        self,
        training: Sequence[Batch],
        held_out: Sequence[Batch],
        epochs: int,
        learning_rate: float,
        generator: torch.Generator,
        step: Callable[[], None],
    ) -> Fitted:
        before = after = self._held_out(held_out)
        best, total = self.start, epochs * len(training)
        if not (0 < before < math.inf):
            return Fitted(best, before, after, self.examples)
        optimizer = torch.optim.Adam(list(self.log_factors.values()))
        for done in range(total):
            step()
            if done % len(training) == 0:
                order = torch.randperm(len(training), generator=generator).tolist()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 + math.cos(math.pi * done / total)) / 2
            try:
                learned = self.backward(training[order[done % len(training)]], before)
            except PASS_FAILS as error:
                note = f"the network has no gradient: {first_line(error)}"
                return Fitted(self.start, before, before, self.examples, note)
            if not learned:
                note = "the network has no gradient"
                return Fitted(self.start, before, before, self.examples, note)
            optimizer.step()
            put_values(self.own, self._tensors())
            if (done + 1) % len(training) == 0:
                apart = self._held_out(held_out)
                if apart < after:
                    best, after = self._quantized(), apart
                if not math.isfinite(apart):
                    break
        return Fitted(best, before, after, self.examples)

    def backward(self, batch: Batch, unit: float) -> bool:
        """Give the factors their gradients of the loss in a unit; False where there are none."""
        self.own.zero_grad()
        apart, count = self.divergence(batch, SOFTENING)
        self.examples += 2 * len(batch)
        if not apart.requires_grad:
            return False
        (apart / max(count, 1e-12) / unit).backward()
        for name, log_factor in self.log_factors.items():
            parameter, qparams = self.parameters[name], self.start.tensors[name].qparams
            gradient = _dense(parameter)
            for view, (owner, places) in self.views.items():
                if owner == name:
                    found = _dense(self.parameters[view]).flatten()
                    gradient = gradient.flatten().index_add(0, places.flatten(), found)
                    gradient = gradient.reshape(parameter.shape)
            values, tensor = parameter.detach().float(), self.start.tensors[name]
            if tensor.rotation is not None:
                gradient, values = map(tensor.rotation.of, (gradient, values))
            # a weight is a level times its scale: so it is itself its derivative by the logarithm
            met = to_rows(gradient * values, qparams.axis, qparams.group)
            log_factor.grad = met.double().sum(1, keepdim=True).reshape(log_factor.shape)
        return True

    def _held_out(self, batches: Sequence[Batch]) -> float:
        with torch.no_grad():
            found = [self.divergence(batch) for batch in batches]
        count = sum(weight for _, weight in found)
        return sum(apart.item() for apart, _ in found) / count if count else 0.0

    def divergence(self, batch: Batch, softening: float = 1.0) -> tuple[Tensor, float]:
        """The sum over a batch's examples, and what they count."""
        wanted, shares, count, classes = self._wanted(batch)
        outputs, *targets = batch.clone().run(self.net)
        self.examples += len(batch)
        outputs = values_of(self.criterion, aligned(self.criterion, outputs, targets)[0])
        gain = self.gain / softening
        return divergences(outputs, wanted, shares, classes, gain).sum(), count

    def _wanted(self, batch: Batch) -> tuple[Tensor, Tensor, float, str | None]:
        """The float network's outputs, their shares, what they count, and their classes."""
        if id(batch) in self.wanted:
            return self.wanted[id(batch)]
        with evaluating(self.teacher):
            found = judged(self.criterion, *batch.clone().run(self.teacher))
        self.examples += len(batch)
        part = found.parts[0]
        shares, count = part.get("share", part["weight"]), float(part["weight"].sum())
        wanted = part["outputs"], shares, count, found.classes
        self.kept += wanted[0].nbytes
        if self.kept <= KEPT:
            self.wanted[id(batch)] = wanted
        return wanted

    def _tensors(self) -> dict[str, QuantizedTensor]:
        tensors = {}
        for name, scale in self.scales.items():
            tensor = self.start.tensors[name]
            stored = stored_scale(scale * self.log_factors[name].exp(), _scale(tensor).dtype)
            stored = stored.to(_scale(tensor).device)
            tensors[name] = replace(tensor, qparams=replace(tensor.qparams, scale=stored))
        return tensors

    def _quantized(self) -> Quantized:
        return replace(self.start, tensors=self.start.tensors | self._tensors())


def _scale(tensor: QuantizedTensor) -> Tensor:
    assert tensor.qparams.scale is not None
    return tensor.qparams.scale


def _dense(parameter: Any) -> Tensor:
    """A parameter's gradient, float32; zeros where it has none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    return (gradient.to_dense() if gradient.is_sparse else gradient).float()
