"""Processes to be killed, forked from one that has imported its libraries, so that each costs what it does and no imports.

A worker script ends in `serve(work)`; a test starts it with `forking(script)`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny.prepared import Forked, Prepared
from tiny.thread_pool import renew_threads


def serve(work: Callable[[dict[str, Any]], int]) -> None:
    """Reads orders as JSON lines and forks a process for each, which ends with the code that `work(order)` gives: prints its pid,
    then what it said on stderr and how it ended (-9 when killed) as one JSON line. "file_limit" in an order is in bytes.
    """
    for line in sys.stdin:
        order = json.loads(line)
        said, says = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(says, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if order.get("file_limit"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
            code = 1
            try:
                renew_threads()
                code = work(order)
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(says)
        print(pid, flush=True)
        with os.fdopen(said) as pipe:  # read first: a process that says much would wait for a reader
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "said": text}), flush=True)


@dataclass
class Workers:
    """The forking server; `start` gives the pid of a new process, `end` waits for it."""

    process: subprocess.Popen[str] | Forked

    def start(self, **order: Any) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        result: dict[str, Any] = json.loads(self.process.stdout.readline())
        return result


@contextmanager
def forked_again(prepared: Prepared, script: Path) -> Iterator[Workers]:
    """The same as `forking`, of a script that finds its libraries imported."""
    with prepared.script(script) as process:
        yield Workers(process)


@contextmanager
def forking(script: Path, folder: Path | None = None, **environment: str) -> Iterator[Workers]:
    """A context with the server that `script` is, in `folder` and with these environment variables besides its own."""
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    ) as process:  # fmt: skip
        yield Workers(process)
        process.kill()
