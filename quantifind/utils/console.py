"""The console, on standard error, and what it shows while something long goes on."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# a line stays one in a log: test_a_line_in_a_log_is_one
console = Console(stderr=True, soft_wrap=True)
# seconds between two updates of a display, and between two plain lines
QUICK, SLOW = 0.2, 15.0


class Board:
    """One display: a line that says how things stand, and the bars of what is going on.

    On a terminal and in a notebook it stays in its place; elsewhere, such as in a log, it is a
    plain line now and then.

    status: gives the line; it is called where the work is done, by no other thread.
    """

    def __init__(self, status: Callable[[], str]) -> None:
        self.status, self.bars = status, _bars(auto_refresh=False)
        # no thread draws: what the line says changes where the work is done
        live = Live(console=console, auto_refresh=False, transient=True)
        self.live = live if _stays() else None
        self.last = time.monotonic()

    def update(self, *, now: bool = False) -> None:
        """Show how things stand, if that was not done a moment ago.

        now: or whenever.
        """
        since = time.monotonic() - self.last
        if self.live is not None:
            if now or since > QUICK:
                self.live.update(Group(Text(self.status()), self.bars), refresh=True)
                self.last += since
        elif since > SLOW:
            console.print(self.status(), markup=False, highlight=False)
            self.last += since


_boards: list[Board] = []


@contextmanager
def board(status: Callable[[], str]) -> Iterator[None]:
    """Within it, bars stand on one display; one within another is part of that.

    status: as `Board` takes it.
    """
    if _boards:
        yield
        return
    one = Board(status)
    _boards.append(one)
    try:
        if one.live is not None:
            with one.live:
                yield
        else:
            yield
    finally:
        _boards.remove(one)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar of ``total`` steps, quiet but on a terminal and in a notebook with widgets.

    Yields a function to call after each step, with text to show beside the bar.
    """
    if _boards:
        one = _boards[-1]
        task = one.bars.add_task(description, total=total, note="")
        one.update(now=True)

        def step(note: str = "", steps: int = 1) -> None:
            one.bars.update(task, advance=steps, note=note)
            one.update()

        try:
            yield step
        finally:
            one.bars.remove_task(task)
        return
    with _bars(disable=not _stays()) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda note="", steps=1: bar.update(task, advance=steps, note=note)


def _stays() -> bool:
    """Whether a display can stay in its place; in a notebook that takes ipywidgets."""
    return console.is_terminal or (
        console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    )


def _bars(**how: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, **how)  # type: ignore[arg-type]


def in_words(seconds: float) -> str:
    """A time for people.

    seconds: from 0.

    >>> in_words(42.4), in_words(600), in_words(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
