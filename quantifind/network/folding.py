"""Batch norm folded into the convolution or linear map before it (Jacob et al. 2018,
arXiv:1712.05877), where in eval mode this is exact."""

import copy
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantifind.network.memory import blocks
from quantifind.network.modules import is_plain, named_tensors, plain, plain_copy
from quantifind.tensor.parts import value_count
from quantifind.utils.devices import device_of
from quantifind.utils.naming import naming

Pairs = tuple[tuple[str, str], ...]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCTS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
STATISTICS = ("running_mean", "running_var")
# float types in which a folded weight is as exact as the two it is made of
EXACT = (torch.float32, torch.float64)
# of the largest output, between a folded pass and one that is not
TOLERANCE = 1e-3
# what a pass may ask of a product's result without its values
LOOKS = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point} | {
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")
}


class Folded(nn.Identity):
    """What stands where a norm was.

    removed: how many parameters fewer the network has: the norm's, less those of a bias that the
        product before it has since.
    """

    def __init__(self, removed: int) -> None:
        super().__init__()
        self.removed = removed


def prepared(model: nn.Module, folded: Pairs = ()) -> nn.Module:
    """A plain copy (`quantifind.network.modules.plain_copy`), with norms folded.

    folded: pairs of names (module, norm); those that ``model`` has folded already stay so.
    Raises: ValueError as `plain_copy`, and naming a pair that can't be folded.
    """
    replica = plain_copy(model)
    fold(replica, folded)
    return replica


def prepared_tensors(model: nn.Module, folded: Pairs = ()) -> nn.Module:
    """The network whose tensors are those of `prepared`: itself, where it is plain and has folded
    them all, since to copy it takes longer than to look at it."""
    model = plain(model)
    done = is_plain(model) and all(_is_folded(model, pair) for pair in folded)
    return model if done else prepared(model, folded)


def parameter_count(model: nn.Module) -> int:
    """Parameters of the network as it was given, before norms were folded: those that share memory
    once, parametrized ones as they are used."""
    removed = sum(m.removed for m in plain(model).modules() if isinstance(m, Folded))
    return removed + sum(map(value_count, named_tensors(model).values()))


def checked_pairs(given: Any) -> Pairs:
    """Pairs of names from plain values, such as lists.

    Raises: ValueError for anything else.
    """
    pairs = []
    for pair in given if isinstance(given, Iterable) else [given]:
        names = tuple(pair) if isinstance(pair, list | tuple) else ()
        if len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise ValueError(f"folded has {pair!r}: pairs of names (module, norm) are needed")
        pairs.append(names)
    return tuple(pairs)


def fold(model: nn.Module, pairs: Pairs) -> None:
    """Fold norms, in place: weights and biases are multiplied, in float64, by what the norm does in
    eval mode; a module without a bias gets one; and `Folded` stands for the norm.

    pairs: of names (module, norm); what is folded already stays.
    Raises: ValueError naming a module that is not there, or of another kind.
    """
    for name, norm_name in pairs:
        if _is_folded(model, (name, norm_name)):
            continue
        with naming(f"folded {name}, {norm_name}"):
            product, norm = _module(model, name), _module(model, norm_name)
            _check_pair(product, norm)
            added = 0 if product.bias is not None else norm.num_features
            removed = sum(parameter.numel() for parameter in norm.parameters()) - added
            _fold(product, norm)
            stand_in = Folded(removed)
            stand_in.training = norm.training
            where, _, own = norm_name.rpartition(".")
            model.get_submodule(where)._modules[own] = stand_in


def _is_folded(model: nn.Module, pair: tuple[str, str]) -> bool:
    with naming(f"folded {', '.join(pair)}"):
        _, norm = (_module(model, name) for name in pair)
    return isinstance(norm, Folded)


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the network has no module {name}") from error


def _check_pair(product: Any, norm: Any) -> None:
    if not isinstance(product, PRODUCTS):
        kinds = "a convolution or linear map"
        raise ValueError(f"the first is a {type(product).__name__}: {kinds} is needed")
    if not isinstance(norm, NORMS) or norm.running_mean is None:
        raise ValueError(
            f"the second is a {type(norm).__name__}: a BatchNorm with running statistics is needed"
        )
    if norm.num_features != outputs(product):
        raise ValueError(f"{outputs(product)} outputs beside {norm.num_features} channels")


def outputs(product: Any) -> int:
    """Channels, or features, that a module of `PRODUCTS` gives."""
    return product.out_features if isinstance(product, nn.Linear) else product.out_channels


@torch.no_grad()
def _fold(product: Any, norm: Any) -> None:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    weight = product.weight
    if isinstance(product, TRANSPOSED):
        # (inputs, outputs of a group, kernel …)
        per_group = weight.double().unflatten(0, (product.groups, -1))
        scales = scale.reshape(product.groups, 1, -1, *(1,) * (weight.dim() - 2))
        weight.copy_((per_group * scales).flatten(0, 1))
    else:
        weight.copy_(weight.double() * scale.reshape(-1, *(1,) * (weight.dim() - 1)))
    if product.bias is None:
        product.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    else:
        product.bias.copy_(product.bias.double() * scale + shift)


