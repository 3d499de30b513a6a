"""Which norms of a network can be folded: one pass is watched, and others, folded, are compared."""

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

from quantifind.network.folding import NORMS, PRODUCTS, Pairs, fold, fold_pair, outputs, prepared
from quantifind.network.memory import blocks
from quantifind.network.modules import plain_copy
from quantifind.utils.devices import device_of

STATISTICS = ("running_mean", "running_var")
# float types in which a folded weight is as exact as the two it is made of
EXACT = (torch.float32, torch.float64)
# of the largest output, between a folded pass and one that is not
TOLERANCE = 1e-3
# what a pass may ask of a product's result without its values
LOOKS = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point} | {
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")
}


@torch.no_grad()
def foldable(model: nn.Module, run_one_pass: Callable[[nn.Module], Any]) -> Pairs:
    """The pairs of names (module, norm) that can be folded exactly, in the order of a pass.

    In eval mode, the module's result goes into the norm and nowhere else, and their tensors are
    used there alone; where there is any doubt, a norm stays. A folded copy gives the same outputs.

    run_one_pass: passes a batch through a network; what it returns is compared, too.
    """
    work = plain_copy(model).eval()
    watch = _Watch(work)
    try:
        with _seeded(work):
            before = watch.run(partial(_outputs, run_one_pass))
        pairs = watch.pairs(before)
        if pairs:
            fold(work, pairs)
            after = _seeded_outputs(run_one_pass, work)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # whatever fails here, such as a forward that looks at its norm, fails no plain pass:
        # test_what_is_in_doubt_stays
        return ()
    return pairs if pairs and _alike(before, after) else ()


@torch.no_grad()
def exact(model: nn.Module, pairs: Pairs, passes: Iterable[Callable[[nn.Module], Any]]) -> Pairs:
    """The pairs that leave the outputs of other passes as they are, too: a norm that one batch goes
    through, another may leave out (test_a_norm_that_some_batches_leave_out_stays).

    passes: as ``run_one_pass`` of `foldable`.
    """
    work = plain_copy(model).eval()
    folded = prepared(work, pairs)
    for run_one_pass in passes:
        if not pairs:
            break
        try:
            wanted = _seeded_outputs(run_one_pass, work)
            if _alike(wanted, _seeded_outputs(run_one_pass, folded)):
                continue
            pairs = tuple(
                pair
                for pair in pairs
                if _alike(wanted, _seeded_outputs(run_one_pass, prepared(work, (pair,))))
            )
            folded = prepared(work, pairs)
            if not _alike(wanted, _seeded_outputs(run_one_pass, folded)):
                return ()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return ()  # as in `foldable`
    return pairs


def _seeded_outputs(run_one_pass: Callable[[nn.Module], Any], model: nn.Module) -> list[Any]:
    with _seeded(model):
        return _outputs(run_one_pass, model)


def _outputs(run_one_pass: Callable[[nn.Module], Any], model: nn.Module) -> list[Any]:
    """What a pass gives, and all that the network does, of which the pass may leave some out."""
    kept: list[Any] = []
    handle = model.register_forward_hook(lambda _, __, outputs: kept.append(outputs))
    try:
        return [run_one_pass(model), kept]
    finally:
        handle.remove()


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
    fold_pair(product, norm)
    return bool(product.weight.isfinite().all() and product.bias.isfinite().all())
