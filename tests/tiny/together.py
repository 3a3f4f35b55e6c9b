"""Several processes as torchrun starts them, forked from one that has imported everything already, so that a test takes seconds.

Run by tiny/prepared    reads JSON lines {"count": 2, "run": [arguments of lorakeet]} or {"count": 2, "call": "module:function",
                        "with": [values]} and forks so many processes: prints their pids, then how each ended, what it said
                        (stderr) and what it answered (stdout), as one JSON line each
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiny.prepared import Forked, Prepared

PATIENCE = 60.0  # seconds until a process counts as hung


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal that killed it; what it said, and what it answered."""

    code: int
    said: str
    answered: str


class Together:
    """The forking process; `start` begins an order and gives the pids, `end` waits for all of it."""

    def __init__(self, process: Forked) -> None:
        self.process = process

    def run(self, arguments: Sequence[Any], *, count: int = 2) -> list[Ended]:
        """`lorakeet ARGUMENTS` in so many processes."""
        self.start({"count": count, "run": [str(argument) for argument in arguments]})
        return self.end()

    def call(self, place: str, *values: Any, count: int = 2) -> list[Any]:
        """What `module:function`, called with `values`, gives in each process."""
        self.start({"count": count, "call": place, "with": values})
        ended = self.end()
        assert all(one.code == 0 for one in ended), "\n".join(one.said for one in ended)
        return [json.loads(one.answered) for one in ended]

    def start(self, order: dict[str, Any]) -> list[int]:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pids: list[int] = self._line()
        return pids

    def end(self) -> list[Ended]:
        return [Ended(**ended) for ended in self._line()]

    def _line(self) -> Any:
        return json.loads(self.process.stdout.readline())


@contextmanager
def together(prepared: Prepared) -> Iterator[Together]:
    """A context with the forking process."""
    with prepared.script(Path(__file__)) as process:
        yield Together(process)


def _work(order: dict[str, Any]) -> int:
    if "run" in order:
        from lorakeet.cli.main import main

        return main(order["run"])
    module, _, name = order["call"].partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(*order["with"])), flush=True)
    return 0


def _fork(order: dict[str, Any], port: int, rank: int, said: int, answered: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    count = str(order["count"])
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    os.dup2(answered, 1)
    os.dup2(said, 2)
    code = 1
    try:
        from tiny.thread_pool import renew_threads

        renew_threads()
        code = _work(order)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code(pid: int) -> int:
    """How the process ends; one that hangs is killed."""
    deadline = time.monotonic() + PATIENCE
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def _serve() -> None:
    import torch.distributed as dist

    for line in sys.stdin:
        order = json.loads(line)
        if "call" in order:
            importlib.import_module(order["call"].partition(":")[0])  # once for all processes of this and later orders
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps one
        with tempfile.TemporaryDirectory() as folder:
            files = [[Path(folder) / f"{kind}{rank}" for kind in ("said", "answered")] for rank in range(order["count"])]
            opened = [[file.open("wb") for file in pair] for pair in files]
            pids = [_fork(order, store.port, rank, *(f.fileno() for f in pair)) for rank, pair in enumerate(opened)]
            print(json.dumps(pids), flush=True)
            codes = [_code(pid) for pid in pids]
            texts = [[file.read_text() for file in pair] for pair in files]
            ended = [
                {"code": code, "said": said, "answered": answered} for code, (said, answered) in zip(codes, texts, strict=True)
            ]
            for file in (file for pair in opened for file in pair):
                file.close()
            print(json.dumps(ended), flush=True)
        del store


if __name__ == "__main__":
    _serve()
