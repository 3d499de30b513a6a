"""Tasks that don't depend on each other, done one after another, by processes of this machine
(loky), or by the workers of a Dask cluster; with the same results."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Semaphore
from typing import Any
from uuid import uuid4

import cloudpickle
from loky import ProcessPoolExecutor, cpu_count

from quantifind.utils.console import console
from quantifind.utils.memory import keep_freed_memory
from quantifind.utils.naming import first_line
from quantifind.utils.pickling import dumps

ENGINES = ("sequential", "loky", "dask")
# seconds within which a scheduler must answer, and have a worker
PATIENCE = 8
# times that work is begun without a result before it is given up
ATTEMPTS = 3
# tasks that are under way for each process or worker
AHEAD = 2
_one_at_a_time = Lock()
_received: dict[str, Any] = {}


class Workers:
    """Who does the work.

    engine: "sequential", "loky" for processes, or "dask".
    scheduler: the address of Dask's, such as "tcp://10.0.0.1:8786".
    jobs: how many processes; by default as many as there are cores.
    Raises: ValueError for another engine, for a scheduler that doesn't answer or has no workers.
    """

    def __init__(
        self, engine: str = "sequential", *, scheduler: str | None = None, jobs: int | None = None
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}: {', '.join(ENGINES)} are allowed")
        if (engine == "dask") != (scheduler is not None):
            raise ValueError(f"engine {engine!r} with scheduler {scheduler!r}: dask needs one")
        self.engine, self.scheduler, self.jobs = engine, scheduler, jobs or cpu_count()
        # an Executor, or Dask's client, which has the same `submit`
        self.executor: Any = None
        # what it raises where a worker is lost
        self.losses: tuple[type[Exception], ...] = (BrokenProcessPool,)
        # what reached the workers last, the key that it has there, and where they find it
        self.sent: tuple[Any, str, Any] | None = None
        self._open()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def places(self) -> int:
        """How many tasks are done at a time; 1 when sequential."""
        return 1 if self.executor is None else len(self._takers())

    def map(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]
    ) -> Iterator[Any]:
        """``function(shared, item)`` of each item, in their order, as they are done.

        shared: reaches each worker once, pickled. What a lost worker was at is done by another.
        Raises: what the function raises; ValueError for a cluster that has no workers any more;
        RuntimeError where workers are lost one after another.
        """
        if self.executor is None or len(items) < 2:
            yield from (function(shared, item) for item in items)
            return
        done = failures = 0
        while done < len(items):
            try:
                for result in self._results(function, shared, items[done:]):
                    done, failures = done + 1, 0
                    yield result
            except self.losses as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise RuntimeError(
                        f"workers were lost {failures} times, without a result in between ({error})"
                    ) from error
                console.print(f"A worker was lost ({type(error).__name__}): again", markup=False)
                self._opened.close()
                self._open()

    def _results(self, function: Any, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        takers = self._takers()
        if self.sent is None or self.sent[0] is not shared:
            self.sent = shared, uuid4().hex, self._send(dumps(shared))
        free, waiting = Semaphore(AHEAD * len(takers)), deque[tuple[int, Any]]()
        try:
            for item in items:
                free.acquire()
                # the one with the fewest, since Dask goes by guesses of how long tasks take:
                # test_no_worker_waits_while_another_has_two_tasks
                busy = Counter(taker for taker, future in waiting if not future.done())
                taker = min(range(len(takers)), key=busy.__getitem__)
                task = cloudpickle.dumps((function, item))
                future = self.executor.submit(_work, *self.sent[1:], task, **takers[taker])
                future.add_done_callback(lambda _: free.release())
                waiting.append((taker, future))
                while waiting and waiting[0][1].done():
                    yield waiting.popleft()[1].result()
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _takers(self) -> list[dict[str, Any]]:
        """With which options each process or worker is given a task."""
        if self.engine == "loky":
            return [{}] * self.jobs
        self._ask(self.executor.wait_for_workers, 1, timeout=PATIENCE)
        workers = self._ask(self.executor.nthreads)
        given = [{"workers": [w], "allow_other_workers": True, "pure": False} for w in workers]
        return given or [{"pure": False}]  # the last was lost just now: Dask waits for the next

    def _send(self, packed: bytes) -> Any:
        if self.engine == "dask":
            # as bytes, of which each worker makes its own object: one that a task works on is not
            # what to pass on to a worker that joins (test_a_worker_that_joins_gets_what_was_sent)
            return self._ask(self.executor.scatter, packed, broadcast=True, hash=False)
        path = self.folder / uuid4().hex
        path.write_bytes(packed)
        return path

    def _open(self) -> None:
        self.sent = None
        with ExitStack() as opened:
            if self.engine == "loky":
                folder = opened.enter_context(TemporaryDirectory(prefix="quantifind-"))
                # no more threads than cores: test_processes_share_the_cores
                threads = str(max(1, cpu_count() // self.jobs))
                env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
                self.folder, self.executor = Path(folder), ProcessPoolExecutor(self.jobs, env=env)
                opened.callback(self.executor.shutdown, kill_workers=True)
            elif self.engine == "dask":
                self._connect(opened)
            self._opened = opened.pop_all()

    def _connect(self, opened: ExitStack) -> None:
        try:
            import dask
            from distributed import Client, KilledWorker
        except ImportError as error:
            install = "pip install 'quantifind[cluster]'"
            raise ValueError(f"engine 'dask' needs Dask: {install}") from error
        self.losses = (CancelledError, KilledWorker)
        # a task has the codes of a whole candidate: test_large_tasks_are_sent_without_a_warning
        large = {"distributed.admin.large-graph-warning-threshold": "1 TB"}
        opened.enter_context(dask.config.set(large))
        # the client, since what its get_executor() gives can wait for ever
        # (test_a_result_that_is_lost_with_its_worker). Made before it connects, so that one that
        # fails is closed here: were it collected while another one starts, both would wait for
        # ever; and one that was refused would leave its thread
        # (test_a_client_that_fails_leaves_no_thread)
        client = self.executor = Client.__new__(Client)
        opened.callback(lambda: client._loop_runner.stop())
        opened.callback(client.close)
        self._ask(Client.__init__, client, self.scheduler, timeout=PATIENCE, set_as_default=False)
        self._takers()

    def _ask(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        # the last, of a client that has given its scheduler up
        except (OSError, ValueError, AttributeError) as error:
            reason = first_line(error)
            what = f"scheduler {self.scheduler}: no Dask workers there ({reason})"
            raise ValueError(what) from error


def _work(key: str, sent: bytes | Path, task: bytes) -> Any:
    keep_freed_memory()
    # what is shared is one network whose tensors are swapped: a worker with several threads takes
    # its tasks one at a time (test_a_worker_with_several_threads_takes_one_task_at_a_time)
    with _one_at_a_time:
        if key not in _received:
            _received.clear()
            packed = sent if isinstance(sent, bytes) else sent.read_bytes()
            _received[key] = cloudpickle.loads(packed)
        function, item = cloudpickle.loads(task)
        return function(_received[key], item)
