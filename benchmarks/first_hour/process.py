"""Runs modules in processes of their own, with a time limit: fresh ones, or in a rehearsal forks of one with all imports."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parents[1]
FORKED = "LORAKEET_HOUR_FORKED"  # set in a rehearsal, where processes are forked
DONE, FAILED, LATE = "done", "failed", "out of time"
PAUSE = 0.05  # seconds between two polls of a process


class Started:
    """`main(arguments)` of a module in a process of its own, which leads a group; what it prints goes to `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.code: int | None = None
        self.more = dict(environment or {})
        if os.environ.get(FORKED):
            self.pid = _fork(module, arguments, log, self.more)
            return
        here = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": here, "PYTHONUNBUFFERED": "1", **self.more},
            )  # fmt: skip
        self.pid = self._process.pid

    def ended(self) -> bool:
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
                with suppress(AttributeError):
                    self._process.returncode = self.code
        return self.code is not None

    def end(self) -> None:
        """Ends the whole group, such as ranks that a stage has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while not self.ended():
            time.sleep(PAUSE)


def wait(started: Started, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> str:
    """How the process ended: DONE, FAILED or, after so many seconds, LATE. `meanwhile` is called now and then."""
    until = time.monotonic() + seconds
    try:
        while not started.ended():
            if time.monotonic() > until:
                return LATE
            meanwhile()
            time.sleep(PAUSE)
        return FAILED if started.code else DONE
    finally:
        started.end() if started.code is None else _sweep(started.pid)


def _sweep(pid: int) -> None:
    """Ends what a process that has ended left of its group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fork(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        return pid
    _in_child(module, arguments, log, environment)


def _in_child(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        os.environ.update(environment)
        importlib.import_module(module).main(list(arguments))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
