"""What every writer has in common: a file is whole or not there."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import nn

from quantifind import export, save, uniform_strategy
from quantifind.certification import ledger
from quantifind.storage import checkpoints
from quantifind.storage.store import Store
from quantifind.utils.whole_files import written_whole
from stages import files

ROOM = 1000  # bytes that a file may have where the disk is full


def saved(path: Path, size: int) -> None:
    net = nn.Linear(size, 2)
    save(net, uniform_strategy(net, 4), path)


def exported(path: Path, size: int) -> None:
    net = nn.Linear(size, 2)
    export(net, uniform_strategy(net, 4), path, torch.ones(1, size))


def checkpoint(path: Path, size: int) -> None:
    checkpoints.save_checkpoint(path.parent, {"values": torch.ones(size)})


def drawn(path: Path, size: int) -> None:
    figure = plt.figure(figsize=(1, 1))
    figure.figimage(torch.rand(min(size, 99), 99).numpy())
    files.write_figure(path, figure)
    plt.close(figure)


WRITERS = {
    "net.safetensors": saved,
    "net.pt2": exported,
    "checkpoint-0001.pt": checkpoint,
    "looks.json": lambda path, size: ledger.look(path, "split", "l" * size),
    "entry": lambda path, size: Store(path.parent).put("key", {"values": torch.ones(size)}),
    "values.json": lambda path, size: files.write_json(path, [0] * size),
    "words.md": lambda path, size: files.write_text(path, "w" * size),
    "table.csv": lambda path, size: files.write_table(path, pd.DataFrame({"x": range(size)})),
    "data.safetensors": lambda path, size: files.write_tensors(path, {"x": torch.ones(size)}),
    "state.pt": lambda path, size: files.write(path, lambda p: torch.save(torch.ones(size), p)),
    "figure.png": drawn,
}


@contextmanager
def full_disk(room):
    """Files take no more than so many bytes: what the system says of it is an error of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path, name):
    write = WRITERS[name]
    write(tmp_path / name, 1)
    before = contents(tmp_path)
    with full_disk(ROOM), pytest.raises(ValueError, match="can't be written") as found:
        write(tmp_path / name, 2**14)
    assert "\n" not in str(found.value)
    assert str(tmp_path) in str(found.value)
    assert contents(tmp_path) == before
    write(tmp_path / name, 2**14)
    assert contents(tmp_path) != before


def fails_within(path, error):
    with written_whole(path) as partial:
        partial.write_text("half")
        raise error


def test_whatever_fails_leaves_no_part(tmp_path):
    path = tmp_path / "file"
    for error in (KeyboardInterrupt, KeyError):
        with pytest.raises(error):
            fails_within(path, error)
        assert not contents(tmp_path)


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=rf"{name}: can't be written \(not a file\)"):
            saved(tmp_path / name, 1)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    real, link, dangling = tmp_path / "there/real", tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "there/none")
    real.write_text("old")
    for path in (link, dangling):
        with written_whole(path) as partial:
            partial.write_text("new")
        assert path.is_symlink()
        assert path.read_text() == "new"
    assert contents(tmp_path / "there") == {"real": b"new", "none": b"new"}


def test_names_are_as_long_as_the_system_takes(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        with written_whole(tmp_path / name) as partial:
            partial.write_text("new")
        assert (tmp_path / name).read_text() == "new"
    with pytest.raises(ValueError, match="can't be written"), written_whole(tmp_path / "a\0b"):
        pass


def test_a_new_file_has_the_mode_of_any(tmp_path):
    (tmp_path / "other").write_text("")
    with written_whole(tmp_path / "file") as partial:
        partial.write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_writes_at_the_same_time_are_whole(tmp_path):
    """One within another, and of many threads: the last to end has the name."""
    path = tmp_path / "file"
    with written_whole(path) as first, first.open("w") as file:
        file.write("first")
        with written_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"

    def write(number):
        for _ in range(20):
            with written_whole(path) as partial:
                partial.write_text(str(number) * (1 + number))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert path.read_text() in [str(number) * (1 + number) for number in range(4)]
    assert list(tmp_path.iterdir()) == [path]
