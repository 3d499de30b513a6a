"""Whoever does the work, the results are the same, and a lost worker takes none with it."""

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import cloudpickle
import distributed
import loky
import pandas as pd
import pytest
import torch

from quantifind.runtime import workers
from quantifind.runtime.workers import Workers
from quantifind.search import find_strategy
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths

ENGINES = ("sequential", "loky", "dask")
ELSEWHERE = ENGINES[1:]
# else a worker would import this file, and pytest with it
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def two_workers() -> distributed.LocalCluster:
    return distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    with two_workers() as cluster:
        yield cluster


@pytest.fixture
def cluster_to_kill() -> Iterator[distributed.LocalCluster]:
    """Of one test alone: a worker that is killed while it starts never comes back."""
    with two_workers() as cluster:
        yield cluster


@pytest.fixture
def how(request):
    """The arguments of each engine, by its name."""

    def arguments(engine, cluster="cluster"):
        if engine != "dask":
            return {"engine": engine}
        scheduler = request.getfixturevalue(cluster).scheduler_address
        return {"engine": engine, "scheduler": scheduler}

    return arguments


def slow_at_first(shared, item):
    time.sleep(0.2 / (item + 1))
    return shared * item


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_are_in_order(how, engine, count):
    with Workers(**how(engine)) as made:
        for factor in (2, 3):
            found = list(made.map(slow_at_first, factor, range(count)))
            assert found == [factor * item for item in range(count)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("threads",), "engine is 'threads': sequential, loky, dask are allowed"),
        (("dask",), "engine 'dask' with scheduler None: dask needs one"),
        (("loky", "tcp://127.0.0.1:1"), "engine 'loky' with scheduler 'tcp://127.0.0.1:1'"),
        (("sequential", "tcp://127.0.0.1:1"), "engine 'sequential' with scheduler 'tcp"),
    ],
)
def test_engines_that_there_are_not(arguments, message):
    engine, *scheduler = arguments
    with pytest.raises(ValueError, match=message):
        Workers(engine, scheduler=scheduler[0] if scheduler else None)


def free_address():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("address", [None, "nonsense", "tcp://127.0.0.1:port"])
def test_a_client_that_fails_leaves_no_thread(monkeypatch, address):
    """Of a scheduler that nobody answers for, which is named, within the patience."""
    assert workers.PATIENCE + 2 <= 10
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    before = [thread for thread in threading.enumerate() if thread.name == "IO loop"]
    address, started = address or free_address(), time.monotonic()
    with pytest.raises(ValueError, match=f"scheduler {address}: no Dask workers there"):
        Workers("dask", scheduler=address)
    assert time.monotonic() - started < workers.PATIENCE + 5
    assert [thread for thread in threading.enumerate() if thread.name == "IO loop"] == before


def test_a_scheduler_without_workers_is_named(monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1)
    with distributed.LocalCluster(
        n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as empty:
        address = empty.scheduler_address
        with pytest.raises(ValueError, match=f"scheduler {address}: no Dask workers there"):
            Workers("dask", scheduler=address)
        assert clients(empty) == []


def clients(cluster):
    return [name for name in cluster.scheduler.clients if name.startswith("Client-")]


def test_dask_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"needs Dask: pip install 'quantifind\[cluster\]'"):
        Workers("dask", scheduler="tcp://127.0.0.1:8786")


