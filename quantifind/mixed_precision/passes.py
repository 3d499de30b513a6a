"""What a search costs, counted in passes over the validation examples, and what it may cost."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Passes:
    """Passes through the network that a search has taken, by phase.

    One is all validation examples through all of the network; a part of the examples, or of the
    network, is that part of one. A pass forward and back counts as three.

    examples: of the validation data.
    effort: the most that the search may take; infinite for no bound.
    deadline: of `time.monotonic`, in seconds; None for none.
    by_phase: passes taken, in the order of the phases.
    left_out: for want of passes or time, in words.
    """

    examples: int
    effort: float = math.inf
    deadline: float | None = None
    by_phase: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    phase: str = "network"
    # of the effort, up to where the phases that are open may go
    ends: list[float] = field(default_factory=list)

    def add(self, examples: float) -> None:
        """Count so many examples, each through the whole network, in the present phase."""
        before = self.by_phase.get(self.phase, 0.0)
        self.by_phase[self.phase] = before + examples / self.examples

    @property
    def taken(self) -> float:
        return sum(self.by_phase.values())

    @property
    def left(self) -> float:
        """What the present phase may take yet; 0 where the time is up."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            return 0.0
        end = self.ends[-1] if self.ends else self.effort
        return max(end - self.taken, 0.0)

    def stopped(self, what: str) -> None:
        """Note what is left out."""
        if what not in self.left_out:
            self.left_out.append(what)

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {taken:.1f}" for phase, taken in self.by_phase.items())
        out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.taken:.1f} passes ({phases}){out}"

    @contextmanager
    def of(self, phase: str, share: float = 1.0) -> Iterator[None]:
        """Within it, passes count for a phase, which may take a share of what is left; an infinite
        one as many as it needs."""
        before = self.phase
        self.ends.append(self.taken + share * self.left)
        self.phase = phase
        try:
            yield
        finally:
            self.phase = before
            self.ends.pop()
