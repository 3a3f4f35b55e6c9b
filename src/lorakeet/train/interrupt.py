"""Ctrl-C and SIGTERM: in training the first stops after the step, with a checkpoint, and the second ends the process at once.

Elsewhere SIGTERM and SIGHUP (the terminal was closed) act like Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Interrupt:
    """A context in which the first SIGINT or SIGTERM only sets `requested`; on exit the previous handlers are restored.

    That is said at once on standard error, unless `quiet`. Python delivers signals to the main thread alone; in another thread
    (jobs of the web page) `request` replaces the signal.
    """

    def __init__(self) -> None:
        self.requested, self.quiet = "", False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._handle) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def request(self, why: str) -> None:
        """Requests a stop after the current step."""
        self.requested = why

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._restore()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if signal.getsignal(number) is _as_ctrl_c:
                signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if not self.quiet:
            _tell(f"{self.requested}: stops after the current step or evaluation. {self.requested} again stops at once.")

    def _restore(self) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        self._before = {}


def _tell(text: str) -> None:
    """Writes a line to standard error, past its buffer: a handler may run within a write to it."""
    with suppress(OSError):  # closed
        os.write(2, f"\n{text}\n".encode())


@contextmanager
def terminable() -> Iterator[None]:
    """A context in which the first SIGTERM or SIGHUP raises KeyboardInterrupt with its name, for cleanup.

    A second SIGTERM ends the process at once; a second SIGHUP is ignored, since shell and kernel both send one. A handler that is
    already installed stays in place, and so does nohup's."""
    here = threading.current_thread() is threading.main_thread()
    ours = [which for which in _ENDS if here and signal.getsignal(which) == signal.SIG_DFL]
    for which in ours:
        signal.signal(which, _as_ctrl_c)
    try:
        yield
    finally:
        for which in ours:
            signal.signal(which, signal.SIG_DFL)


_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_ENDS = (signal.SIGTERM,) if _HANGUP is None else (signal.SIGTERM, _HANGUP)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """The handler of the first SIGTERM or SIGHUP in `terminable`."""
    signal.signal(number, signal.SIG_IGN if number == _HANGUP else signal.SIG_DFL)
    raise KeyboardInterrupt(signal.Signals(number).name)
