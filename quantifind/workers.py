"""Independent measurements made one after another, by processes of this machine, or by the workers
of a Dask cluster; with the same results."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import cloudpickle
import joblib

from quantifind.utils import console

ENGINES = ("sequential", "loky", "dask")
# seconds within which a scheduler must answer, and have a worker
PATIENCE = 8
# times that work begins anew after a worker was lost
ATTEMPTS = 5
_one_at_a_time = threading.Lock()
_received: dict[Path, Any] = {}


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
        self.engine, self.scheduler = engine, scheduler
        self.jobs = jobs or joblib.cpu_count()
        self.client = None if scheduler is None else _client(scheduler)
        self.folder = TemporaryDirectory(prefix="quantifind-") if engine == "loky" else None
        # what reached the workers last, and what stands for it there
        self.sent: tuple[Any, Any] | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.client is not None:
            self.client.close()
        if self.folder is not None:
            self.folder.cleanup()

    def map(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]
    ) -> Iterator[Any]:
        """``function(shared, item)`` of each item, in their order, as they are done.

        shared: reaches each worker once, pickled. What a lost worker was at is done by another.
        """
        if self.engine == "sequential" or len(items) < 2:
            yield from (function(shared, item) for item in items)
            return
        done = 0
        for attempt in range(1, ATTEMPTS + 1):
            try:
                for result in self._results(function, shared, items[done:]):
                    done += 1
                    yield result
                return
            except (BrokenProcessPool, CancelledError) as error:
                if attempt == ATTEMPTS:
                    raise
                self.sent = None
                console.print(f"A worker was lost ({type(error).__name__}): again", markup=False)

    def _results(self, function: Any, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        if self.sent is None or self.sent[0] is not shared:
            self.sent = shared, self._send(shared)
        sent = self.sent[1]
        options = {"client": self.client} if self.client else {"n_jobs": self.jobs}
        with joblib.parallel_config(backend=self.engine, **options):
            parallel = joblib.Parallel(return_as="generator", batch_size=1)
            yield from parallel(joblib.delayed(_work)(function, sent, (item,)) for item in items)

    def _send(self, shared: Any) -> Any:
        if self.client is not None:
            return self.client.scatter(shared, broadcast=True, hash=False)
        assert self.folder is not None
        path = Path(self.folder.name) / uuid4().hex
        path.write_bytes(cloudpickle.dumps(shared))
        return path


def _client(scheduler: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("engine 'dask' needs Dask: pip install 'quantifind[cluster]'") from None
    try:
        client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
        client.wait_for_workers(1, timeout=PATIENCE)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"scheduler {scheduler}: no Dask workers there ({reason})") from None
    return client


def _work(function: Callable[[Any, Any], Any], sent: Any, item: tuple[Any]) -> Any:
    # what is shared is one network whose tensors are swapped: a worker with several threads takes
    # its tasks one at a time
    with _one_at_a_time:
        if isinstance(sent, Path):
            if sent not in _received:
                _received.clear()
                _received[sent] = cloudpickle.loads(sent.read_bytes())
            sent = _received[sent]
        return function(sent, *item)
