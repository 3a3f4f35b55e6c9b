"""Processes that find their libraries imported: each is forked from one that has done it, and costs none of the five seconds.

A process has its own arguments, environment, folder, pipes and process number, ends as Python ends, and can be sent any signal.
What the libraries read from the environment while they are imported is that of the tests.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

COMMAND = "import sys\nfrom lorakeet.cli.main import main\nsys.exit(main(sys.argv[1:]))"
IMPORTED = (  # what the commands import late
    "lorakeet.cli.main", "lorakeet.verbs.finetune", "lorakeet.verbs.serve", "lorakeet.serve.routes.http",
    "lorakeet.studio.start", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto", "peft",
)  # fmt: skip


class Forked:
    """A process; of `subprocess.Popen` it has what tests use. It is killed at the end of a `with`."""

    def __init__(self, place: str, order: Mapping[str, Any], *, merged: bool) -> None:
        asked, asks = os.pipe()
        pipes = [os.pipe() for _ in range(1 if merged else 2)]
        given = [asked, *(pipe[1] for pipe in (pipes * 2 if merged else pipes))]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(place)
        text = json.dumps(order).encode() + b"\n"
        socket.send_fds(self._connection, [text[:1]], given)
        self._connection.sendall(text[1:])
        for handle in {*given}:
            os.close(handle)
        self._told = self._connection.makefile()
        self.pid = int(self._told.readline())
        opened: list[IO[str]] = [os.fdopen(pipe[0]) for pipe in pipes]
        self.stdin, self.stdout, self.stderr = os.fdopen(asks, "w"), opened[0], opened[-1]
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """How it ended: its exit code, or minus the signal. Raises TimeoutError."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} has not ended in {timeout} s")
            self.returncode = int(self._told.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        for file in (self.stdin, self.stdout, self.stderr, self._told):
            file.close()
        self._connection.close()


class Prepared:
    """What forks the processes, at a socket in the file `place`."""

    def __init__(self, place: str) -> None:
        self.place = place

    def python(
        self, code: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, merged: bool = False
    ) -> Forked:
        """`python -c CODE ARGUMENTS`; `merged`: what it says is in stdout too."""
        given = dict(os.environ if env is None else env)
        order = {"code": code, "argv": ["-c", *map(str, arguments)], "env": given, "cwd": str(cwd or Path.cwd())}
        return Forked(self.place, order, merged=merged)

    def script(self, file: Path, **more: Any) -> Forked:
        """`python FILE`."""
        return self.python("import runpy, sys\nrunpy.run_path(sys.argv[1], run_name='__main__')", file, **more)

    def lorakeet(self, *words: object, **more: Any) -> Forked:
        """`lorakeet WORDS`."""
        return self.python(COMMAND, *words, **more)


@contextmanager
def prepared() -> Iterator[Prepared]:
    """A context with the forking process, which ends with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/socket"
        command = [sys.executable, str(Path(__file__)), place]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "ready\n"
                yield Prepared(place)
            finally:
                process.kill()


def _serve(place: str) -> str:
    """Forks until standard input ends. Returns in each forked process, with its code."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        print("ready", flush=True)
        while True:
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if sys.stdin.fileno() in select.select([listening, sys.stdin], [], [])[0]:
                os._exit(0)  # the tests have ended
            connection, _ = listening.accept()
            first, files, _, _ = socket.recv_fds(connection, 1, 3)
            if os.fork() == 0:
                with connection.makefile() as told:
                    order = json.loads(first.decode() + told.readline())
                break
            connection.close()
            for handle in files:
                os.close(handle)
    return _begun(connection, order, files)


def _begun(connection: socket.socket, order: dict[str, Any], files: list[int]) -> str:
    """In the process itself: its code. What forked it says its number, waits, and says how it ended."""
    if pid := os.fork():
        for handle in files:
            os.close(handle)
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        with suppress(BrokenPipeError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    connection.close()
    for number, handle in enumerate(files):
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = order["argv"]
    sys.stdout.reconfigure(line_buffering=False, write_through="PYTHONUNBUFFERED" in os.environ)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from tiny.thread_pool import renew_threads

    renew_threads()
    return str(order["code"])


def _import() -> None:
    from importlib import import_module

    import torch

    from lorakeet.memory.import_cost import without_triton

    torch.set_num_threads(1)
    with without_triton():  # as in a command
        for name in IMPORTED:
            import_module(name)
    torch.optim.AdamW([torch.zeros(1)])  # brings in what torch loads late
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # not this folder, whose models.py is not tests/models
    _import()
    exec(compile(_serve(sys.argv[1]), "<string>", "exec"), {"__name__": "__main__"})
