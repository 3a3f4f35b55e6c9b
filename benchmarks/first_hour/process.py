"""Runs modules in processes of their own, with a time limit: fresh ones, or in a rehearsal forks of one with all imports.

A stage leads a session. What it starts leads a group in that session, so that the end of a stage ends all of it: a program that
stays on the GPU would spoil what is measured next. Processes are found in /proc; elsewhere, where only rehearsals run, by group.
"""

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
NESTED = "LORAKEET_HOUR_NESTED"  # set in what was started here: its own processes stay in its session
DONE, FAILED, LATE = "done", "failed", "out of time"
PAUSE = 0.05  # seconds between two polls of a process
ENDING = 30.0  # seconds for a process to end once it is killed: a driver may keep it for some
PROCESSES = Path("/proc")
IN_GROUP = "import os, runpy, sys; os.setpgid(0, 0); runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


class Started:
    """`main(arguments)` of a module in a process of its own, which leads a session, or a group in the session of the process
    that started it; what it prints goes to `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.code: int | None = None
        self.nested = NESTED in os.environ
        more = {NESTED: "1", **(environment or {})}
        if os.environ.get(FORKED):
            self.pid = _fork(module, arguments, log, more, nested=self.nested)
            return
        here = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *(("-c", IN_GROUP) if self.nested else ("-m",)), module, *arguments], stdout=output,
                stderr=subprocess.STDOUT, start_new_session=not self.nested,
                env={**os.environ, "PYTHONPATH": here, "PYTHONUNBUFFERED": "1", **more},
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
        """Ends it, if it has not ended, with all that it has started and left. Returns when none of them runs any more."""
        killed = self._kill()
        while not self.ended():
            time.sleep(PAUSE)
        until = time.monotonic() + ENDING
        while (killed := [pid for pid in {*killed, *self._kill()} if _runs(pid)]) and time.monotonic() < until:
            time.sleep(PAUSE)
        if killed:
            print(f"These processes still run, {ENDING:g} s after they were killed: {killed}", file=sys.stderr, flush=True)

    def _kill(self) -> list[int]:
        """Kills it, its group, and all groups of the session if it leads one; gives those of the session."""
        for kill in (os.killpg, os.kill) if self.code is None else (os.killpg,):  # a group may not be there yet
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        found = [] if self.nested else [pid for pid in _of_session(self.pid) if _runs(pid)]
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return found


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
        started.end()


def _of_session(leader: int) -> list[int]:
    """The processes of a session; their parents may have ended."""
    found = []
    for name in os.listdir(PROCESSES) if PROCESSES.is_dir() else ():
        if name.isdigit():
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(name)) == leader:
                    found.append(int(name))
    return found


def _runs(pid: int) -> bool:
    """Whether a process computes: one that has ended and waits for its parent does not."""
    try:
        return (PROCESSES / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _fork(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], *, nested: bool) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid) if nested else None
        return pid
    _in_child(module, arguments, log, environment, nested=nested)


def _in_child(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], *, nested: bool) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0) if nested else os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        os.environ.update(environment)
        if "torch" in sys.modules:  # a fork has no threads: two that start at once would find torch's pool broken
            torch = sys.modules["torch"]
            torch.set_num_threads(torch.get_num_threads())
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
