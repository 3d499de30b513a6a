"""Learned rounding: codes and scales trained until the network's outputs follow those of the float
network (straight-through estimation, arXiv:1308.3432; LSQ, arXiv:1902.08153; distillation,
arXiv:1503.02531)."""

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from quantifind.metrics import outcome
from quantifind.network.activations import QuantizedActivations, in_float32, round_through
from quantifind.network.modules import plain_copy, put_values
from quantifind.quantize import quantize
from quantifind.storage import artifact
from quantifind.storage.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    random_state,
    replace_checkpoint,
    set_random_state,
)
from quantifind.storage.store import fingerprint
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Grid, Quantized, QuantizedTensor, from_rows, to_rows
from quantifind.tensor.scales import nearest_codes, stored_scale
from quantifind.utils.console import progress
from quantifind.utils.devices import device_of

RATE = 2e-4
# scales and tables are trained by the logarithm of what they are multiplied with
GROWTH_RATE = 2e-3
# both networks' logits are divided by it, so that more than the likeliest class has a say
TEMPERATURE = 2.0
# how far towards the next level a value may begin that rounds to this one
INSIDE = 0.9
CALIBRATION_BATCHES = 64
CHECK_EVERY = 50


def learn(
    model: nn.Module,
    strategy: Strategy,
    loader: DataLoader,
    *,
    epochs: float | None = None,
    seconds: float | None = None,
    calibration: Iterable[Any] | None = None,
    softening: float = 1.0,
    labels: float = 0.0,
    rate: float | None = None,
    checkpoints: Path | str | None = None,
    seed: int = 0,
) -> Quantized:
    """Train the codes, scales and codebooks that ``strategy`` begins with; ``model`` is intact.

    The outputs of the quantized network are held to those of ``model``: where targets are class
    labels, by the Kullback-Leibler divergence, else by the squared error.
    Where inputs are floating point, half of each batch are blends of two examples (mixup,
    arXiv:1710.09412), so that the two networks agree between the examples too. Dropout is off and
    norms keep their statistics, activations the levels they are calibrated to, and what stays in
    float its values.

    loader: training data, batches [inputs, targets]. epochs or seconds: the budget, over which the
    learning rate falls to zero along a cosine; one that is resumed has only what is left of it.
    calibration: as `quantifind.quantize.quantize` takes it; by default the loader's first batches.
    softening: a temperature by which a classifier's float logits are divided; above 1 it makes a
    network that is too sure of itself less so (Guo et al. 2017, arXiv:1706.04599).
    labels: the weight, beside the outputs' 1, of the loss to the targets themselves (cross entropy,
    or squared error), blended as the inputs are. rate: of learning codes at the start, by default
    `RATE`.
    checkpoints: a folder; the state after the last whole epoch is kept there, and a call that finds
    one goes on from it, with a budget of epochs to the same result. Data are not compared.
    seed: of the blends, and of the order of the examples unless the loader has a generator.
    Errors: ValueError for a budget or softening out of range, a loader without batches, checkpoints
    of other work, outputs that are not finite, and as for `quantize`.
    """
    if (epochs is None) == (seconds is None):
        raise ValueError(f"learning takes either epochs or seconds, not {epochs=}, {seconds=}")
    budget = epochs if seconds is None else seconds
    rate = RATE if rate is None else rate
    if not isinstance(labels, int | float) or not 0 <= labels < math.inf:
        raise ValueError(f"labels is {labels!r}: a number, 0 or above, is needed")
    named = {"epochs" if seconds is None else "seconds": budget, "softening": softening}
    for name, value in (named | {"rate": rate}).items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}: a number above 0 is needed")
    assert budget is not None
    if len(loader) == 0:
        raise ValueError("the loader has no batches")
    options = [strategy.choices, budget, softening, labels, rate, seed]
    given = [] if strategy.fitted is None else artifact.pack(strategy.fitted)
    work = fingerprint(model, options, *given)
    path = None if checkpoints is None else latest_checkpoint(Path(checkpoints))
    if path is not None:
        keys = ("work", "student", "optimizer", "done", "spent", "began_with", "random_state")
        other, tensors, state, done, spent, began_with, random = load_checkpoint(path, keys)
        if other != work:
            raise ValueError(f"{path}: of another network, strategy or budget")
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        if path is None:
            done, spent, began_with = 0, 0.0, random_state(loader)  # batches and seconds
        # the loader's first batches are drawn as they were: test_resuming_gives_the_same_codes
        set_random_state(began_with, loader)
        if calibration is None:
            calibration = list(islice(loader, CALIBRATION_BATCHES))
        student = _Student(model, quantize(model, strategy, calibration))
        if not student.latents:
            raise ValueError("the strategy leaves every parameter in float: nothing can be learned")
        optimizer = torch.optim.Adam(
            [
                {"params": list(student.latents.values()), "rate": rate},
                {"params": list(student.growths.values()), "rate": GROWTH_RATE},
            ]
        )
        if path is not None:
            student.load(tensors)
            optimizer.load_state_dict(state)
            set_random_state(random, loader)
        with progress("learning", total=100) as step:
            shown = 0.0
            while (share := (done / len(loader) if seconds is None else spent) / budget) < 1:
                began = time.monotonic()
                for inputs, targets in loader:
                    share = (done / len(loader) if seconds is None else spent) / budget
                    if share >= 1:
                        break
                    for group in optimizer.param_groups:
                        group["lr"] = group["rate"] * (1 + math.cos(math.pi * share)) / 2
                    loss = student.loss(inputs, targets, softening, labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    done += 1
                    if done % CHECK_EVERY == 0:  # reading a loss waits for the device
                        _check_finite(loss, done)
                        step(f"distance {loss.item():.4g}", steps=100 * share - shown)
                        shown = 100 * share
                    spent, began = spent + time.monotonic() - began, time.monotonic()
                _check_finite(loss, done)
                if checkpoints is not None:
                    replace_checkpoint(
                        checkpoints,
                        {
                            "work": work,
                            "student": student.state(),
                            "optimizer": optimizer.state_dict(),
                            "done": done,
                            "spent": spent,
                            "began_with": began_with,
                            "random_state": random_state(loader),
                        },
                    )
        return student.quantized()


def _check_finite(loss: Tensor, batches: int) -> None:
    if not loss.isfinite():
        raise ValueError(f"the loss became {loss.item()} by batch {batches}")


class _Student:
    """A quantized network whose codes are those nearest to latent float values.

    latents: by name, float32 values of each quantized parameter. growths: by name, the logarithm of
        what its scales, or the entries of its table, are multiplied with.
    """

    def __init__(self, model: nn.Module, start: Quantized) -> None:
        self.teacher = plain_copy(model).eval().requires_grad_(False)
        self.net: nn.Module = plain_copy(model).eval().requires_grad_(False)
        self.start, self.prefix = start, ""
        put_values(self.net, start.tensors)  # buffers, which are not learned, among them
        if start.activations:
            self.net, self.prefix = QuantizedActivations(self.net, start.activations), "model."
        self.latents: dict[str, Tensor] = {}
        self.growths: dict[str, Tensor] = {}
        for name, parameter in self.teacher.named_parameters():
            if name in start.tensors:
                tensor = start.tensors[name]
                self.latents[name] = _latent(parameter, tensor).requires_grad_()
                unit = tensor.grid.table if tensor.scale is None else tensor.scale
                assert unit is not None
                growth = torch.zeros(unit.shape, device=parameter.device)
                self.growths[name] = growth.requires_grad_()

    def loss(self, inputs: Tensor, targets: Tensor, softening: float, labels: float) -> Tensor:
        """How far the outputs are from the float network's, and from the labels."""
        device = device_of(self.teacher)
        inputs, targets = (t.to(device, non_blocking=True) for t in (inputs, targets))
        inputs, (first, second, share) = _blend(inputs, targets)
        with torch.no_grad():
            wanted = self.teacher(inputs.clone()).float()
        weights = {self.prefix + name: self._weight(name) for name in self.latents}
        outputs = functional_call(self.net, weights, (inputs,)).float()
        if targets.is_floating_point():
            loss = F.mse_loss(outputs, wanted)
            if labels:
                share = share.reshape(-1, *(1,) * (first.dim() - 1))
                loss = loss + labels * F.mse_loss(outputs, share * first + (1 - share) * second)
            return loss
        if outputs.dim() < 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"outputs of shape {list(outputs.shape)} beside class labels: (examples, classes) "
                "with two classes or more are needed"
            )
        loss = TEMPERATURE**2 * F.kl_div(
            (outputs / TEMPERATURE).log_softmax(1),
            (wanted / (TEMPERATURE * softening)).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        if labels:
            likely = F.cross_entropy(outputs, first, reduction="none")
            other = F.cross_entropy(outputs, second, reduction="none")
            # a target may have several positions: test_labels_of_several_positions
            share = share.reshape(-1, *(1,) * (likely.dim() - 1))
            loss = loss + labels * (share * likely + (1 - share) * other).mean()
        return loss

    def _weight(self, name: str) -> Tensor:
        tensor, latent = self.start.tensors[name], self.latents[name]
        grid, scale = self._levels(name)
        grid = in_float32(grid, latent.device)
        rows = to_rows(latent, tensor.axis, tensor.group)
        scale = torch.ones((), device=rows.device) if scale is None else scale
        zero = 0 if tensor.zero_point is None else tensor.zero_point
        values = round_through(rows, grid, scale, zero)
        return from_rows(values, latent.shape, tensor.axis, tensor.group).to(tensor.dtype)

    def _levels(self, name: str) -> tuple[Grid, Tensor | None]:
        """A tensor's grid and scale as grown: float32 values of what is stored, with the gradient
        of what they are rounded from."""
        tensor, factor = self.start.tensors[name], self.growths[name].exp()
        if tensor.scale is not None:
            grown = tensor.scale.float() * factor
            stored = stored_scale(grown.detach().double(), tensor.scale.dtype).float()
            return tensor.grid, stored + (grown - grown.detach())
        assert tensor.grid.table is not None
        grown, dtype = tensor.grid.table.float() * factor, tensor.grid.table.dtype
        largest = min(torch.finfo(kind).max for kind in (dtype, torch.float32))
        stored = grown.detach().clamp(-largest, largest).to(dtype).float()
        table = stored + (grown - grown.detach())
        return replace(tensor.grid, table=table.sort(-1)[0]), None

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The tensors with the codes, scales and tables as learned."""
        tensors = dict(self.start.tensors)
        for name, latent in self.latents.items():
            tensor = tensors[name]
            grid, scale = self._levels(name)
            rows = to_rows(latent.double(), tensor.axis, tensor.group)
            codes = nearest_codes(rows, grid, scale, tensor.zero_point).to(torch.int32)
            if grid.table is not None and tensor.grid.table is not None:
                grid = replace(grid, table=grid.table.to(tensor.grid.table.dtype))
            if scale is not None and tensor.scale is not None:
                scale = scale.to(tensor.scale.dtype)
            tensors[name] = replace(
                tensor,
                codes=from_rows(codes, latent.shape, tensor.axis, tensor.group),
                grid=grid,
                scale=scale,
            )
        return Quantized(tensors, self.start.activations)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"latents": self.latents, "growths": self.growths}

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, own in self.state().items():
            for key, tensor in own.items():
                tensor.copy_(state[name][key])


def _latent(values: Tensor, tensor: QuantizedTensor) -> Tensor:
    """The float values, moved where need be to round to the codes there are, and not beyond the
    outermost levels, where no gradient would bring them back."""
    lowest = tensor.grid.lowest_code
    highest = lowest + tensor.grid.levels - 1
    codes = tensor.codes.long()
    level, below, above = (
        replace(tensor, codes=moved.clamp(lowest, highest)).dequantize().float()
        for moved in (codes, codes - 1, codes + 1)
    )
    within = values.float().clamp((level + below) / 2, (level + above) / 2)
    return level + INSIDE * (within - level)


def _blend(inputs: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Half of the examples, the first of a shuffled batch, blended with others of it.

    Returns: the inputs; the targets of both examples that each is made of, and the first's share.
    """
    count = len(inputs) // 2
    share = torch.ones(len(inputs), device=inputs.device)
    if not inputs.is_floating_point() or count == 0:
        return inputs, (targets, targets, share)
    share[:count] = torch.rand(count).to(inputs.device)
    others = torch.arange(len(inputs), device=inputs.device)
    others[:count] = torch.randperm(len(inputs))[:count].to(inputs.device)
    shares = share.to(inputs.dtype).reshape(-1, *(1,) * (inputs.dim() - 1))
    blended = shares * inputs + (1 - shares) * inputs[others]
    return blended, (targets, targets[others], share)


def calibrating_temperature(model: nn.Module, loader: Iterable) -> float:
    """The temperature, 0.1 to 10, that divides a classifier's logits so that their cross entropy on
    a loader's examples is least (Guo et al. 2017, arXiv:1706.04599): above 1 where it is too sure
    of itself. 1 where targets are not class labels."""
    batches = list(loader)
    labels = torch.cat([targets for _, targets in batches])
    if labels.is_floating_point():
        return 1.0
    logits = outcome(model, batches, nn.CrossEntropyLoss())["outputs"].double()

    def loss(logarithm: float) -> float:
        return nn.functional.cross_entropy(logits / math.exp(logarithm), labels).item()

    ends = (math.log(0.1), math.log(10))
    return math.exp(optimize.minimize_scalar(loss, bounds=ends, method="bounded").x)
