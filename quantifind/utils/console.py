"""The console, on standard error, and progress bars on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar of ``total`` steps, quiet but on a terminal and in a notebook.

    Yields a function to call after each step, with text to show beside the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    quiet = not (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda note="", steps=1: bar.update(task, advance=steps, note=note)
