"""Quantization-aware training by distillation: codes, scales and tables learn to follow the float
network's outputs (arXiv:1308.3432; LSQ, arXiv:1902.08153; distillation, arXiv:1503.02531)."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from quantifind.quantize import quantize
from quantifind.runtime.control import FloatStudent
from quantifind.runtime.labels import LABELLED, facts_of
from quantifind.runtime.student import Student
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
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch, Forward, batches_of, copied
from quantifind.utils.console import progress
from quantifind.utils.criteria import name_of
from quantifind.utils.loaders import length_of
from quantifind.utils.naming import NotFinite
from quantifind.utils.torch_losses import as_module

LEARNING_RATE = 2e-4
CALIBRATION_BATCHES = 64
CHECK_EVERY = 50
# between checkpoints within an epoch
SECONDS = 600.0
# what a checkpoint has beside the student's state and the optimizer's
KEPT = ("work", "began_with", "epoch_began", "random_state", "done", "within")
# whose order follows from the random state
SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
Made = TypeVar("Made", bound=Student)


def learn(
    model: nn.Module,
    strategy: Strategy | Quantized,
    loader: Iterable[Any],
    *,
    epochs: float,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
    criterion: Any = None,
    label_weight: float = 0.0,
    density: float | None = None,
    learning_rate: float | None = None,
    micro_batch: int | None = None,
    checkpoints: Path | str | None = None,
    seed: int = 0,
) -> Quantized:
    """Train the codes, scales and codebooks that a strategy begins with; ``model`` is intact.

    The outputs of the quantized network are held to those of ``model``: where targets are labels of
    classes (or with ``criterion`` shares of them), by the Kullback-Leibler divergence, else by the
    squared error. Where batches
    are (inputs, targets) with floating point inputs, half of each are blends of two examples
    (mixup, arXiv:1710.09412). Dropout is off, norms keep their statistics, activations their
    parameters, and what stays in float its values.
    On a GPU that has bfloat16, products of a float32 network are in it.

    strategy: to begin with; or what is already quantized.
    loader: training data, gone through again and again.
    epochs: the budget, over which the learning rate falls to zero along a cosine.
    calibration: as `quantifind.quantize.quantize` takes it; by default the loader's first batches.
    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    criterion: whose ignored labels are not learned. By a `torch.nn.CrossEntropyLoss` float targets
        of the outputs' shape are shares of classes, and in the loss to the targets its smoothing
        counts, and the weights of its classes, which are best about 1 in the mean over examples, as
        balanced ones are. By default cross entropy of labels.
    label_weight: the weight, beside the outputs' 1, of the loss to the targets themselves (cross
        entropy, or squared error), blended as the inputs are.
    density: the share of codes that are not 0 in the end, above 0 and at most 1, of all weights on
        uniform grids that have a level 0; it falls along a schedule, and those are 0 whose latent
        values are smallest (`quantifind.tensor.sparsity`). So the codes cost little where they are
        stored coded. None for as many as there are.
    learning_rate: of the codes at the start, by default `LEARNING_RATE`.
    micro_batch: examples that go through the network at a time, by default a whole batch, and half
        as many where memory runs out. Gradients are those of the whole batch. Batches whose tensors
        have not one row an example stay whole.
    checkpoints: a folder; the state after the last whole epoch is kept there, and a call that finds
        one goes on from it, to the same result. So is, each ten minutes, the state within an epoch
        of a list, or of a DataLoader of torch's own samplers. Data are not compared.
    seed: of the blends, and of the order of the examples unless the loader has a generator.
    Raises: ValueError for an option out of range, a loader without batches, checkpoints of other
        work, outputs that are not finite or, with ``micro_batch``, depend on a batch's other
        examples, and as `quantifind.quantize.quantize`.
    """
    made = _trained(
        Student,
        model,
        strategy,
        loader,
        epochs=epochs,
        calibration=calibration,
        forward=forward,
        criterion=criterion,
        label_weight=label_weight,
        density=density,
        learning_rate=learning_rate,
        micro_batch=micro_batch,
        checkpoints=checkpoints,
        seed=seed,
    )
    return made.quantized()


def train_control(
    model: nn.Module, strategy: Strategy | Quantized, loader: Iterable[Any], **recipe: Any
) -> nn.Module:
    """Train a network's float weights further, as `learn` trains codes; ``model`` is intact.

    What is learned from labels is trained further, too: its loss beside the control's is what
    quantization costs it, beside ``model``'s it is both together.

    strategy: whose codes learn; the parameters that it quantizes are those trained here.
    loader: as `learn` takes it; examples, their order and their blends are the same.
    recipe: what else `learn` was given.
    Returns: a copy in eval mode.
    Raises: ValueError as `learn`; where the training diverges, naming the batch.
    """
    return _trained(FloatStudent, model, strategy, loader, **recipe).trained()


def _trained(
    kind: type[Made],
    model: nn.Module,
    strategy: Strategy | Quantized,
    loader: Iterable[Any],
    *,
    epochs: float,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
    criterion: Any = None,
    label_weight: float = 0.0,
    density: float | None = None,
    learning_rate: float | None = None,
    micro_batch: int | None = None,
    checkpoints: Path | str | None = None,
    seed: int = 0,
) -> Made:
    """A student of a kind, trained; the arguments are those of `learn`."""
    criterion = as_module(criterion)
    learning_rate = LEARNING_RATE if learning_rate is None else learning_rate
    _check_number("label_weight", label_weight, zero=True)
    _check_number("epochs", epochs)
    _check_number("learning_rate", learning_rate)
    _check_options(label_weight, criterion, density, micro_batch)
    batches = length_of(loader)
    if batches == 0:
        raise ValueError("the loader has no batches")
    given = artifact.pack(strategy) if isinstance(strategy, Quantized) else (strategy.choices,)
    options = [*map(float, (epochs, label_weight, learning_rate)), seed, kind.__name__]
    options += [] if density is None else [float(density)]
    if criterion is not None:
        options += [name_of(criterion), facts_of(criterion, labels=label_weight > 0)]
    work = fingerprint(model, options, *given)
    kept = _kept(checkpoints, work)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        began_with = random_state(loader) if kept is None else kept["began_with"]
        # the loader's first batches are drawn as they were: test_resuming_gives_the_same_codes
        set_random_state(began_with, loader)
        if calibration is None:
            calibration = [copied(batch) for batch in islice(loader, CALIBRATION_BATCHES)]
        start = quantize(model, strategy, calibration, forward=forward)
        student = kind(model, start, label_weight, micro_batch, density, criterion)
        optimizer = student.optimizer(learning_rate)
        keeping = _Keeping(checkpoints, loader, student, optimizer, work, began_with)
        if kept is not None:
            keeping.restore(kept)
        with progress("learning", total=math.ceil(epochs * batches)) as step:
            step(steps=keeping.done)
            while keeping.done / batches / epochs < 1:
                epoch = keeping.left(batches_of(loader, model, forward=forward))
                _epoch(keeping, epoch, epochs * batches, step)
                keeping.end_epoch()
        student.at(keeping.done, 1.0)
        return student


def _check_options(label_weight: float, criterion: Any, density: Any, micro_batch: Any) -> None:
    if label_weight and criterion is not None and not isinstance(criterion, LABELLED):
        names = " and ".join(kind.__name__ for kind in LABELLED)
        raise ValueError(f"label_weight is {label_weight:g}: labels are learned with {names} alone")
    if density is not None:
        _check_number("density", density)
        if density > 1:
            raise ValueError(f"density is {density!r}: at most 1 is needed")
    if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
        raise ValueError(f"micro_batch is {micro_batch!r}: a whole number above 0 is needed")


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
    keys = (*KEPT, "student", "optimizer")
    state = dict(zip(keys, load_checkpoint(path, keys), strict=True))
    if state["work"] != work:
        raise ValueError(f"{path}: of another network, strategy or budget")
    return state


@dataclass
class _Keeping:
    """How far a learning is, and its checkpoints.

    folder: None where none are kept.
    work, began_with: what is learned, and the random state with which that began.
    done, within: batches, in all and of the epoch that is under way.
    epoch_began: the random state with which that epoch began.
    resumed: what is left to restore when it goes on.
    """

    folder: Path | str | None
    loader: Any
    student: Student
    optimizer: Optimizer
    work: str
    began_with: dict[str, Any]
    done: int = 0
    within: int = 0
    epoch_began: dict[str, Any] = field(default_factory=dict)
    resumed: dict[str, Any] | None = None
    saved: float = field(default_factory=time.monotonic)

    def restore(self, state: dict[str, Any]) -> None:
        self.student.load(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.within, self.resumed = state["done"], state["within"], state

    def left(self, epoch: Iterator[Batch]) -> Iterator[Batch]:
        """What is left of an epoch's batches."""
        if self.resumed is not None:
            # as they were drawn before: test_resuming_within_an_epoch_gives_the_same_codes
            set_random_state(self.resumed["epoch_began"], self.loader)
        self.epoch_began = random_state(self.loader)
        if self.resumed is not None:
            for _ in islice(epoch, self.within):
                pass
            set_random_state(self.resumed["random_state"], self.loader)
            self.resumed = None
        return epoch

    def step(self, loss: Tensor) -> None:
        """One batch is done."""
        self.done, self.within = self.done + 1, self.within + 1
        due = self.folder is not None and time.monotonic() - self.saved >= SECONDS
        if due and _is_restorable(self.loader):
            _check_finite(loss, self.done)
            self._save()

    def end_epoch(self) -> None:
        self.within, self.epoch_began = 0, random_state(self.loader)
        self._save()

    def _save(self) -> None:
        if self.folder is not None:
            state = {key: getattr(self, key) for key in KEPT if key != "random_state"}
            state["random_state"] = random_state(self.loader)
            state |= {"student": self.student.state(), "optimizer": self.optimizer.state_dict()}
            replace_checkpoint(self.folder, state)
            self.saved = time.monotonic()


