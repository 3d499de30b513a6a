"""Which second moments a weight needs: of what it meets as matrices, in blocks where they would
take more memory than there is, and which weights can have theirs in the same passes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantifind.network.trace import ProductFacts, together, weight_uses
from quantifind.tensor.matrices import Matrices
from quantifind.utils.naming import naming

# inputs of a block, and of a matrix that has no more than so many times its outputs in any case:
# factors of larger ones take longer than the rounding itself
BLOCK, TALL = 4_608, 4
# fewer inputs together make up for little
LEAST = 16
# positions that tell enough, in all and for each input; more of few inputs, which cost little
POSITIONS, POSITIONS_PER_INPUT, VALUES = 2**16, 16, 2**25
# but of so many examples at least, since positions of one are alike
EXAMPLES = 512
# bytes of a number in a moment matrix
NUMBER = 8


@dataclass(frozen=True)
class Part:
    """A weight as the matrices that some products have it as.

    matrices: of all groups.
    meets: the same of parts that meet the same inputs.
    share: of the positions that are taken.
    enough: of the examples, as many as have the positions that tell enough.
    blocks: the matrices, or parts of them with fewer inputs; none where there is no memory for any.
    looked_up, met: whether it is an embedding's, and whether it meets inputs.
    """

    weight: str
    matrices: Matrices
    meets: int
    share: float
    enough: float
    blocks: tuple[Matrices, ...]
    looked_up: bool
    met: bool

    @property
    def whole(self) -> bool:
        return self.blocks == (self.matrices,)

    @property
    def counts(self) -> tuple[int, ...]:
        """Of inputs of each block."""
        return tuple(block.shape[2] for block in self.blocks)

    @property
    def bytes(self) -> int:
        """Of its inputs' moments."""
        groups, _, _ = self.matrices.shape
        return NUMBER * groups * sum(n**2 for n in self.counts) if self.met else 0


def parts_of(name: str, facts: Sequence[ProductFacts], max_memory: float) -> list[Part]:
    """Those of a weight, in the order of a pass.

    facts: of the network (`quantifind.network.trace.trace`).
    max_memory: bytes that the moments of inputs may take.
    Raises: ValueError for a use in which the weight is no matrix, and for uses of the same elements
        as other matrices.
    """
    used = [product for product in facts if product.weight == name]
    for product in used:
        if product.matrices is None:
            raise ValueError(
                f"rounding 'gptq': it is no matrix in a {product.kind.replace('_', ' ')} that "
                "a pass uses it in; round it to 'nearest'"
            )
    if not together([product.matrices for product in used], used[0].count):
        raise ValueError(
            "rounding 'gptq': a pass uses it whole and in parts, or its rows and its columns; "
            "round it to 'nearest'"
        )
    by_matrices: dict[Matrices, list[ProductFacts]] = {}
    for product in used:
        if product.matrices is not None:
            by_matrices.setdefault(product.matrices, []).append(product)
    inputs = {p.meets for p in used if p.kind != "embedding"}
    limit = max_memory / max(len(inputs), 1)
    return [_part(name, m, products, limit) for m, products in by_matrices.items()]


def _part(name: str, matrices: Matrices, used: Sequence[ProductFacts], limit: float) -> Part:
    groups, outputs, inputs = matrices.shape
    met = [product for product in used if product.kind != "embedding"]
    most = max(BLOCK, TALL * outputs)
    if met and (inputs > most or NUMBER * groups * inputs**2 > limit):
        most = min(BLOCK, int(limit // (NUMBER * groups * inputs)))
    enough, uses = max(POSITIONS, POSITIONS_PER_INPUT * inputs), [p.uses for p in used]
    positions = max(1, *(p.positions for p in used))
    return Part(
        name,
        matrices,
        met[0].meets if met else -1,
        min(1.0, max(enough, VALUES // inputs) / positions),
        # of what some batches alone use, all (test_what_few_batches_use_is_seen)
        min(1.0, enough / positions) if met == used and all(map(all, uses)) else 1.0,
        tuple(matrices.blocks(most)) if most >= min(LEAST, inputs) else (),
        looked_up=len(met) < len(used),
        met=bool(met),
    )


def all_parts(
    names: Sequence[str], facts: Sequence[ProductFacts], max_memory: float
) -> dict[str, list[Part]]:
    """By weight, as `parts_of` has them, in the order of a pass.

    Raises: ValueError as `parts_of`, naming the weight.
    """
    found = {}
    for name in weight_uses(facts):
        if name in names:
            with naming(name):
                found[name] = parts_of(name, facts, max_memory)
    return found


def note(parts: Sequence[Part]) -> str | None:
    """What is done less well than it could be for want of memory, in words; None where nothing."""
    worst = [part for part in parts if not part.whole]
    if not worst:
        return None
    part = max(worst, key=lambda part: part.matrices.shape[2])
    count = part.matrices.shape[2]
    if not all(part.blocks for part in parts):
        return f"rounded to nearest: no memory for the moments of its {count:,} inputs"
    largest = max(block.shape[2] for block in part.blocks)
    return f"rounded by GPTQ in blocks of {largest:,} of its {count:,} inputs"


def enough(parts: Mapping[str, Sequence[Part]], examples: Sequence[int]) -> list[int]:
    """Of batches of so many examples those that tell enough of some weights: one drawn of each of
    as many equal stretches, always the same."""
    share = max((part.enough for own in parts.values() for part in own), default=0.0)
    share = max(share, EXAMPLES / max(sum(examples), 1))
    count = math.ceil(min(share, 1.0) * len(examples))
    drawn = np.random.default_rng(0).random(count)
    return [int((i + drawn[i]) * len(examples) / count) for i in range(count)]


def passes(parts: Mapping[str, Sequence[Part]], max_memory: float) -> Iterator[list[str]]:
    """Weights whose moments are in memory at a time: those after each other as long as they fit."""
    some: list[str] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    total = 0
    for name, own in parts.items():
        new = {(part.meets, part.counts): part.bytes for part in own}
        more = sum(size for key, size in new.items() if key not in seen)
        if some and total + more > max_memory:
            yield some
            some, seen, total, more = [], set(), 0, sum(new.values())
        some.append(name)
        seen |= new.keys()
        total += more
    if some:
        yield some


def waves(names: Sequence[str], parts: Mapping[str, Sequence[Part]], most: int) -> list[list[str]]:
    """Weights in so many groups at most, one after another, those that meet the same in the same
    one; each weight alone where there are no more."""
    if len(names) <= most:
        return [[name] for name in names]
    clusters: list[list[str]] = []
    before: set[int] = set()
    for name in names:
        inputs = {part.meets for part in parts[name] if part.met}
        if clusters and inputs & before:
            clusters[-1].append(name)
        else:
            clusters.append([name])
            before = set()
        before |= inputs
    count = min(most, len(clusters))
    found: list[list[str]] = [[] for _ in range(count)]
    for index, cluster in enumerate(clusters):
        found[index * count // len(clusters)] += cluster
    return found
