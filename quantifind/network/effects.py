"""What errors of a weight's outputs do, together, to what the network answers: the second moments
of gradients there, one side of a Kronecker-factored Fisher information (arXiv:1503.05671)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.calibration import Batches
from quantifind.network.modules import PASS_FAILS, own_tensors, plain_copy, run
from quantifind.network.parts import NUMBER
from quantifind.network.products import Product, visiting
from quantifind.network.sums import Sum
from quantifind.network.trace import ProductFacts
from quantifind.tensor.matrices import Matrices
from quantifind.utils.batches import Batch, tensors_of
from quantifind.utils.criteria import aligned, ignored_label
from quantifind.utils.devices import device_of, evaluating
from quantifind.utils.divergences import classes_of

# examples that are taken, and how many at a time
EXAMPLES, TOGETHER = 1_024, 32
# what a pass forward and backward takes, in passes
PASSES = 3
# outputs whose effects together are held at most
MOST = 2**11
SEED = 0
Key = tuple[str, Matrices]
Effects = Mapping[Key, Tensor]


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
    equal weight. Labels only say which positions are ignored; weights of classes are not used. Each
    example goes forward and backward once, or twice where a network does not take parts of a batch;
    rows of a batch are held to be independent where it does.

    batches: as `calibration_batches` gives them; of them about `EXAMPLES` examples.
    facts: of a pass of each of them (`quantifind.network.trace.trace`).
    criterion: by which the network is judged, where that is known.
    max_memory: bytes that the sums may take; a weight whose sum does not fit beside those of
        weights that a pass uses before has none.
    Returns: nothing for an embedding, a complex weight, one of a single output or of more than
        `MOST`, and one whose gradients are all 0 or not all finite; nothing at all where a pass
        fails that is to have gradients, or takes too much memory.
    """
    # few examples at a time, or, where a network does not take parts of a batch, all of it:
    # test_effects_never_keep_a_network_from_being_quantized
    for together in (TOGETHER, None):
        try:
            return _of_parts(model, _parts(batches, together), facts, criterion, max_memory)
        except (*PASS_FAILS, MemoryError):
            # whatever keeps it from gradients: test_what_has_no_gradients_has_no_effects
            continue
    return {}


def _of_parts(
    model: nn.Module,
    parts: Iterator[Batch],
    facts: Sequence[ProductFacts],
    criterion: Any,
    max_memory: float,
) -> Effects:
    where = device_of(model)
    drawing = torch.random.fork_rng([where] if where.type == "cuda" else [])
    with torch.inference_mode(mode=False), drawing:
        work = plain_copy(model)
        sums = _sums(work, facts, max_memory)
        with evaluating(work), torch.enable_grad():
            generator = torch.Generator("cpu").manual_seed(SEED)
            for batch in parts:
                _add(work, batch, sums, criterion, generator)
        return _finite(sums)


def examples_taken(batches: Batches) -> int:
    """As how many examples `output_effects` takes through the network."""
    return PASSES * sum(map(len, _some(batches)))


def _sums(work: nn.Module, facts: Sequence[ProductFacts], max_memory: float) -> dict[Key, Sum]:
    tensors, left = own_tensors(work), max_memory
    found: dict[Key, Sum] = {}
    for parameter in work.parameters():
        parameter.requires_grad_(False)
    for product in facts:
        if product.weight is None or product.matrices is None or product.kind == "embedding":
            continue
        groups, outputs, _ = product.matrices.shape
        key, size = (product.weight, product.matrices), NUMBER * groups * outputs**2
        weight = tensors[product.weight]
        if key in found or not 1 < outputs <= MOST or size > left or weight.is_complex():
            continue
        left -= size
        found[key] = Sum(groups, outputs, outputs, weight.device)
    return found


def _finite(sums: Mapping[Key, Sum]) -> Effects:
    for each in sums.values():
        each.done()
    return {k: s.total for k, s in sums.items() if s.total.any() and s.total.isfinite().all()}


