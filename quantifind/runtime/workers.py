"""Independent measurements made one after another, by processes of this machine, or by the workers
of a Dask cluster; with the same results."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import cloudpickle
from joblib.externals import loky

from quantifind.utils.console import console

ENGINES = ("sequential", "loky", "dask")
# seconds within which a scheduler must answer, and have a worker
PATIENCE = 8
# times that work is begun without a result before it is given up
ATTEMPTS = 3
# tasks that are under way for each process or worker that takes them
AHEAD = 2
# seconds after which a cluster is asked again who its workers are
GLANCE = 0.5
_one_at_a_time = threading.Lock()
_received: dict[str, Any] = {}


class Workers:
    """Who does the work.

    engine: "sequential", "loky" for processes, or "dask". jobs: how many processes; by default as
    many as there are cores. scheduler: the address of Dask's, such as "tcp://10.0.0.1:8786".
    Errors: ValueError for another engine, for a scheduler that doesn't answer or has no workers.
    """

    def __init__(
        self, engine: str = "sequential", *, scheduler: str | None = None, jobs: int | None = None
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}: {', '.join(ENGINES)} are allowed")
        if (engine == "dask") != (scheduler is not None):
            raise ValueError(f"engine {engine!r} with scheduler {scheduler!r}: dask needs one")
        self.pool: _Processes | _Cluster | None = None
        if engine == "loky":
            self.pool = _Processes(jobs or loky.cpu_count())
        elif scheduler is not None:
            self.pool = _Cluster(scheduler)
        # what reached the workers last, and what stands for it there
        self.sent: tuple[Any, Any] | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.close()

    def map(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]
    ) -> Iterator[Any]:
        """``function(shared, item)`` of each item, in their order, as they are done.

        shared: reaches each worker once, pickled. What a lost worker was at is done by another.
        Errors: what the function raises; ValueError for a cluster that has no workers any more;
        RuntimeError where workers are lost one after another.
        """
        if self.pool is None or len(items) < 2:
            yield from (function(shared, item) for item in items)
            return
        done = failures = 0
        while done < len(items):
            before = done
            try:
                for result in self._results(self.pool, function, shared, items[done:]):
                    done += 1
                    yield result
            except self.pool.losses as error:
                failures = failures + 1 if done == before else 1
                if failures == ATTEMPTS:
                    raise RuntimeError(
                        f"workers were lost {failures} times, without a result in between ({error})"
                    ) from error
                console.print(f"A worker was lost ({type(error).__name__}): again", markup=False)
                self.sent = None
                self.pool.renew()

    def _results(
        self, pool: "_Processes | _Cluster", function: Any, shared: Any, items: Sequence[Any]
    ) -> Iterator[Any]:
        if self.sent is None or self.sent[0] is not shared:
            self.sent = shared, pool.send(cloudpickle.dumps(shared))
        free, waiting = threading.Semaphore(AHEAD * pool.places()), deque[Any]()
        try:
            for item in items:
                free.acquire()
                waiting.append(pool.submit(self.sent[1], cloudpickle.dumps((function, item))))
                waiting[-1].add_done_callback(lambda _: free.release())
                while waiting and waiting[0].done():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Processes:
    """Processes of this machine, which find what is shared in a file."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.losses = jobs, (BrokenProcessPool,)
        self.folder = TemporaryDirectory(prefix="quantifind-")
        self._start()

    def _start(self) -> None:
        threads = str(max(1, loky.cpu_count() // self.jobs))
        env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self.executor = loky.ProcessPoolExecutor(self.jobs, env=env)

    def places(self) -> int:
        return self.jobs

    def send(self, packed: bytes) -> Path:
        path = Path(self.folder.name) / uuid4().hex
        path.write_bytes(packed)
        return path

    def submit(self, sent: Path, task: bytes) -> Any:
        return self.executor.submit(_work, sent.name, sent, task)

    def renew(self) -> None:
        self.executor.shutdown(kill_workers=True)
        self._start()

    def close(self) -> None:
        self.executor.shutdown(kill_workers=True)
        self.folder.cleanup()


class _Cluster:
    """The workers of a Dask cluster.

    What is shared goes there as bytes, of which each worker makes its own object: one that a task
    is working on could not be passed on to a worker that joins.
    """

    def __init__(self, scheduler: str) -> None:
        try:
            from distributed import Client, KilledWorker
        except ImportError:
            install = "pip install 'quantifind[cluster]'"
            raise ValueError(f"engine 'dask' needs Dask: {install}") from None
        self.scheduler, self.losses = scheduler, (CancelledError, KilledWorker)
        # by the address of each worker, its tasks that may not be done
        self.given: dict[str, list[Any]] = {}
        self.looked = 0.0
        # made before it connects, so that one that fails is closed here: were it collected while
        # another one starts, both would wait for ever (test_a_client_that_fails_leaves_no_thread)
        self.client = Client.__new__(Client)
        try:
            with self._answering():
                self.client.__init__(  # type: ignore[misc]
                    scheduler, timeout=PATIENCE, set_as_default=False
                )
                self.client.wait_for_workers(1, timeout=PATIENCE)
        except BaseException:
            with suppress(AttributeError):  # of one that has not come so far
                self.client.close()
            raise

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        # the last, of a client that has given its scheduler up
        except (OSError, ValueError, TimeoutError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"scheduler {self.scheduler}: no Dask workers there ({reason})"
            ) from None

    def places(self) -> int:
        self._look()
        return max(1, len(self.given))

    def _look(self) -> None:
        """See which workers there are, and what each still has to do."""
        if time.monotonic() - self.looked > GLANCE:
            with self._answering():
                self.given = {a: self.given.get(a, []) for a in self.client.nthreads()}
            self.looked = time.monotonic()
        for address, given in self.given.items():
            self.given[address] = [future for future in given if not future.done()]

    def send(self, packed: bytes) -> Any:
        with self._answering():
            return self.client.scatter(packed, broadcast=True, hash=False)

    def submit(self, sent: Any, task: bytes) -> Any:
        import dask

        self._look()
        # the one with the fewest: Dask, which goes by guesses of how long tasks take, would leave
        # one idle and give two to another
        address = min(self.given, key=lambda address: len(self.given[address]), default=None)
        # a task has the codes of a whole candidate: test_large_tasks_are_sent_without_a_warning
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
            future = self.client.submit(
                *(_work, sent.key, sent, task),
                pure=False,
                workers=address,
                allow_other_workers=address is not None,
            )
        if address is not None:
            self.given[address].append(future)
        return future

    def renew(self) -> None:
        pass

    def close(self) -> None:
        self.client.close()


def _work(key: str, sent: bytes | Path, task: bytes) -> Any:
    # what is shared is one network whose tensors are swapped: a worker with several threads takes
    # its tasks one at a time
    with _one_at_a_time:
        if key not in _received:
            _received.clear()
            packed = sent if isinstance(sent, bytes) else sent.read_bytes()
            _received[key] = cloudpickle.loads(packed)
        function, item = cloudpickle.loads(task)
        return function(_received[key], item)
