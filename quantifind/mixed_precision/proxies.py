"""Predicted loss increases when one tensor of a network is quantized: by the Hessian (HAWQ-V2,
arXiv:1911.03852), by the Fisher information (FIT, arXiv:2210.08502), and by the gradients at a
layer's output (as NVIDIA's ModelOpt scores layers).

All are in the unit of the loss: the second-order term ½·dᵀHd of its increase with a tensor's change
d, in which H is approximated. The papers leave the ½ out, since they only rank; here a prediction
is to be compared with the increase that is measured.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantifind.network.calibration import calibration_batches
from quantifind.network.modules import plain_copy, unpad
from quantifind.network.products import Product, visiting
from quantifind.runtime.checks import independent
from quantifind.utils.batches import Batch
from quantifind.utils.criteria import Criterion, losses, name_of
from quantifind.utils.devices import evaluating


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

    batches: as `quantifind.utils.batches.batches_of` takes them.
    draws: signs per tensor and batch; the time grows with draws × tensors, the standard error falls
        with the root of draws. A trace may be negative.
    Returns: NaN where the loss has no second derivative, or none that torch sees
        (test_what_has_no_second_derivative_is_missing).
    Raises: ValueError for batches without examples or targets, and a loss that is not finite.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: 1 or more is needed")
    kept = calibration_batches(batches, model, criterion=criterion)
    generator, count = torch.Generator("cpu").manual_seed(seed), 0
    with differentiable(model) as (work, parameters):
        sums = dict.fromkeys(parameters, 0.0)
        for batch in kept:
            loss = _losses(work, criterion, batch)
            count += len(loss)
            gradients = _gradients(loss.sum(), parameters)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                # one tensor at a time: signs of all at once would save passes, but the products
                # between tensors, zero only in the mean, would drown the small traces
                for _ in range(draws):
                    if gradient is None:
                        break
                    bits = torch.randint(2, parameter.shape, generator=generator, device="cpu")
                    signs = 2 * bits.to(parameter) - 1
                    product = _second_derivative(gradient, parameter, signs)
                    if product is None:
                        product = _no_curvature(work, criterion, batch, parameter, gradient)
                    sums[name] += (signs * product).sum(dtype=torch.float64).item() / draws
        return {n: total / count / max(parameters[n].numel(), 1) for n, total in sums.items()}


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> Sequence[Tensor | None]:
    """With a graph of their own where torch can; None of what the loss does not depend on."""
    own = list(parameters.values())
    try:
        found = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True)
    except RuntimeError:  # torch's own, such as of CTC: test_what_has_no_second_derivative…
        return torch.autograd.grad(loss, own, allow_unused=True)
    return [gradient if gradient is None else _dense(gradient) for gradient in found]


def _no_curvature(
    work: nn.Module, criterion: Criterion, batch: Batch, parameter: Tensor, gradient: Tensor
) -> Tensor:
    """Zeros where a gradient stays as it is when its parameter moves; else NaN, since torch sees no
    second derivative where there is one."""
    with torch.no_grad():
        moved = parameter * 1.01 + 0.01 * parameter.abs().mean()
    with replaced(parameter, moved), torch.enable_grad():
        loss = _losses(work, criterion, batch).sum()
        (other,) = torch.autograd.grad(loss, parameter, materialize_grads=True)
    same = torch.allclose(_dense(other), gradient.detach(), rtol=1e-4, atol=1e-12)
    return torch.zeros_like(parameter) if same else torch.full_like(parameter, torch.nan)


def _second_derivative(gradient: Tensor, parameter: Tensor, signs: Tensor) -> Tensor | None:
    """None where torch has none."""
    if not gradient.requires_grad:
        return None
    try:
        (product,) = torch.autograd.grad(
            gradient, parameter, signs, retain_graph=True, allow_unused=True
        )
    except RuntimeError:
        return None
    return None if product is None else _dense(product)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


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
) -> dict[str, Tensor]:
    """By parameter, the diagonal of the empirical Fisher information: the mean over examples of the
    square of the gradient of an example's own loss.

    One example at a time, which any network can be given, so that memory is that of one pass.
    batches: as `quantifind.utils.batches.batches_of` takes them.
    examples: how many at most, drawn from all of them without replacement.
    Returns: the parameter's shape, float32 or, of a float64 parameter, float64; nothing where the
        examples of a batch can't be told apart.
    Raises: as for `hessian_traces`.
    """
    if examples < 1:
        raise ValueError(f"examples is {examples}: 1 or more is needed")
    kept = calibration_batches(batches, model, criterion=criterion)
    with evaluating(model):
        if not (all(batch.apart for batch in kept) and independent(plain_copy(model), kept[0])):
            return {}
    single = [batch[i : i + 1] for batch in kept for i in range(len(batch))]
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randperm(len(single), generator=generator, device="cpu")[:examples].tolist()
    with differentiable(model) as (work, parameters):
        means = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in parameters.items()
        }
        for i in drawn:
            loss = _losses(work, criterion, single[i]).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for mean, found in zip(means.values(), gradients, strict=True):
                gradient = _dense(found).to(mean.dtype)
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
    batches: as `quantifind.utils.batches.batches_of` takes them.
    candidates: by name of a parameter, tensors of its shape.
    Returns: as many figures as candidates; tensors that are in no product, those of a norm, are
    left out.
    Raises: as for `hessian_traces`, and for a tensor that is not there or of another shape.
    """
    kept, count = calibration_batches(batches, model, criterion=criterion), 0
    loss_increases: dict[str, list[float]] = {}
    with differentiable(model) as (work, parameters):
        _check_candidates(parameters, candidates)
        for batch in kept:
            uses, _ = products_of(work, partial(_total, work, criterion, batch), {})
            count += len(batch)
            for name in candidates.keys() & uses.keys():
                found = loss_increases.setdefault(name, [0.0] * len(candidates[name]))
                for i, candidate in enumerate(candidates[name]):
                    with replaced(parameters[name], candidate):
                        for product, output, gradient in uses[name]:
                            change = product.compute(*product.operands) - output
                            power = (gradient * change).square().sum(dtype=torch.float64)
                            found[i] += 0.5 * power.item()
    return {n: [f / count for f in loss_increases[n]] for n in candidates if n in loss_increases}


