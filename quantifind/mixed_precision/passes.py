"""What a search costs, counted in passes over the validation examples, and what it may cost."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from quantifind.utils.console import in_words


class OutOfTime(Exception):
    """The deadline of a search has come."""


@dataclass(eq=False)
class Passes:
    """Passes through the network that a search has taken, by phase.

    One is all validation examples through all of the network; a part of the examples, or of the
    network, is that part of one. A pass forward and back counts as three.

    examples: of the validation data.
    effort: the most that the search may take; infinite for no bound.
    deadline: of `time.monotonic`, in seconds; None for none.
    by_phase, seconds: passes taken, and the time, in the order of the phases.
    left_out: for want of passes or time, in words.
    """

    examples: int
    effort: float = math.inf
    deadline: float | None = None
    by_phase: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    phase: str = "network"
    # of `time.monotonic`
    began: float = field(default_factory=time.monotonic)
    # of the effort, up to where the phases that are open may go
    ends: list[float] = field(default_factory=list)

    def add(self, examples: float) -> None:
        """Count so many examples, each through the whole network, in the present phase."""
        self.by_phase[self.phase] += examples / self.examples  # type: ignore[assignment]

    @property
    def taken(self) -> float:
        return float(sum(self.by_phase.values()))

    @property
    def left(self) -> float:
        """What the present phase may take yet; 0 where the time is up."""
        if self.out_of_time:
            return 0.0
        end = self.ends[-1] if self.ends else self.effort
        return max(end - self.taken, 0.0)

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def check_time(self) -> None:
        """Raise OutOfTime after the deadline."""
        if self.out_of_time:
            raise OutOfTime

    def stopped(self, what: str) -> None:
        """Note what is left out."""
        if what not in self.left_out:
            self.left_out.append(what)

    def standing(self) -> str:
        """In one line, while it goes on: phase, passes of those it may take, remaining time."""
        now = time.monotonic()
        text = f"{self.phase}: {self.taken:.1f}"
        text += f" of {self.effort:g} passes" if math.isfinite(self.effort) else " passes"
        if self.taken and math.isfinite(self.effort) and math.isfinite(sum(self.ends)):
            left = (now - self.began) / self.taken * max(self.effort - self.taken, 0.0)
            text += f", about {in_words(left)} more where it takes them all"
        if self.deadline is not None:
            text += f", at most {in_words(max(self.deadline - now, 0.0))} more"
        return text

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {taken:.1f}" for phase, taken in self.by_phase.items())
        out = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.taken:.1f} passes ({phases}){out}"

    @contextmanager
    def of(self, phase: str, share: float = 1.0) -> Iterator[None]:
        """Within it, passes count for a phase, which may take a share of what is left; an infinite
        one as many as it needs."""
        before, began = self.phase, time.monotonic()
        self.ends.append(self.taken + share * self.left)
        self.phase = phase
        try:
            yield
        finally:
            self.phase = before
            self.seconds[phase] += time.monotonic() - began  # type: ignore[assignment]
            self.ends.pop()
