"""What is shown while something long goes on: one display, or a plain line now and then."""

import io

import pytest
from rich.console import Console

from quantifind.utils import console


@pytest.fixture(params=[True, False], ids=["terminal", "piped"])
def shown(request, monkeypatch):
    """A console on a text, and whether it is a terminal."""
    text = io.StringIO()
    one = Console(file=text, force_terminal=request.param, width=200, legacy_windows=False)
    monkeypatch.setattr(console, "console", one)
    monkeypatch.setattr(console, "QUICK", 0)
    return text, request.param


def test_a_board_has_the_bars_and_how_things_stand(shown):
    text, terminal = shown
    done = []
    with (
        console.board(lambda: f"measured {len(done)} of 3"),
        console.progress("outer", total=1),
        console.board(lambda: "never"),
        console.progress("inner", total=3) as step,
    ):
        for number in range(3):
            done.append(number)
            step(f"note {number}")
    said = text.getvalue()
    assert "never" not in said
    if terminal:
        assert "measured 3 of 3" in said
        assert "outer" in said
        assert "note 1" in said
    else:
        assert said == ""


def test_a_log_has_a_plain_line_now_and_then(shown, monkeypatch):
    text, terminal = shown
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.board(lambda: f"at {now[0]:g} s"), console.progress("x", total=9) as step:
        for _ in range(9):
            now[0] += 6
            step()
    if not terminal:
        assert text.getvalue() == "at 18 s\nat 36 s\nat 54 s\n"


def test_a_line_in_a_log_is_one():
    text = io.StringIO()
    one = Console(file=text, width=20, soft_wrap=console.console.soft_wrap)
    one.print("word " * 40)
    assert text.getvalue().count("\n") == 1


def test_a_board_ends_with_its_block(shown):
    with pytest.raises(KeyboardInterrupt), console.board(lambda: "here"):
        raise KeyboardInterrupt
    assert console._boards == []
    before = len(shown[0].getvalue())
    with console.progress("after", total=1) as step:
        step()
    assert (len(shown[0].getvalue()) > before) == shown[1]
