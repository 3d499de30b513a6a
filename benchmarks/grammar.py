"""Small networks drawn from a grammar, and what must hold of a search of any of them."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from quantifind.mixed_precision import exploration, refinement
from quantifind.quantize import mean_bits, quantize_model
from quantifind.search import find_strategy
from quantifind.storage import artifact

EXAMPLES, BATCH, CLASSES, WORDS = 24, 8, 3, 7
# axes beside the examples, and how long each is
SHAPES = {
    "vector": (6,),
    "sequence": (5, 6),
    "signal": (4, 8),
    "image": (4, 6, 6),
    "volume": (2, 4, 4, 4),
    "tokens": (5,),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "relu in place": lambda: InPlace(),
}
PARTS = {
    "vector": ["linear", "x @ W", "layer norm", "batch norm", "residual", "shared", "weight norm"],
    "sequence": ["lstm", "gru", "rnn", "attention", "encoder", "linear", "layer norm", "shared"],
    "signal": ["convolution", "transposed", "batch norm", "group norm", "residual"],
    "image": ["convolution", "transposed", "batch norm", "group norm", "pool", "residual"],
    "volume": ["convolution", "transposed", "batch norm"],
    "tokens": [],
}
PARTS["vector"] += ["experts", *ACTIVATIONS]
for kind in ("sequence", "signal", "image", "volume"):
    PARTS[kind] += list(ACTIVATIONS)


@dataclass(frozen=True)
class Drawn:
    """A network to make.

    kind: of its inputs, one of `SHAPES`.
    parts: by name and a number that sets its options.
    wrap: what it gives: tensor, tuple, dict.
    bag, tied: of tokens: whether a bag looks them up, and whether the head is the embedding.
    seed: of weights and data.
    """

    kind: str
    parts: tuple[tuple[str, int], ...]
    wrap: str
    bag: bool
    tied: bool
    seed: int

    def make(self) -> nn.Module:
        """The network, its norms' statistics those of its data."""
        torch.manual_seed(self.seed)
        net = Network(self)
        net.train()
        with torch.no_grad():
            for inputs, _ in self.batches():
                net(inputs.clone())
        return net

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Batches (inputs, targets)."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = EXAMPLES, *SHAPES[self.kind]
        if self.kind == "tokens":
            inputs = torch.randint(WORDS, shape, generator=generator)
        else:
            inputs = torch.randn(shape, generator=generator)
        classes = WORDS if self.tied else CLASSES
        targets = torch.randint(classes, (EXAMPLES,), generator=generator)
        return list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))


@st.composite
def networks(draw: Any) -> Drawn:
    """Any of the grammar, of one to four parts."""
    kind = draw(st.sampled_from(list(SHAPES)))
    inside = "sequence" if kind == "tokens" else kind
    part = st.tuples(st.sampled_from(PARTS[inside]), st.integers(0, 11))
    return Drawn(
        kind,
        tuple(draw(st.lists(part, min_size=0 if kind == "tokens" else 1, max_size=4))),
        draw(st.sampled_from(["tensor", "tuple", "dict"])),
        draw(st.booleans()) if kind == "tokens" else False,
        draw(st.booleans()) if kind == "tokens" else False,
        draw(st.integers(0, 2**16)),
    )


class Network(nn.Module):
    """Parts in a row, then a mean over all axes but the last or the channels', then a head."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.wrap, self.kind = drawn.wrap, drawn.kind
        kind = drawn.kind
        self.look: nn.Module = nn.Identity()
        if kind == "tokens":
            kind = "sequence"
            width = SHAPES[kind][-1]
            self.look = nn.EmbeddingBag(WORDS, width) if drawn.bag else nn.Embedding(WORDS, width)
            kind = "vector" if drawn.bag else kind
        allowed = set(PARTS[kind])
        parts = [make_part(kind, *part) for part in drawn.parts if part[0] in allowed]
        self.parts = nn.Sequential(*parts)
        self.channels_first = kind in ("signal", "image", "volume")
        width = SHAPES[kind][0 if self.channels_first else -1]
        self.head = nn.Linear(width, WORDS if drawn.tied else CLASSES)
        if drawn.tied:
            self.head.weight = self.look.weight

    def forward(self, x: Tensor) -> Any:
        hidden = self.parts(self.look(x))
        axes = range(2, hidden.dim()) if self.channels_first else range(1, hidden.dim() - 1)
        outputs = self.head(hidden.mean(tuple(axes)) if len(axes) else hidden)
        if self.wrap == "dict":
            return {"logits": outputs, "hidden": hidden}
        return (outputs, hidden) if self.wrap == "tuple" else outputs


class InPlace(nn.Module):
    """ReLU that works on its argument, which is a sum, since a norm's or tanh's can't be."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 0.1, inplace=True)


class Turned(nn.Module):
    """x @ W, W being (inputs, outputs)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Around(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """One module, used twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class First(nn.Module):
    """The first of a recurrent layer's results."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attention(nn.Module):
    """Of a sequence to itself, with or without a causal mask."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.inner, self.causal = nn.MultiheadAttention(width, 2, batch_first=True), causal

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.causal:
            mask = torch.full((x.shape[1],) * 2, -math.inf).triu(1)
        return x + self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


