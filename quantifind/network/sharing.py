"""Which of a network's tensors have to be kept, and which lie in memory of theirs."""

from torch import Tensor, nn

from quantifind.network.memory import has_memory, own_bytes, place_of, span
from quantifind.network.modules import stored_tensors


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """By every name that a parameter or a buffer has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def stored_and_shared(
    model: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """The tensors of a plain network that have to be stored; and of the others, which lie in memory
    of these, by name the name of the one that has it: of those that are the same as it, and of
    those that are a part of it."""
    stored = stored_tensors(model, counters=True)
    sizes = own_bytes(stored)
    stored = {name: t for name, t in stored.items() if sizes[name] or not has_memory(t)}
    same, views = {}, {}
    for name, tensor in all_tensors(model).items():
        if name in stored or not has_memory(tensor):
            continue
        for owner, whole in stored.items():
            if whole is tensor or (has_memory(whole) and place_of(whole) == place_of(tensor)):
                same[name] = owner
                break
            if has_memory(whole) and _is_within(span(tensor), span(whole)):
                views[name] = owner
                break
    return stored, same, views


def _is_within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