@contextmanager
def differentiable(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A copy in eval mode, and its floating point parameters by name, which have gradients; within
    it, gradients are on and exist twice over."""
    work = plain_copy(model).eval()
    unpad(work)
    parameters = {
        name: parameter.requires_grad_()
        for name, parameter in work.named_parameters()
        if parameter.is_floating_point()
    }
    # attention's fused kernels have no second derivative: test_every_network
    attention = sdpa_kernel(SDPBackend.MATH)
    with attention, torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield work, parameters


def _losses(work: nn.Module, criterion: Criterion, batch: Batch) -> Tensor:
    """(examples,)"""
    outputs, *targets = batch.run(work)
    if not targets:
        raise ValueError(f"{batch} has no targets for {name_of(criterion)}")
    loss = losses(criterion, outputs, *targets)
    if bad := int((~loss.isfinite()).sum()):
        raise ValueError(f"{criterion!r}: {bad} of {len(loss)} losses are NaN or infinite")
    return loss


def _total(work: nn.Module, criterion: Criterion, batch: Batch) -> Tensor:
    return _losses(work, criterion, batch).sum()


def _check_candidates(
    parameters: Mapping[str, Tensor], candidates: Mapping[str, Sequence[Tensor]]
) -> None:
    for name, values in candidates.items():
        if name not in parameters:
            raise ValueError(f"unknown tensor {name!r}: there are {', '.join(parameters)}")
        shape = parameters[name].shape
        if bad := [value.shape for value in values if value.shape != shape]:
            raise ValueError(f"{name}: a candidate is {list(bad[0])}, the tensor {list(shape)}")


def products_of(
    work: nn.Module, loss: Callable[[], Tensor], others: Mapping[str, Tensor]
) -> tuple[dict[str, list[tuple[Product, Tensor, Tensor]]], dict[str, Tensor]]:
    """By weight and by bias, the products of a pass, with their outputs and the gradients there;
    and by name the gradients of parameters that are in no product.

    others: these parameters by name, and perhaps some that are in products.
    loss: runs the pass, and gives a number.
    """
    seen: list[tuple[Product, Tensor]] = []

    def visit(product: Product) -> Tensor:
        output = product.compute(*product.operands)
        if product.weight is None or not output.requires_grad:
            return output
        seen.append((replace(product, compute=_as_here(product.compute, output.device)), output))
        return output.clone()  # what follows may work in place: test_an_activation_in_place

    with visiting(work, visit):
        total = loss()
    met = {name for product, _ in seen for name in (product.weight, product.bias_name)}
    left = {name: parameter for name, parameter in others.items() if name not in met}
    wanted = [*(output for _, output in seen), *left.values()]
    gradients: Sequence[Tensor] = []
    if wanted and total.requires_grad:
        gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    else:
        gradients = [torch.zeros_like(value) for value in wanted]
    uses: defaultdict[str, list[tuple[Product, Tensor, Tensor]]] = defaultdict(list)
    for (product, output), gradient in zip(seen, gradients, strict=False):
        for name in {product.weight, product.bias_name} - {None}:
            uses[str(name)].append((product, output.detach(), gradient))
    return uses, dict(zip(left, gradients[len(seen) :], strict=True))


def _as_here(compute: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """A product that is computed later as it is now, within autocast or not
    (test_proxies_of_a_forward_within_autocast)."""
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)

    def later(*operands: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False):
            return compute(*operands)

    return later


@contextmanager
def replaced(parameter: Tensor, values: Tensor) -> Iterator[None]:
    """Within it, ``parameter`` and whatever is a view of it have other values."""
    own = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(values)
        try:
            yield
        finally:
            parameter.copy_(own)