class Noted:
    """Notes each process that unpickles it in a folder; and how often each has used it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uses = folder, 0

    def __setstate__(self, state):
        self.__dict__ = state | {"uses": 0}
        (self.folder / uuid4().hex).write_text(str(os.getpid()))

    def receivers(self):
        return Counter(note.read_text() for note in self.folder.iterdir())


def use(noted, _):
    time.sleep(0.05)
    noted.uses += 1
    return os.getpid(), noted.uses


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_what_is_shared_reaches_each_worker_once(tmp_path, how, engine):
    """Whatever the workers make of it: each has one of its own."""
    with Workers(**how(engine), **({"jobs": 2} if engine == "loky" else {})) as made:
        for name in "ab":
            folder = tmp_path / name
            folder.mkdir()
            noted = Noted(folder)
            found = [*made.map(use, noted, range(8)), *made.map(use, noted, range(8))]
            pids = Counter(pid for pid, _ in found)
            assert len(pids) == 2
            assert noted.receivers() == Counter(map(str, pids))
            assert sorted(found) == [(p, n + 1) for p in sorted(pids) for n in range(pids[p])]
            assert noted.uses == 0


def dying(folder, task):
    """Kills its own process midway, as often as the task says."""
    item, deaths = task
    time.sleep(0.05)
    marks = [folder / f"{item} {number}" for number in range(deaths)]
    for mark in marks:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_a_killed_worker_loses_nothing(tmp_path, how, engine):
    """Nor do both at a time, or one task that kills two."""
    deaths = {0: 1, 1: 1, 4: 1, 7: 2}
    tasks = [(item, deaths.get(item, 0)) for item in range(8)]
    with Workers(**how(engine, "cluster_to_kill")) as made:
        assert list(made.map(dying, tmp_path, tasks)) == list(range(8))
        assert list(made.map(slow_at_first, 2, range(4))) == [0, 2, 4, 6]
    assert len(list(tmp_path.iterdir())) == sum(deaths.values())


def test_a_cluster_that_gives_a_task_up_is_asked_again(monkeypatch, tmp_path, cluster_to_kill, how):
    monkeypatch.setattr(cluster_to_kill.scheduler, "allowed_failures", 0)
    with Workers(**how("dask", "cluster_to_kill")) as made:
        assert list(made.map(dying, tmp_path, [(0, 1), (1, 0), (2, 0)])) == [0, 1, 2]


class Lost:
    """Kills the process that sends it away, the first time."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return (str, ("sent",))


def losing(mark, _):
    if mark.exists():
        raise OSError("failed the second time")
    return Lost(mark)


def test_a_result_that_is_lost_with_its_worker(tmp_path, how):
    """It is made again, and what happens then is told."""
    with (
        Workers(**how("dask", "cluster_to_kill")) as made,
        pytest.raises(OSError, match="failed the second time"),
    ):
        list(made.map(losing, tmp_path / "mark", [1, 2]))


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_a_task_that_no_worker_survives_ends_the_work(tmp_path, how, engine):
    with Workers(**how(engine, "cluster_to_kill")) as made:
        found = made.map(dying, tmp_path, [(0, 0), (1, 10**6), (2, 0)])
        with pytest.raises(RuntimeError, match="workers were lost 3 times, without a result"):
            list(found)


def joins(noted, task):
    if task is not None and not task.exists():
        task.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return use(noted, None)


def test_a_worker_that_joins_gets_what_was_sent(tmp_path, how):
    """Not what another worker, from which it has it, made of it."""
    (tmp_path / "notes").mkdir()
    with Workers(**how("dask", "cluster_to_kill")) as made:
        noted, found = Noted(tmp_path / "notes"), []
        deadline = time.monotonic() + 60

        def use_until(workers):
            while len({pid for pid, _ in found}) < workers and time.monotonic() < deadline:
                found.extend(made.map(joins, noted, [None] * 6))

        use_until(2)
        found.extend(made.map(joins, noted, [tmp_path / "dead", None]))
        use_until(3)
    uses = {pid: sorted(n for p, n in found if p == pid) for pid, _ in found}
    assert len(uses) == 3
    survivors = [n for n in uses.values() if n == list(range(1, len(n) + 1))]
    assert len(survivors) >= 2


class Refused(Exception):
    """Of no module that a worker could import."""


def refusing(shared, item):
    if item == 3:
        raise Refused(f"{item} of {shared}")
    return item