def _some(batches: Batches) -> list[Batch]:
    """Evenly spread ones."""
    count = max(1, sum(map(len, batches)))
    kept = min(len(batches), -(-EXAMPLES * len(batches) // count))
    return [batches[i * len(batches) // kept] for i in range(kept)]


def _parts(batches: Batches, together: int | None) -> Iterator[Batch]:
    """What is gone through at a time: of batches with many more examples than are needed, evenly
    spread ones."""
    some = _some(batches)
    step = max(1, sum(map(len, some)) // EXAMPLES)
    for batch in some:
        if together is None or not batch.apart:
            yield batch
            continue
        batch = batch[::step] if step > 1 else batch
        for first in range(0, len(batch), together):
            yield batch[first : first + together]


def _add(
    work: nn.Module,
    batch: Batch,
    sums: Mapping[Key, Sum],
    criterion: Any,
    generator: torch.Generator,
) -> None:
    counting = False

    def visit(product: Product) -> Tensor:
        result = product.compute(*product.operands)
        meeting = product.meet() if product.weight and product.used else None
        total = None if meeting is None else sums.get((product.weight or "", meeting.matrices))
        if meeting is None or total is None or not result.is_floating_point():
            return result
        groups, outputs, _ = meeting.matrices.shape

        def add(gradient: Tensor) -> None:
            if not counting:  # a network's own: test_gradients_of_a_network_s_own_do_not_count
                return
            rows = meeting.outputs(gradient).unflatten(1, (groups, outputs)).movedim(1, 0)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            total.add(rows, rows)

        if torch.is_grad_enabled():
            # no parameter has a gradient: what comes before the first product needs none
            result = result if result.requires_grad else result.detach().requires_grad_()
            result.register_hook(add)
        return result.clone()  # what follows may work in place: test_an_activation_in_place

    with visiting(work, visit):
        outputs, *targets = run(work, batch)
        pull = _pull(outputs, targets, criterion, generator)
        counting = True
        if pull.requires_grad:
            torch.autograd.backward(pull)
    for buffer in work.buffers():
        # what a pass has written there: test_effects_never_keep_a_network_from_being_quantized
        buffer.detach_()


def _pull(
    outputs: Any, targets: Sequence[Any], criterion: Any, generator: torch.Generator
) -> Tensor:
    """The sum of outputs times directions drawn at random."""
    outputs, targets = aligned(criterion, outputs, targets)
    labels = targets[0] if len(targets) == 1 else None
    classes = None
    if isinstance(labels, Tensor) and isinstance(outputs, Tensor):
        classes = classes_of(criterion, outputs, labels)
    total = torch.zeros(())
    for each in tensors_of(outputs):
        if not each.requires_grad:
            continue
        each = torch.view_as_real(each) if each.is_complex() else each
        direction = _direction(each.detach().float(), classes, generator)
        if classes == "softmax":
            direction = torch.where(_judged(criterion, each, labels), direction, 0.0)
        total = total.to(each.device) + (each * direction).sum()
    return total


def _direction(outputs: Tensor, classes: str | None, generator: torch.Generator) -> Tensor:
    """Drawn at random, its covariance the Hessian of a divergence of outputs from these
    (`quantifind.utils.divergences.divergences`), but for a factor."""
    drawn = torch.randint(2, outputs.shape, generator=generator, device="cpu", dtype=torch.int8)
    signs = (2 * drawn - 1).to(outputs)
    if classes == "softmax":
        shares = outputs.softmax(1)
        signs = signs * shares.sqrt()
        return signs - shares * signs.sum(1, keepdim=True)
    if classes == "sigmoid":
        shares = outputs.sigmoid()
        return signs * (shares * (1 - shares)).sqrt()
    return signs


def _judged(criterion: Any, outputs: Tensor, labels: Any) -> Tensor:
    """Whether an output's label counts; that of padding may be ignored."""
    place = outputs.shape[:1] + outputs.shape[2:]
    if labels.is_floating_point() or labels.shape != place:
        return torch.ones((), dtype=torch.bool, device=outputs.device)
    ignored = ignored_label(criterion)
    judged = (labels >= 0) if ignored is None else (labels >= 0) & (labels != ignored)
    return judged.unsqueeze(1).to(outputs.device)
