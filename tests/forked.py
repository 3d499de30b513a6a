"""A `python` for tests: each process is a fork of one that has imported torch and dvc, which take
seconds. It has nothing of the project, whose modules a process finds as a fresh one does."""

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

HEAVY = ["torch", "torch._dynamo", "torch.utils.flop_counter", "safetensors.torch", "constriction"]
HEAVY += ["pandas", "scipy.optimize", "scipy.stats", "matplotlib.pyplot", "jinja2", "rich.progress"]
HEAVY += ["loky", "yaml", "pydantic.json_schema", "networkx", "dvc.api", "dvc.cli.parser"]
HEAVY += ["dvc.repo.reproduce", "dvc.repo.plots"]
# sends its arguments, folder, environment and files to the process that forks
PYTHON = """#!{executable} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    code = int(server.makefile().read())
sys.exit(code)
"""


@contextmanager
def forked_python() -> Iterator[Path]:
    """A folder with an executable `python`, which runs a module or, by -c, a program.

    Where forks of what has threads are not safe, it is an ordinary one.
    """
    with tempfile.TemporaryDirectory() as folder:
        python, path = Path(folder, "python"), Path(folder, "socket")
        if sys.platform != "linux":
            python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            python.chmod(python.stat().st_mode | stat.S_IXUSR)
            yield python
            return
        python.write_text(PYTHON.format(executable=sys.executable, path=str(path)))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        server = subprocess.Popen(
            [sys.executable, __file__, path],
            # threads don't survive a fork
            env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield python
            server.communicate()


def serve(path: str) -> None:
    """Have what each caller asks for done in a fork, until the input ends."""
    del sys.path[0]  # the folder of this file
    for module in HEAVY:
        importlib.import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            caller, _ = server.accept()
            with caller:
                if os.fork() == 0:
                    answer(caller)
                    os._exit(0)
    os._exit(0)  # without taking apart all that was imported


def answer(caller: socket.socket) -> None:
    """Have it done, and tell the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, opened, *_ = socket.recv_fds(caller, 1, 3)
    asked = json.load(caller.makefile())
    process = multiprocessing.get_context("fork").Process(target=do, args=(opened, *asked))
    process.start()
    for file in opened:
        os.close(file)
    process.join()
    with suppress(BrokenPipeError):
        caller.sendall(str(process.exitcode).encode())


def do(opened: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """As an ordinary `python` does, with these files as its own, arguments and environment."""
    for number, file in enumerate(opened):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    np.random.seed()  # each its own, as fresh processes have
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


if __name__ == "__main__":
    serve(sys.argv[1])
