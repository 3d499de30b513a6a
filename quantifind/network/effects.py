"""What errors of a weight's outputs do, together, to what the network answers: the second moments
of gradients there, one side of a Kronecker-factored Fisher information (arXiv:1503.05671)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.calibration import Batches
from quantifind.network.modules import plain_copy, run, unpad
from quantifind.network.parts import NUMBER
from quantifind.network.products import Product, visiting
from quantifind.network.sums import Sum
from quantifind.network.trace import ProductFacts
from quantifind.tensor.matrices import Matrices
from quantifind.utils.batches import Batch, tensors_of
from quantifind.utils.criteria import aligned, ignored_label
from quantifind.utils.devices import evaluating, is_out_of_memory
from quantifind.utils.divergences import classes_of

# examples that tell enough, half of which do hardly less well; and how many at a time
EXAMPLES, TOGETHER = 1_024, 32
# what a pass forward and backward takes, in passes
PASSES = 3
# outputs whose effects together are held at most
MOST = 2**11
SEED = 0
Effects = Mapping[tuple[str, Matrices], Tensor]


def output_effects(
    model: nn.Module,
    batches: Batches,
    facts: Sequence[ProductFacts],
    criterion: Any = None,
    max_memory: float = math.inf,
) -> Effects:
    """By weight and its matrices, Σ g gᵀ, (groups, outputs, outputs), over the positions at which
    they have an output, float64: g is how an answer drawn at random moves with the output, so that
    the sum tells what an error there does to the divergence of the answers.

    Answers are classes where targets are class labels or the criterion has classes, else numbers of
    equal weight; labels themselves are not looked at. One pass forward and backward.

    batches: as `calibration_batches` gives them; of them at least `EXAMPLES` examples.
    facts: of a pass of each of them (`quantifind.network.trace.trace`).
    criterion: by which the network is judged, where that is known.
    max_memory: bytes that the sums may take, those of weights that a pass uses first.
    Returns: nothing for a weight of more than `MOST` outputs, of which there is no memory for the
        sum, or that has no gradients.
    """
    work = plain_copy(model)
    unpad(work)
    parameters = [p for p in work.parameters() if p.is_floating_point()]
    sums: dict[tuple[str, Matrices], Sum] = {}
    left = max_memory
    for product in facts:
        if product.weight is not None and product.matrices and product.kind != "embedding":
            groups, outputs, _ = product.matrices.shape
            key, size = (product.weight, product.matrices), NUMBER * groups * outputs**2
            if 1 < outputs <= MOST and parameters and key not in sums and size <= left:
                left -= size
                sums[key] = Sum(groups, outputs, outputs, parameters[0].device)
    if not sums:
        return {}
    for parameter in parameters:
        parameter.requires_grad_()
    with evaluating(work), torch.enable_grad():
        try:
            generator = torch.Generator("cpu").manual_seed(SEED)
            for batch in _parts(batches):
                _add(work, batch, sums, criterion, generator)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return {}  # torch has no gradients: test_what_has_no_gradients_has_no_effects
    totals = {key: torch.stack(each.done()) for key, each in sums.items()}
    return {key: total for key, total in totals.items() if total.any()}


def examples_taken(batches: Batches) -> int:
    """As how many examples `output_effects` takes through the network."""
    return PASSES * sum(map(len, _some(batches)))


def _some(batches: Batches) -> list[Batch]:
    """Evenly spread ones of enough examples."""
    count = max(1, sum(map(len, batches)))
    kept = min(len(batches), -(-EXAMPLES * len(batches) // count))
    return [batches[i * len(batches) // kept] for i in range(kept)]


def _parts(batches: Batches) -> Iterator[Batch]:
    """What is gone through at a time: few examples, where they can be taken so."""
    for batch in _some(batches):
        size = TOGETHER if batch.apart else len(batch)
        for first in range(0, len(batch), size):
            yield batch if size >= len(batch) else batch[first : first + size]


def _add(
    work: nn.Module,
    batch: Batch,
    sums: Mapping[tuple[str, Matrices], Sum],
    criterion: Any,
    generator: torch.Generator,
) -> None:
    def visit(product: Product) -> Tensor:
        result = product.compute(*product.operands)
        meeting = product.meet() if product.weight and product.used else None
        total = None if meeting is None else sums.get((product.weight or "", meeting.matrices))
        if meeting is None or total is None or not result.requires_grad:
            return result
        groups, outputs, _ = meeting.matrices.shape

        def add(gradient: Tensor) -> None:
            rows = meeting.outputs(gradient).unflatten(1, (groups, outputs)).movedim(1, 0)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            total.add(rows, rows)

        result.register_hook(add)
        return result.clone()  # what follows may work in place: test_an_activation_in_place

    with visiting(work, visit):
        outputs, *targets = run(work, batch)
        pull = _pull(outputs, targets, criterion, generator)
        if pull.requires_grad:
            torch.autograd.backward(pull)
    for parameter in work.parameters():
        parameter.grad = None


def _pull(
    outputs: Any, targets: Sequence[Any], criterion: Any, generator: torch.Generator
) -> Tensor:
    """The sum of outputs times directions drawn at random."""
    outputs, targets = aligned(criterion, outputs, targets)
    labels = targets[0] if len(targets) == 1 else None
    classes = None
    if isinstance(labels, Tensor) and isinstance(outputs, Tensor):
        classes = classes_of(criterion, outputs, labels)
    pulled = [
        (
            each
            * _direction(each.detach().float(), classes, generator)
            * _counted(criterion, each, labels)
        ).sum()
        for each in tensors_of(outputs)
        if each.requires_grad
    ]
    return sum(pulled, torch.zeros(()))


def _direction(outputs: Tensor, classes: str | None, generator: torch.Generator) -> Tensor:
    """Drawn at random, its covariance the Hessian of a divergence of outputs from these
    (`quantifind.utils.divergences.divergences`), but for a factor."""
    drawn = torch.randint(2, outputs.shape, generator=generator, device="cpu")
    signs = (2 * drawn - 1).to(outputs)
    if classes == "softmax":
        shares = outputs.softmax(1)
        signs = signs * shares.sqrt()
        return signs - shares * signs.sum(1, keepdim=True)
    if classes == "sigmoid":
        shares = outputs.sigmoid()
        return signs * (shares * (1 - shares)).sqrt()
    return signs


def _counted(criterion: Any, outputs: Tensor, labels: Any) -> Tensor | float:
    """1 where an output is judged; 0 where its label is ignored, such as that of padding."""
    place = outputs.shape[:1] + outputs.shape[2:]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != place:
        return 1.0
    ignored = ignored_label(criterion)
    counted = (labels >= 0) if ignored is None else (labels >= 0) & (labels != ignored)
    return counted.unsqueeze(1).to(outputs)
