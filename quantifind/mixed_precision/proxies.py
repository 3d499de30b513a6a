"""Predicted loss increases when one tensor of a network is quantized: by the Hessian (HAWQ-V2,
arXiv:1911.03852), by the Fisher information (FIT, arXiv:2210.08502), and by the gradients at a
layer's output (as NVIDIA's ModelOpt scores layers).

All are in the unit of the loss: the second-order term ½·dᵀHd of its increase with a tensor's change
d, in which H is approximated. The papers leave the ½ out, since they only rank; here a prediction
is to be compared with the increase that is measured.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantifind.metrics import Criterion, losses
from quantifind.network.calibration import calibration_batches
from quantifind.network.modules import plain_copy
from quantifind.network.products import Product, visiting
from quantifind.utils.devices import device_of


def hessian_traces(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any],
    *,
    draws: int = 16,
    seed: int = 0,
) -> dict[str, float]:
    """By parameter, trace(H)/elements, where H is its block of the mean loss's Hessian: the mean of
    vᵀHv over random signs v (Hutchinson), drawn anew for each batch.

    batches: (inputs, targets). draws: signs per tensor and batch; the time grows with draws ×
    tensors, the standard error falls with the root of draws. A trace may be negative.
    Raises: ValueError for batches without examples or targets, and a loss that is not finite.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: 1 or more is needed")
    kept = _labelled(batches)
    count = sum(len(inputs) for inputs, _ in kept)
    generator = torch.Generator("cpu").manual_seed(seed)
    with _differentiable(model) as (work, parameters):
        traces = dict.fromkeys(parameters, 0.0)
        for inputs, targets in kept:
            loss = _losses(work, criterion, inputs, targets).sum() / count
            gradients = torch.autograd.grad(
                loss, list(parameters.values()), create_graph=True, materialize_grads=True
            )
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                # one tensor at a time: signs of all at once would save passes, but the products
                # between tensors, zero only in the mean, would drown the small traces
                for _ in range(draws if gradient.requires_grad else 0):
                    bits = torch.randint(2, parameter.shape, generator=generator, device="cpu")
                    signs = 2 * bits.to(parameter) - 1
                    (product,) = torch.autograd.grad(
                        gradient, parameter, signs, retain_graph=True, materialize_grads=True
                    )
                    traces[name] += (signs * product).sum(dtype=torch.float64).item() / draws
        return {name: trace / max(parameters[name].numel(), 1) for name, trace in traces.items()}


def hessian_increase(mean_trace: float, values: Tensor, quantized: Tensor) -> float:
    """½ · trace(H)/elements · ‖quantized − values‖²: for a change of random direction.

    mean_trace: of `hessian_traces`.

    >>> hessian_increase(3.0, torch.zeros(2), torch.tensor([1.0, -1.0]))
    3.0
    """
    return 0.5 * mean_trace * (quantized.double() - values.double()).square().sum().item()


def fisher(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any],
    *,
    examples: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """By parameter, the diagonal of the empirical Fisher information: the mean over examples of the
    square of the gradient of an example's own loss.

    One example at a time, which any network can be given, so that memory is that of one pass.
    batches: (inputs, targets). examples: how many at most, drawn from all of them without
    replacement.
    Returns: the parameter's shape, float32 or, of a float64 parameter, float64.
    Raises: as for `hessian_traces`.
    """
    if examples < 1:
        raise ValueError(f"examples is {examples}: 1 or more is needed")
    single = [
        (inputs[i : i + 1], targets[i : i + 1])
        for inputs, targets in _labelled(batches)
        for i in range(len(inputs))
    ]
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(len(single), generator=generator, device="cpu")[:examples].tolist()
    with _differentiable(model) as (work, parameters):
        means = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in parameters.items()
        }
        for i in drawn:
            loss = _losses(work, criterion, *single[i]).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for mean, gradient in zip(means.values(), gradients, strict=True):
                gradient = gradient.to(mean.dtype)
                mean.addcmul_(gradient, gradient, value=1 / len(drawn))
    return {name: mean.detach() for name, mean in means.items()}


def fisher_increase(information: Tensor, values: Tensor, quantized: Tensor) -> float:
    """½ · Σ F (quantized − values)²: for a log-likelihood and a network that fits its data, the
    Fisher information is the Hessian's expectation, and here its diagonal stands for it.

    information: F, of `fisher`, of the shape of ``values``.

    >>> fisher_increase(torch.tensor([2.0, 0.0]), torch.zeros(2), torch.tensor([3.0, 3.0]))
    9.0
    """
    change = quantized.double() - values.double()
    return 0.5 * (information.double() * change.square()).sum().item()