class Experts(nn.Module):
    """Each example goes to the likelier of two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return out


def make_part(kind: str, name: str, number: int) -> nn.Module:
    """A part that gives what it takes, in shape.

    number: 0 to 11, of which each option takes a digit.
    """
    channels_first = kind in ("signal", "image", "volume")
    width, axes = SHAPES[kind][0 if channels_first else -1], len(SHAPES[kind]) - 1
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    if name == "residual":
        return Around(make_part(kind, "convolution" if channels_first else "linear", number))
    if name == "shared":
        return Twice(nn.Linear(width, width))
    if name in ("convolution", "transposed"):
        return convolution(name, axes, width, number)
    if name == "pool":
        return nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1))
    if name == "batch norm":
        return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes](
            width, affine=number % 2 == 0
        )
    if name == "attention":
        return Attention(width, causal=number % 2 == 0)
    if name == "encoder":
        return nn.TransformerEncoderLayer(
            width, 2, 8, 0.1, batch_first=True, norm_first=number % 2 == 0
        )
    if name in ("lstm", "gru", "rnn"):
        return recurrent(name, width, number)
    return {
        "linear": lambda: nn.Linear(width, width, bias=number % 2 == 0),
        "x @ W": lambda: Turned(width),
        "layer norm": lambda: nn.LayerNorm(width),
        "group norm": lambda: nn.GroupNorm(2, width),
        "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
        "experts": lambda: Experts(width),
    }[name]()


def convolution(name: str, axes: int, width: int, number: int) -> nn.Module:
    groups = (1, 2, width)[number % 3]
    if name == "transposed":
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        return kind(width, width, 3, padding=1, groups=groups, bias=number % 2 == 0)
    mode = ("zeros", "circular")[number // 3 % 2]
    dilation = 1 + number // 6
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return kind(
        *(width, width, 3),
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=number % 2 == 0,
        padding_mode=mode,
    )


def recurrent(name: str, width: int, number: int) -> nn.Module:
    both = number % 2 == 0
    options: dict[str, Any] = {"batch_first": True, "bidirectional": both}
    options["num_layers"] = 1 + number // 2 % 2
    if name == "lstm" and number >= 8:
        return First(nn.LSTM(width, 2 * width, proj_size=width // (1 + both), **options))
    kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[name]
    return First(kind(width, width // (1 + both), **options))


def logits(made: Any) -> Tensor:
    """What is judged, of whatever a drawn network gives."""
    if isinstance(made, dict):
        return made["logits"]
    return made[0] if isinstance(made, tuple) else made


def forward(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The adapter of all drawn networks."""
    return logits(net(batch[0])), batch[1]


def plain_loss(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """A plain loop in eval mode, with nothing of the package."""
    net.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(logits(net(x.clone())), y, reduction="sum") for x, y in batches]
    return sum(loss.double().item() for loss in losses) / EXAMPLES


def recount(net: nn.Module, quantized: Any) -> float:
    """Bits per parameter, from packed bytes and what stays in float: codes fill whole bytes."""
    packed, _ = artifact.pack(quantized)
    copied = quantize_model(net, quantized)
    buffers = {n: b for n, b in copied.named_buffers() if b.is_floating_point()}
    named = dict(copied.named_parameters()) | buffers
    left = [tensor.nbytes for name, tensor in named.items() if name not in quantized.tensors]
    bits = 8 * (sum(tensor.nbytes for tensor in packed.values()) + sum(left))
    return bits / _counted(net)


def _counted(net: nn.Module) -> int:
    """Parameters, those in several places once, parametrized ones as they are used."""
    sizes: dict[int, int] = {}
    for name, module in net.named_modules():
        if "parametrizations" in name:
            continue
        used = [getattr(module, own).numel() for own in getattr(module, "parametrizations", ())]
        sizes[id(module)] = sum(used)
        sizes |= {id(p): p.numel() for p in module.parameters(recurse=False)}
    return sum(sizes.values())


def faults(drawn: Drawn) -> list[str]:
    """What a search of a drawn network says or does wrongly; nothing where all is right.

    The search is a short one: few budgets and moves, and scales are not fitted.
    """
    as_they_are: Any = {"adjust_scales": lambda _, row: row}
    with (
        mock.patch.multiple(exploration, SWEEP=4, MOVES=4, FINER=(0.9,)),
        mock.patch.multiple(refinement, SEQUENTIAL_COSTS=(1.0,), COSTLIER=(1.1,), **as_they_are),
    ):
        return _faults(drawn)


def _faults(drawn: Drawn) -> list[str]:
    net, batches, found = drawn.make(), drawn.batches(), []
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        answer = find_strategy(
            net,
            batches,
            batches,
            nn.CrossEntropyLoss(),
            forward=forward,
            limit={"relative_error": 1e6},
            widths=[3],
            precision=0,
        )
    except ValueError as error:
        # few examples that differ much: an error has no bound, and the search says so
        if "(at most inf)" in str(error):
            return found
        raise
    put = quantize_model(net, answer.quantized)
    ratio = plain_loss(put, batches) / plain_loss(copy.deepcopy(net), batches)
    claimed = float(answer.chosen["criterion_ratio"])
    if not math.isclose(ratio, claimed, rel_tol=1e-5):
        found.append(f"criterion ratio {claimed:.7g}, a plain loop's is {ratio:.7g}")
    bits = mean_bits(net, answer.quantized)
    if not math.isclose(bits, answer.mean_bits, rel_tol=1e-9):
        found.append(f"mean bits {answer.mean_bits:.6g} in the search, then {bits:.6g}")
    counted = recount(net, answer.quantized)
    if not math.isclose(counted, bits, rel_tol=1e-9):
        found.append(f"mean bits {bits:.6g}, {counted:.6g} by the packed bytes")
    after = net.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed or before.keys() != after.keys():
        found.append(f"the network is changed: {', '.join(changed)}")
    if not all(module.training for module in net.modules()):
        found.append("the network's mode is changed")
    F.cross_entropy(logits(net(batches[0][0].clone())), batches[0][1]).backward()
    if not any(p.grad is not None and bool(p.grad.any()) for p in net.parameters()):
        found.append("the network does not train")
    return found