def _is_restorable(loader: Any) -> bool:
    """Whether the order of the batches follows from `random_state`."""
    if not isinstance(loader, DataLoader):
        return isinstance(loader, Sequence)
    own = getattr(loader.sampler, "generator", None) in (None, loader.generator)
    return own and type(loader.sampler) in SAMPLERS and type(loader.batch_sampler) is BatchSampler


def _epoch(
    keeping: _Keeping, epoch: Iterable[Batch], total: float, step: Callable[..., None]
) -> None:
    """Train on an epoch's batches, or until so many in all are done."""
    loss, shown = torch.zeros(()), keeping.done
    for batch in epoch:
        share = keeping.done / total
        if share >= 1:
            break
        for group in keeping.optimizer.param_groups:
            group["lr"] = group["full_rate"] * (1 + math.cos(math.pi * share)) / 2
        keeping.student.at(keeping.done, share)
        keeping.optimizer.zero_grad()
        loss = keeping.student.backward(batch)
        keeping.optimizer.step()
        keeping.step(loss)
        if keeping.done % CHECK_EVERY == 0:  # reading a loss waits for the device
            _check_finite(loss, keeping.done)
            step(f"distance {loss.item():.4g}", steps=keeping.done - shown)
            shown = keeping.done
    _check_finite(loss, keeping.done)


def _check_finite(loss: Tensor, batches: int) -> None:
    if not loss.isfinite():
        raise NotFinite(f"the loss became {loss.item()} by batch {batches}")