def output_fisher_increases(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any],
    candidates: Mapping[str, Sequence[Tensor]],
) -> dict[str, list[float]]:
    """By tensor, for each of its candidate values, ½ · Σ g²·(y − y_q)² in the mean over examples.

    y is the output of the linear map, convolution or other product that the tensor is the weight or
    the bias of, g the gradient of the example's loss there, y_q the output with the candidate in
    the tensor's place on the same inputs. Where a pass uses a tensor several times, the sum.

    One pass forward and backward per batch; each candidate then costs its own product alone.
    batches: (inputs, targets). candidates: by name of a parameter, tensors of its shape.
    Returns: as many figures as candidates; tensors that are in no product, those of a norm, are
    left out.
    Raises: as for `hessian_traces`, and for a tensor that is not there or of another shape.
    """
    kept = _labelled(batches)
    count = sum(len(inputs) for inputs, _ in kept)
    loss_increases: dict[str, list[float]] = {}
    with _differentiable(model) as (work, parameters):
        _check_candidates(parameters, candidates)
        for inputs, targets in kept:
            uses = _product_uses(work, criterion, inputs, targets)
            for name in candidates.keys() & uses.keys():
                found = loss_increases.setdefault(name, [0.0] * len(candidates[name]))
                for i, candidate in enumerate(candidates[name]):
                    with _replaced(parameters[name], candidate):
                        for product, output, gradient in uses[name]:
                            change = product.compute(*product.operands) - output
                            power = (gradient * change).square().sum(dtype=torch.float64)
                            found[i] += 0.5 * power.item() / count
    return {name: loss_increases[name] for name in candidates if name in loss_increases}


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A copy in eval mode, and those of its tensors that have gradients, all its floating point
    parameters, by name; within it gradients are on and exist twice over."""
    work = plain_copy(model).eval()
    for module in work.modules():
        if isinstance(module, nn.Embedding):
            # would hide the padding's row from gradients, not from quantization:
            # test_an_embedding_of_padding_counts
            module.padding_idx = None
    parameters = {
        name: parameter.requires_grad_()
        for name, parameter in work.named_parameters()
        if parameter.is_floating_point()
    }
    # attention's fused kernels have no second derivative: test_every_network
    attention = sdpa_kernel(SDPBackend.MATH)
    with attention, torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield work, parameters


def _labelled(batches: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    kept = calibration_batches(batches)
    if bad := [len(batch) for batch in kept if len(batch) != 2]:
        raise ValueError(f"a batch has {bad[0]} parts: (inputs, targets) is needed")
    return [(inputs, targets) for inputs, targets in kept]


def _losses(work: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor) -> Tensor:
    """(examples,)"""
    device = device_of(work)
    loss = losses(criterion, work(inputs.to(device)), targets.to(device))
    if bad := int((~loss.isfinite()).sum()):
        raise ValueError(f"{criterion!r}: {bad} of {len(loss)} losses are NaN or infinite")
    return loss


def _check_candidates(
    parameters: Mapping[str, Tensor], candidates: Mapping[str, Sequence[Tensor]]
) -> None:
    for name, values in candidates.items():
        if name not in parameters:
            raise ValueError(f"unknown tensor {name!r}: there are {', '.join(parameters)}")
        shape = parameters[name].shape
        if bad := [value.shape for value in values if value.shape != shape]:
            raise ValueError(f"{name}: a candidate is {list(bad[0])}, the tensor {list(shape)}")


def _product_uses(
    work: nn.Module, criterion: Criterion, inputs: Tensor, targets: Tensor
) -> dict[str, list[tuple[Product, Tensor, Tensor]]]:
    """By weight and by bias, the products of a pass, their outputs, and the gradients there."""
    seen: list[tuple[Product, Tensor]] = []

    def visit(product: Product) -> Tensor:
        output = product.compute(*product.operands)
        if product.weight is None or not output.requires_grad:
            return output
        seen.append((product, output))
        return output.clone()  # what follows may work in place: test_an_activation_in_place

    with visiting(work, visit):
        loss = _losses(work, criterion, inputs, targets).sum()
    outputs = [output for _, output in seen]
    gradients: Sequence[Tensor] = []
    if outputs:
        gradients = torch.autograd.grad(loss, outputs, materialize_grads=True)
    uses: defaultdict[str, list[tuple[Product, Tensor, Tensor]]] = defaultdict(list)
    for (product, output), gradient in zip(seen, gradients, strict=True):
        for name in {product.weight, product.bias_name} - {None}:
            uses[str(name)].append((product, output.detach(), gradient))
    return uses


@contextmanager
def _replaced(parameter: Tensor, values: Tensor) -> Iterator[None]:
    """Within it, ``parameter`` and whatever is a view of it have other values."""
    own = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(values)
        try:
            yield
        finally:
            parameter.copy_(own)
