"""Looks at a test split are counted, each once, whatever happens to the file."""

import json
import multiprocessing
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from quantifind.certification.ledger import FORMAT, Look, level_of, look

NAMES = st.text("abc", min_size=1, max_size=2)


@settings(max_examples=30)
@given(looks=st.lists(st.tuples(NAMES, NAMES), max_size=12))
def test_the_kth_ladder_of_a_split_has_its_level(tmp_path_factory, looks):
    """The same pair again has the k that it had; a split's looks are no other's."""
    path, seen = tmp_path_factory.mktemp("ledger") / "deep" / "looks.json", {}
    for split, ladder in looks:
        ladders = seen.setdefault(split, [])
        if ladder not in ladders:
            ladders.append(ladder)
        k = ladders.index(ladder) + 1
        found = look(path, split, ladder)
        assert found == Look(k, pytest.approx(0.05 / (k * (k + 1))))
        assert found.confidence == 1 - found.level
    assert not looks or [file.name for file in path.parent.iterdir()] == ["looks.json"]


@given(looks=st.integers(1, 200), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_levels_add_up_to_that_of_one_test(looks, confidence):
    total = sum(level_of(k, confidence=confidence) for k in range(1, looks + 1))
    assert total == pytest.approx((1 - confidence) * float(1 - Fraction(1, looks + 1)))


TESTED = st.lists(st.sampled_from([1e-9, 0.5, 0.51, 3.0, 0.0, -2.0]), max_size=2)


@settings(max_examples=60)
@given(looks=st.lists(st.tuples(NAMES, TESTED, st.floats(-1e-5, 1e-5)), max_size=8))
def test_another_test_is_another_look_whatever_the_last_digits_are(tmp_path_factory, looks):
    """Of the same ladder, too; and one without numbers is of the first that has some."""
    path, seen = tmp_path_factory.mktemp("ledger") / "looks.json", []
    for ladder, tested, off in looks:
        alike = [i for i, one in enumerate(seen) if one in ((ladder, tested), (ladder, []))]
        known = min(alike, default=len(seen))
        if tested or known == len(seen):
            seen[known : known + 1] = [(ladder, tested)]
        found = look(path, "split", ladder, tested=[number * (1 + off) for number in tested])
        assert found.k == known + 1


def test_the_same_look_again_writes_nothing(tmp_path):
    path = tmp_path / "looks.json"
    look(path, "split", "ladder")
    path.chmod(0o444)
    before = path.stat()
    assert look(path, "split", "ladder").k == 1
    assert path.stat() == before


WHOLE = {"format": FORMAT, "splits": {"split": ["one", "two"]}}
DAMAGED = {
    "empty": ("", "damaged"),
    "half": (json.dumps(WHOLE)[:-20], "damaged"),
    "no text": (b"\xff\xfe\x00", "damaged"),
    "list": ("[]", "format"),
    "other format": (json.dumps(WHOLE | {"format": "quantifind looks 2"}), "looks 2"),
    "no format": (json.dumps({"splits": {}}), "not None"),
    "no splits": (json.dumps({"format": FORMAT}), "by split"),
    "twice": (json.dumps(WHOLE | {"splits": {"split": ["one", "one"]}}), "by split"),
    "no numbers": (json.dumps(WHOLE | {"splits": {"split": ["ladder: a 1"]}}), "float: 'a'"),
    "numbers": (json.dumps(WHOLE | {"splits": {"split": [1]}}), "by split"),
    "a number": (json.dumps(WHOLE | {"splits": {"split": 3}}), "by split"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_ledger_is_said_and_left(case, tmp_path):
    text, message = DAMAGED[case]
    path = tmp_path / "looks.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        look(path, "split", "ladder")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "version control" in str(caught.value) or case == "no numbers"
    assert path.read_bytes() == before


def test_a_look_without_numbers_is_of_the_first_that_has_some(tmp_path):
    """As those that earlier versions have counted."""
    path = tmp_path / "looks.json"
    path.write_text(json.dumps(WHOLE))
    tests = [("two", 0.5, 2), ("two", 0.6, 3), ("two", 0.5, 2), ("one", 0.7, 1), ("one", 0.5, 4)]
    for ladder, loss, k in tests:
        assert look(path, "split", ladder, tested=[loss, 0.0]).k == k


def test_a_look_stands_in_a_ledger_once(tmp_path):
    """Also where a merge has left it with numbers and without."""
    path = tmp_path / "looks.json"
    path.write_text(json.dumps(WHOLE | {"splits": {"split": ["one", "one: 0.5 0"]}}))
    assert [look(path, "split", "one", tested=[0.5, 0.0]).k for _ in range(3)] == [2, 2, 2]


def many(path, first):
    for number in range(first, first + 20):
        look(path, "split", f"ladder {number}")


def test_processes_that_look_at_once_count_apart(tmp_path):
    path, spawn = tmp_path / "looks.json", multiprocessing.get_context("spawn")
    # the second half of each one's ladders is the first of the next
    workers = [spawn.Process(target=many, args=(path, first)) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    ladders = json.loads(path.read_text())["splits"]["split"]
    assert sorted(ladders) == sorted(f"ladder {number}" for number in range(40))


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "looks.json").mkdir()
    with pytest.raises(OSError, match="looks"):
        look(tmp_path / "looks.json", "split", "ladder")
