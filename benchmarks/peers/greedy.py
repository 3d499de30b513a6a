"""A greedy descent over the widths of layers, for peers that have no search of their own."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from benchmarks.peers.exchange import Candidate, OnGrid, Question, mean_loss

BATCHES = 16  # of the validation examples, 2,048 images
RUINED = 1.3  # no limit allows a criterion ratio above this


def uniform(ladders: Mapping[str, Sequence[OnGrid]], name: str) -> Iterator[Candidate]:
    """Every weight on its first step, on its second, and so on."""
    for step in zip(*ladders.values(), strict=True):
        yield Candidate(f"{name} {step[0].bits:.3g} bits", dict(zip(ladders, step, strict=True)))


def descend(
    question: Question, ladders: Mapping[str, Sequence[OnGrid]], name: str
) -> Iterator[Candidate]:
    """From every weight on its first step, one weight a step down at a time: the one that adds
    least validation loss per bit saved. Each place on the way is a candidate.

    ladders: for each weight its choices, each of fewer bits than the one before.
    """
    network, batches = question.network, question.validation[:BATCHES]
    limit = RUINED * mean_loss(network, batches)
    parameters = dict(network.named_parameters())

    def put(weight: str, choice: OnGrid) -> None:
        with torch.no_grad():
            parameters[weight].copy_(choice.values)

    original = {weight: parameters[weight].detach().clone() for weight in ladders}
    at = dict.fromkeys(ladders, 0)
    for weight in ladders:
        put(weight, ladders[weight][0])
    loss = mean_loss(network, batches)
    while loss <= limit:
        place = {weight: ladders[weight][step] for weight, step in at.items()}
        widths = ", ".join(f"{choice.bits:.3g}" for choice in place.values())
        bits = sum(choice.total_bits for choice in place.values())
        yield Candidate(f"{name} greedy {widths} ({bits:.0f} bits in all)", place)
        steps = []
        for weight, choice in place.items():
            if at[weight] + 1 < len(ladders[weight]):
                lower = ladders[weight][at[weight] + 1]
                put(weight, lower)
                after = mean_loss(network, batches)
                put(weight, choice)
                saved = choice.total_bits - lower.total_bits
                steps.append(((after - loss) / saved, after, weight))
        if not steps:
            break
        _, loss, weight = min(steps)
        at[weight] += 1
        put(weight, ladders[weight][at[weight]])
    for weight, values in original.items():
        with torch.no_grad():
            parameters[weight].copy_(values)