@torch.no_grad()
def foldable(model: nn.Module, run_one_pass: Callable[[nn.Module], Any]) -> Pairs:
    """The pairs of names (module, norm) that can be folded exactly, in the order of a pass.

    In eval mode, the module's result goes into the norm and nowhere else, and their tensors are
    used there alone; where there is any doubt, a norm stays. A folded copy gives the same outputs.

    run_one_pass: passes a batch through a network, and returns what tells its outputs.
    """
    work = plain_copy(model).eval()
    watch = _Watch(work)
    try:
        with _seeded(work):
            before = watch.run(run_one_pass)
        pairs = watch.pairs(before)
        if pairs:
            fold(work, pairs)
            with _seeded(work):
                after = run_one_pass(work)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # whatever fails here, such as a forward that looks at its norm, fails no plain pass:
        # test_what_is_in_doubt_stays
        return ()
    return pairs if pairs and _alike(before, after) else ()


@contextmanager
def _seeded(model: nn.Module) -> Iterator[None]:
    """Within it, what draws at random draws the same."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _alike(before: Any, after: Any) -> bool:
    ours, theirs = (
        [x.double() for x in tree_leaves(made) if isinstance(x, Tensor) and x.is_floating_point()]
        for made in (before, after)
    )
    return len(ours) == len(theirs) and all(
        a.shape == b.shape
        and torch.allclose(a, b, 0, TOLERANCE * float(a.nan_to_num(0, 0, 0).abs().max()), True)
        for a, b in zip(ours, theirs, strict=True)
        if a.numel()
    )


class _Watch(TorchFunctionMode):
    """What becomes of the results of convolutions and linear maps in a pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.products, self.norms = _candidates(model)
        # by id of a candidate's tensor, which function takes it, each time
        self.uses: defaultdict[int, list[Any]] = defaultdict(list)
        # by id, of those results that are still there: whose it is
        self.results: dict[int, tuple[weakref.ref, str]] = {}
        self.calls: Counter[str] = Counter()
        self.taken: defaultdict[str, list[Any]] = defaultdict(list)
        self.met: list[tuple[str, str]] = []
        self.inside = 0

    def run(self, run_one_pass: Callable[[nn.Module], Any]) -> Any:
        """What it returns for the model, which is watched."""
        handles = [
            *(m.register_forward_hook(partial(self._made, n)) for n, m in self.products.items()),
            *(m.register_forward_pre_hook(partial(self._meets, n)) for n, m in self.norms.items()),
        ]
        try:
            # functions of TorchScript are seen by what they dispatch alone
            with self, _Dispatched(self):
                return run_one_pass(self.model)
        finally:
            for handle in handles:
                handle.remove()

    def _made(self, name: str, module: Any, _: Any, result: Any) -> None:
        self.calls[name] += 1
        if isinstance(result, Tensor) and result.dim() == module.weight.dim():
            self.results[id(result)] = weakref.ref(result), name

    def _meets(self, name: str, norm: nn.Module, args: Any) -> None:
        self.calls[name] += 1
        product = self.owner(args[0]) if len(args) == 1 else None
        if product is not None and args[0].dtype == norm.running_mean.dtype and not norm.training:
            self.met.append((product, name))

    def owner(self, tensor: Any) -> str | None:
        """Whose result a tensor is, or None."""
        found = self.results.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in LOOKS:
            return func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.uses[id(leaf)].append(func)
                if (name := self.owner(leaf)) is not None:
                    self.taken[name].append(func)
        self.inside += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside -= 1

    def pairs(self, made: Any) -> Pairs:
        """Those whose result only the norm took.

        made: what the pass returned; a result in it is still there, as one that is kept elsewhere.
        """
        kept = {name for ref, name in self.results.values() if ref() is not None}
        return tuple(
            (name, norm)
            for name, norm in self.met
            if name not in kept
            and self.calls[name] == self.calls[norm] == 1
            and self.taken[name] == [F.batch_norm]
            and all(len(self.uses[id(t)]) == 1 for t in _tensors(self.products[name]))
            and all(self.uses[id(t)] == [F.batch_norm] for t in _tensors(self.norms[norm]))
            and outputs(self.products[name]) == self.norms[norm].num_features
            and _is_exact(self.products[name], self.norms[norm])
        )


class _Dispatched(TorchDispatchMode):
    """Notes, for a watch, results that are taken by what is no function of torch's."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.watch.inside:
            for leaf in tree_leaves((args, kwargs)):
                if (name := self.watch.owner(leaf)) is not None:
                    self.watch.taken[name].append(func)
        return func(*args, **(kwargs or {}))


def _candidates(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Products and norms by name, that are what torch has them, and share nothing."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    parameters = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
    every = parameters | dict(model.named_buffers(remove_duplicate=False))
    tensors = Counter(map(id, every.values()))
    apart = {id(every[block[0]]) for block in blocks(every) if len(block) == 1}

    def able(module: nn.Module) -> bool:
        own = _tensors(module)
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        alone = names[id(module)] == 1 and all(tensors[id(t)] == 1 and id(t) in apart for t in own)
        types = {tensor.dtype for tensor in own}
        return alone and not hooked and len(types) == 1 and types <= set(EXACT)

    named = dict(model.named_modules())
    products = {n: m for n, m in named.items() if type(m) in PRODUCTS and able(m)}
    norms = {n: m for n, m in named.items() if type(m) in NORMS and m.running_mean is not None}
    return products, {n: m for n, m in norms.items() if able(m)}


def _tensors(module: Any) -> list[Tensor]:
    """Those that a product or a norm computes with."""
    given = (module.weight, module.bias, *(getattr(module, n, None) for n in STATISTICS))
    return [tensor for tensor in given if tensor is not None]


def _is_exact(product: Any, norm: Any) -> bool:
    """Whether the folded tensors are of the same type, and finite."""
    product = copy.deepcopy(product)
    if product.weight.dtype != norm.running_mean.dtype:
        return False
    _fold(product, norm)
    return bool(product.weight.isfinite().all() and product.bias.isfinite().all())
