"""Linear maps and convolutions with weights in oneDNN's own layout, in which they are laid out once
for each value that they take, not in every batch: on a CPU, without gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils.weak import WeakTensorKeyDictionary

# multiply-adds of a batch below which torch's own start sooner
WORTH = 2**21
# by weight, which value of it was laid out, and so laid out; None where oneDNN can't
_laid_out: Any = WeakTensorKeyDictionary()


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: inputs (…, inputs), weight (outputs, inputs)."""
    rows = inputs.dim() > 1 and not inputs.is_nested
    if rows and weight.dim() == 2 and inputs.shape[-1] == weight.shape[1]:
        laid_out = _once(inputs, weight, bias, torch.ops.mkldnn._reorder_linear_weight)
        if laid_out is not None:
            return torch.ops.mkldnn._linear_pointwise(inputs, laid_out, bias, "none", [], "")
    return F.linear(inputs, weight, bias)


def conv2d(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`: inputs (examples, channels, height, width)."""
    images = inputs.dim() == 4 and not inputs.is_nested and not isinstance(padding, str)
    # oneDNN gives no contiguous outputs, which torch does where nothing is channels last, and which
    # a view may need: test_convolutions_are_those_of_torch
    if images and torch.channels_last in map(suggest_memory_format, (inputs, weight)):
        options = [_pair(given) for given in (padding, stride, dilation)]
        lay_out = partial(
            torch.ops.mkldnn._reorder_convolution_weight,
            padding=options[0],
            stride=options[1],
            dilation=options[2],
            groups=groups,
            input_size=list(inputs.shape),
        )
        laid_out = _once(inputs, weight, bias, lay_out, groups)
        if laid_out is not None:
            return torch.ops.mkldnn._convolution_pointwise(
                inputs, laid_out, bias, *options, groups, "none", [], ""
            )
    return F.conv2d(inputs, weight, bias, stride, padding, dilation, groups)


# by torch's operations, what stands for them where a pass is gone through again
INSTEAD: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.conv2d.default: conv2d,
}


@contextmanager
def laying_out_once(model: nn.Module) -> Iterator[None]:
    """Within it, the `nn.Linear` and `nn.Conv2d` of a model, none of a kind derived from them,
    compute by `linear` and `conv2d`."""
    changed: list[Any] = []
    for module in model.modules():
        kind: Any = type(module)
        plain = (
            "forward" not in vars(module) and getattr(module, "padding_mode", "zeros") == "zeros"
        )
        if kind in FORWARDS and plain:
            module.forward = partial(FORWARDS[kind], module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _linear(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


def _conv2d(module: nn.Conv2d, input: Tensor) -> Tensor:
    options = module.stride, module.padding, module.dilation, module.groups
    return conv2d(input, module.weight, module.bias, *options)


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: _linear, nn.Conv2d: _conv2d}


def _once(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lay_out: Callable[[Tensor], Tensor],
    groups: int = 1,
) -> Tensor | None:
    """The weight laid out, as it is now; None where torch's own operation is to be taken."""
    if not _suits(inputs, weight, bias, groups):
        return None
    # a value written in place has another version, one given as `data` another memory; not seen is
    # what is written in place to `data`
    value = weight._version, weight.data_ptr(), weight.stride(), groups
    kept = _laid_out.get(weight)
    if kept is None or kept[0] != value:
        try:
            kept = value, lay_out(weight.detach())
        except RuntimeError:
            kept = value, None
        _laid_out[weight] = kept
    return kept[1]


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    return (
        inputs.device.type == weight.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.layout == torch.strided
        # oneDNN doesn't go by a bias's strides: test_a_bias_may_be_a_part_of_something
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and inputs.numel() // max(weight.shape[1] * groups, 1) * weight.numel() >= WORTH
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        # such a weight has no version: test_weights_made_in_inference_mode_are_left_to_torch
        and not weight.is_inference()
    )


def _pair(given: Any) -> list[int]:
    return list(given) * (2 // len(given)) if isinstance(given, tuple | list) else [given] * 2