class Unreadable:
    def __reduce__(self):
        return (int, ("no number",))


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_errors_are_those_of_the_function(how, engine):
    with Workers(**how(engine)) as made:
        found = made.map(refusing, "all", range(8))
        assert [next(found) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(Refused, match="3 of all"):
            next(found)
        for shared, items in ((Unreadable(), [1, 2]), (1, [1, Unreadable()])):
            with pytest.raises(ValueError, match="no number"):
                list(made.map(slow_at_first, shared, items))
        assert list(made.map(slow_at_first, 1, range(3))) == [0, 1, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_work_may_be_left(how, engine):
    with Workers(**how(engine)) as made:
        found = made.map(slow_at_first, 1, range(20))
        assert next(found) == 0
        found.close()
        assert list(made.map(slow_at_first, 1, range(3))) == [0, 1, 2]


def test_nothing_is_left_of_processes():
    with Workers("loky", jobs=2) as made:
        pids = set(made.map(lambda *_: time.sleep(0.1) or os.getpid(), None, range(6)))
        folder = made.folder
        assert list(folder.iterdir())
        assert os.getpid() not in pids
    assert not folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_share_the_cores():
    """And import torch, which takes seconds, only for a task that needs it."""

    def told(*_):
        return os.environ["OMP_NUM_THREADS"], "torch" in sys.modules

    with Workers("loky", jobs=2 * loky.cpu_count()) as made:
        assert list(made.map(told, None, range(2))) == [("1", False)] * 2


def test_nothing_is_left_of_a_client(cluster, how):
    with Workers(**how("dask")) as made:
        list(made.map(slow_at_first, 1, range(3)))
        assert clients(cluster)
    deadline = time.monotonic() + 5
    while (clients(cluster) or cluster.scheduler.tasks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert clients(cluster) == []
    assert not cluster.scheduler.tasks


def test_large_tasks_are_sent_without_a_warning(how):
    with Workers(**how("dask")) as made:
        large = [bytes(11 * 2**20)] * 2
        assert list(made.map(lambda _, item: len(item), None, large)) == [11 * 2**20] * 2


def whose(_, seconds):
    time.sleep(seconds)
    return os.getpid()


def test_no_worker_waits_while_another_has_two_tasks(how):
    with Workers(**how("dask")) as made:
        for _ in range(12):
            assert len(set(made.map(whose, None, [0.05, 0.05]))) == 2
        # the second worker takes what the first has no time for
        tasks = Counter(made.map(whose, None, [0.5, *[0.01] * 9]))
        assert min(tasks.values()) <= 2


def test_a_worker_with_several_threads_takes_one_task_at_a_time():
    def span(_, __):
        started = time.monotonic()
        time.sleep(0.02)
        return started, time.monotonic()

    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=3, processes=False, dashboard_address="127.0.0.1:0"
        ) as threads,
        Workers("dask", scheduler=threads.scheduler_address) as made,
    ):
        spans = sorted(made.map(span, None, range(6)))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_a_search_finds_the_same(classifier, how, engine):
    net, criterion, (train, val, _) = classifier

    def found(**options):
        return find_strategy(
            net, train, val, criterion, limit=1.5, widths=[2, 4], learn=0, **options
        )

    one, other = found(), found(**how(engine))
    assert other.strategy == one.strategy
    for name, quantized in one.quantized.tensors.items():
        assert torch.equal(other.quantized.tensors[name].codes, quantized.codes)
    table, other_table = one.candidates, other.candidates
    columns = [name for name in table if name not in ("strategy", "quantized")]
    pd.testing.assert_frame_equal(other_table[columns], table[columns], check_exact=True)


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_bit_depths_are_judged_the_same(classifier, how, engine):
    net, criterion, (_, _, test) = classifier

    def found(**options):
        return evaluate_bit_depths(net, test, criterion, [2, 3, 8], **options)

    pd.testing.assert_frame_equal(found(**how(engine)), found(), check_exact=True)
