"""Quantization-aware training by distillation: codes, scales and tables are trained until the
network's outputs follow the float network's (straight-through estimation, arXiv:1308.3432; LSQ,
arXiv:1902.08153; distillation, arXiv:1503.02531)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from quantifind.metrics import outcome
from quantifind.network.activations import QuantizedActivations
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
from quantifind.tensor.qparams import QParams, from_rows, to_rows, with_table
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.tensor.ste import in_float32, round_through
from quantifind.tensor.stored_scales import stored_scale
from quantifind.utils.console import progress
from quantifind.utils.devices import device_of

LEARNING_RATE = 2e-4
# scales and tables are trained by the logarithm of the factor that they are multiplied with
SCALE_LEARNING_RATE = 2e-3
# both networks' logits are divided by it, so that more than the likeliest class has a say
SOFTENING = 2.0
# latent weights start at most this fraction of the way from their level to the rounding boundary
INSIDE = 0.9
CALIBRATION_BATCHES = 64
CHECK_EVERY = 50


def learn(
    model: nn.Module,
    strategy: Strategy | Quantized,
    loader: DataLoader,
    *,
    epochs: float,
    calibration: Iterable[Any] | None = None,
    temperature: float = 1.0,
    label_weight: float = 0.0,
    learning_rate: float | None = None,
    checkpoints: Path | str | None = None,
    seed: int = 0,
) -> Quantized:
    """Train the codes, scales and codebooks that a strategy begins with; ``model`` is intact.

    The outputs of the quantized network are held to those of ``model``: where targets are class
    labels, by the Kullback-Leibler divergence, else by the squared error. Where inputs are floating
    point, half of each batch are blends of two examples (mixup, arXiv:1710.09412), so that the two
    networks agree between the examples too. Dropout is off and norms keep their statistics,
    activations their parameters, and what stays in float its values.

    strategy: to begin with; or what is already quantized.
    loader: training data, batches [inputs, targets].
    epochs: the budget, over which the learning rate falls to zero along a cosine.
    calibration: as `quantifind.quantize.quantize` takes it; by default the loader's first batches.
    temperature: divides a classifier's float logits; above 1 it makes an overconfident network less
        so (Guo et al. 2017, arXiv:1706.04599).
    label_weight: the weight, beside the outputs' 1, of the loss to the targets themselves (cross
        entropy, or squared error), blended as the inputs are.
    learning_rate: of the codes at the start, by default `LEARNING_RATE`.
    checkpoints: a folder; the state after the last whole epoch is kept there, and a call that finds
        one goes on from it, to the same result. Data are not compared.
    seed: of the blends, and of the order of the examples unless the loader has a generator.
    Raises: ValueError for an option out of range, a loader without batches, checkpoints of other
        work, outputs that are not finite, and as `quantifind.quantize.quantize`.
    """
    learning_rate = LEARNING_RATE if learning_rate is None else learning_rate
    _check_number("label_weight", label_weight, zero=True)
    _check_number("epochs", epochs)
    _check_number("temperature", temperature)
    _check_number("learning_rate", learning_rate)
    if len(loader) == 0:
        raise ValueError("the loader has no batches")
    given = artifact.pack(strategy) if isinstance(strategy, Quantized) else [strategy.choices]
    options = [epochs, temperature, label_weight, learning_rate, seed]
    work = fingerprint(model, options, *given)
    kept = _kept(checkpoints, work)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        began_with = random_state(loader) if kept is None else kept["began_with"]
        # the loader's first batches are drawn as they were: test_resuming_gives_the_same_codes
        set_random_state(began_with, loader)
        if calibration is None:
            calibration = list(islice(loader, CALIBRATION_BATCHES))
        student = _Student(model, quantize(model, strategy, calibration), temperature, label_weight)
        optimizer = student.optimizer(learning_rate)
        done = 0  # batches
        if kept is not None:
            student.load(kept["student"])
            optimizer.load_state_dict(kept["optimizer"])
            done = kept["done"]
            set_random_state(kept["random_state"], loader)
        with progress("learning", total=math.ceil(epochs * len(loader))) as step:
            step(steps=done)
            while done / len(loader) / epochs < 1:
                done = _epoch(student, optimizer, loader, epochs, done, step)
                if checkpoints is not None:
                    state = {
                        "work": work,
                        "student": student.state(),
                        "optimizer": optimizer.state_dict(),
                        "done": done,
                        "began_with": began_with,
                        "random_state": random_state(loader),
                    }
                    replace_checkpoint(checkpoints, state)
        return student.quantized()


def fit_temperature(model: nn.Module, loader: Iterable) -> float:
    """The temperature of the logits with which their cross entropy on a loader's examples is least.

    It is above 1 where a classifier is overconfident (Guo et al. 2017, arXiv:1706.04599).

    Returns: 0.1 to 10; 1 where targets are not class labels.
    """
    batches = list(loader)
    labels = torch.cat([targets for _, targets in batches])
    if labels.is_floating_point():
        return 1.0
    logits = outcome(model, batches, nn.CrossEntropyLoss())["outputs"].double()

    def loss(logarithm: float) -> float:
        return F.cross_entropy(logits / math.exp(logarithm), labels).item()

    ends = (math.log(0.1), math.log(10))
    return math.exp(optimize.minimize_scalar(loss, bounds=ends, method="bounded").x)


def _check_number(name: str, value: Any, *, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf or (zero and value == 0)):
        least = "of 0 or more" if zero else "above 0"
        raise ValueError(f"{name} is {value!r}: a number {least} is needed")


def _kept(checkpoints: Path | str | None, work: str) -> dict[str, Any] | None:
    """The state of a learning that was killed, None where there is none."""
    path = None if checkpoints is None else latest_checkpoint(Path(checkpoints))
    if path is None:
        return None
    keys = ("work", "student", "optimizer", "done", "began_with", "random_state")
    state = dict(zip(keys, load_checkpoint(path, keys), strict=True))
    if state["work"] != work:
        raise ValueError(f"{path}: of another network, strategy or budget")
    return state


def _epoch(
    student: "_Student",
    optimizer: Optimizer,
    loader: DataLoader,
    epochs: float,
    done: int,
    step: Callable[..., None],
) -> int:
    """Train through the loader once, or until the budget is spent: how many batches are done."""
    loss, shown = torch.zeros(()), done
    for inputs, targets in loader:
        share = done / len(loader) / epochs
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * (1 + math.cos(math.pi * share)) / 2
        loss = student.loss(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        if done % CHECK_EVERY == 0:  # reading a loss waits for the device
            _check_finite(loss, done)
            step(f"distance {loss.item():.4g}", steps=done - shown)
            shown = done
    _check_finite(loss, done)
    return done


def _check_finite(loss: Tensor, batches: int) -> None:
    if not loss.isfinite():
        raise ValueError(f"the loss became {loss.item()} by batch {batches}")


class _Student:
    """A quantized network whose codes are those nearest to latent float values.

    latents: by name, float32 values of each quantized parameter.
    log_factors: by name, the logarithm of what its scales, or the entries of its table, are
        multiplied with.
    """

    def __init__(
        self, model: nn.Module, start: Quantized, temperature: float, label_weight: float
    ) -> None:
        self.temperature, self.label_weight = temperature, label_weight
        self.teacher = plain_copy(model).eval().requires_grad_(False)
        self.net: nn.Module = plain_copy(model).eval().requires_grad_(False)
        self.start, self.prefix = start, ""
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
                unit = table if scale is None else scale
                assert unit is not None
                factor = torch.zeros(unit.shape, device=parameter.device)
                self.log_factors[name] = factor.requires_grad_()
        if not self.latents:
            raise ValueError("the strategy leaves every parameter in float: nothing can be learned")

    def optimizer(self, learning_rate: float) -> Optimizer:
        return torch.optim.Adam(
            [
                {"params": list(self.latents.values()), "full_rate": learning_rate},
                {"params": list(self.log_factors.values()), "full_rate": SCALE_LEARNING_RATE},
            ]
        )

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
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
            if self.label_weight:
                share = share.reshape(-1, *(1,) * (first.dim() - 1))
                blended = share * first + (1 - share) * second
                loss = loss + self.label_weight * F.mse_loss(outputs, blended)
            return loss
        if outputs.dim() < 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"outputs of shape {list(outputs.shape)} beside class labels: (examples, classes) "
                "with two classes or more are needed"
            )
        loss = SOFTENING**2 * F.kl_div(
            (outputs / SOFTENING).log_softmax(1),
            (wanted / (SOFTENING * self.temperature)).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        if self.label_weight:
            likely = F.cross_entropy(outputs, first, reduction="none")
            other = F.cross_entropy(outputs, second, reduction="none")
            # a target may have several positions: test_labels_of_several_positions
            share = share.reshape(-1, *(1,) * (likely.dim() - 1))
            loss = loss + self.label_weight * (share * likely + (1 - share) * other).mean()
        return loss

    def _weight(self, name: str) -> Tensor:
        latent, qparams = self.latents[name], self._qparams(name)
        qparams = replace(qparams, grid=in_float32(qparams.grid, latent.device))
        rows = to_rows(latent, qparams.axis, qparams.group)
        values = from_rows(round_through(rows, qparams), latent.shape, qparams.axis, qparams.group)
        return values.to(self.start.tensors[name].dtype)

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
            rows = to_rows(latent.double(), start.axis, start.group)
            codes = from_rows(qparams.nearest(rows).int(), latent.shape, start.axis, start.group)
            if start.scale is not None and qparams.scale is not None:
                qparams = replace(qparams, scale=qparams.scale.to(start.scale.dtype))
            elif start.grid.table is not None and qparams.grid.table is not None:
                qparams = with_table(qparams, qparams.grid.table.to(start.grid.table.dtype))
            tensors[name] = replace(tensors[name], codes=codes, qparams=qparams)
        return Quantized(tensors, self.start.activations)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"latents": self.latents, "log_factors": self.log_factors}

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, own in self.state().items():
            for key, tensor in own.items():
                tensor.copy_(state[name][key])


def _latent(values: Tensor, tensor: QuantizedTensor) -> Tensor:
    """The float values, moved where need be to round to the codes there are, and not beyond the
    outermost levels, where no gradient would bring them back."""
    grid = tensor.qparams.grid
    codes = tensor.codes.long()
    level, below, above = (
        replace(tensor, codes=moved.clamp(grid.lowest_code, grid.highest_code)).dequantize().float()
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
