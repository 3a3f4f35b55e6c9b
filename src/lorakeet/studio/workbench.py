"""Work beside the pages: what takes seconds is done by a process of its own, forked from one that has the modules already.

    studio ── a byte and two pipes ──> workbench ── fork ──> process: reads the settings, writes lines of JSON, ends

The workbench imports and reads configurations, and computes nothing: it has one thread, so a fork of it is safe. It also never
starts CUDA, even to ask whether there is a GPU: no process that is forked after that could use one. A page that goes away, or
sends new settings, ends its process. What a process finds that later ones need too (memory/remembered) it passes to the workbench
as soon as it has it. The workbench ends with the studio, or after IDLE seconds without work.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Any

from lorakeet.errors import EnvironmentProblem, LorakeetError
from lorakeet.memory.beside import forks_allowed, gpu_beside
from lorakeet.memory.import_cost import without_triton
from lorakeet.memory.remembered import Values, remembering

Send = Callable[[Mapping[str, Any]], None]
IDLE = 600.0  # seconds; the modules take some 400 MB
AT_ONCE = 2  # processes
PREPARED = ("lorakeet.studio.fitting", "lorakeet.studio.shown_rows", "lorakeet.studio.sizing")  # imported before the first fork
MOST_LEARNED = 400  # values, of some kilobytes each
RARELY = 200_000, 50, 50  # thresholds of Python's collector in a forked process, which ends before it could hold much
ASK_DRIVER = "PYTORCH_NVML_BASED_CUDA_CHECK"  # of torch: imports that look for a GPU then ask NVIDIA's library first
_LARGEST = 1 << 24  # bytes of a line
_SIZE = 8  # bytes before each value, which say its size


class Workbench:
    """The studio's end. One for all pages; its process is started when the first page needs it."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._places = asyncio.Semaphore(AT_ONCE)
        self._lock = threading.Lock()  # pages are made in several threads

    def start(self) -> None:
        """Starts the process, unless it runs: a page that will need it calls this while it is read."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._close()
                self._start()

    def _start(self) -> None:
        own, other = socket.socketpair()
        command = [sys.executable, "-m", "lorakeet.studio.workbench", str(other.fileno())]
        with other:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(other.fileno(),), start_new_session=True
            )
        self._socket = own

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._socket = self._process = None

    async def answers(self, work: str, settings: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What the function `work` ("module:name") sends for these settings, as it comes; closing the iterator ends its process.

        The last one is {"error": {…}} where it raised, as --json prints it, and {"done": true} otherwise.
        """
        async with self._places:
            reader, transport = await self._sent(work, settings)
            pid, ended = 0, False
            try:
                while line := await _line(reader):
                    found = json.loads(line)
                    if "pid" in found:
                        pid = found["pid"]
                        continue
                    ended = "done" in found or "error" in found
                    yield found
                    if ended:
                        return
                said = "It was ended from outside, perhaps because memory ran out. Try again."
                yield {"error": EnvironmentProblem(said, code="out-of-memory").to_mapping()}
            finally:
                transport.close()
                if pid and not ended:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    async def _sent(self, work: str, settings: Mapping[str, Any]) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
        request, sending = os.pipe()
        reading, answered = os.pipe()
        try:
            self.start()
            assert self._socket is not None
            await asyncio.to_thread(socket.send_fds, self._socket, [b"w"], [request, answered])
        finally:
            os.close(request)
            os.close(answered)
        reader = asyncio.StreamReader(limit=_LARGEST)
        pipe = os.fdopen(reading, "rb")
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        with suppress(BrokenPipeError), os.fdopen(sending, "wb") as out:
            out.write(json.dumps({"work": work, "settings": dict(settings)}).encode())
        return reader, transport


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; in place of one that is too long, an error for the page."""
    try:
        return await reader.readline()
    except ValueError:
        said = f"One part of the answer has more than {_LARGEST >> 20} MiB, as of very long rows. Shorten those."
        return json.dumps({"error": LorakeetError(said).to_mapping()}).encode()


class Learned:
    """What the forked processes have found, for those that are forked later: the newest values, by key."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._pipes = selectors.DefaultSelector()
        self._arrived: dict[int, bytearray] = {}

    def pipe(self) -> int:
        """The end of a new pipe for a process to write to; all that is written is read by `wait`."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._arrived[reading] = bytearray()
        self._pipes.register(reading, selectors.EVENT_READ)
        return writing

    def wait(self, waiting: socket.socket, seconds: float) -> bool:
        """Takes values until the socket has a request, those first that are there; False after so many seconds without one."""
        end = time.monotonic() + seconds
        self._pipes.register(waiting, selectors.EVENT_READ)
        try:
            while (left := end - time.monotonic()) > 0:
                ready = [key.fd for key, _ in self._pipes.select(left)]
                for number in ready:
                    if number != waiting.fileno():
                        self._take(number)
                if waiting.fileno() in ready:
                    return True
        finally:
            self._pipes.unregister(waiting)
        return False

    def _take(self, number: int) -> None:
        """Reads what has come through a pipe: values in whole; the rest waits, or is dropped where its process has ended."""
        arrived = self._arrived[number]
        try:
            while data := os.read(number, 1 << 20):
                arrived += data
            self._pipes.unregister(number)
            os.close(number)
            del self._arrived[number]
        except BlockingIOError:
            pass
        while len(arrived) >= _SIZE and len(arrived) >= _SIZE + (size := int.from_bytes(arrived[:_SIZE], "big")):
            key, value = pickle.loads(arrived[_SIZE : _SIZE + size])
            del arrived[: _SIZE + size]
            self.values.pop(key, None)
            self.values[key] = value
            while len(self.values) > MOST_LEARNED:
                del self.values[next(iter(self.values))]


def work_on(number: int) -> None:
    """The workbench's end, in its own process: a fork for each pair of pipes that arrives on the socket `number`."""
    running: list[int] = []
    learned = Learned()
    with socket.socket(fileno=number) as waiting:
        import_all()
        gc.collect()
        gc.freeze()  # what is imported is never searched again, in no forked process
        while True:
            wanted_now = learned.wait(waiting, IDLE)
            running = _alive(running)
            if not wanted_now:
                if running:
                    continue
                return
            word, pipes, _, _ = socket.recv_fds(waiting, 1, 2)
            if not word:  # the studio has ended
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return
            with os.fdopen(pipes[0], "rb") as request:
                wanted = json.loads(request.read())
            prepare_for(wanted)
            passing = learned.pipe()
            pid = os.fork()
            if pid == 0:
                _carry_out(waiting, wanted, pipes[1], learned.values, passing)
            running.append(pid)
            os.close(pipes[1])
            os.close(passing)


def import_all() -> None:
    """Imports what all work needs, without CUDA."""
    os.environ[ASK_DRIVER] = "1"
    with nullcontext() if gpu_beside() else without_triton():
        for name in PREPARED:
            import_prepared(name)


def import_prepared(name: str) -> None:
    """Imports the module and calls its functions `AT_START`. What these fail with is left to the work that needs it."""
    for function in getattr(import_module(name), "AT_START", ()):
        with suppress(Exception):
            function()


def _alive(pids: Sequence[int]) -> list[int]:
    """Those of the forked processes that run; the others are taken note of, so that their numbers become free."""
    return [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]


def prepare_for(wanted: Mapping[str, Any]) -> None:
    """Calls the functions `BEFORE` of the work's module: what they keep, later processes have. Their errors the work raises."""
    module = import_module(str(wanted["work"]).partition(":")[0])
    for function in getattr(module, "BEFORE", ()):
        with suppress(Exception):
            function(wanted["settings"])


def _carry_out(waiting: socket.socket, wanted: Mapping[str, Any], answered: int, values: Values, passing: int) -> None:
    """In the forked process, which ends here: one piece of work."""
    code = 1
    try:
        waiting.close()
        os.environ.pop(ASK_DRIVER, None)  # CUDA also knows whether the driver is new enough
        os.nice(5)  # a run that trains comes first
        gc.set_threshold(*RARELY)
        with os.fdopen(answered, "w", encoding="utf-8") as out:

            def send(values: Mapping[str, Any]) -> None:
                out.write(json.dumps(values) + "\n")
                out.flush()

            def pass_on(key: str, value: Any) -> None:
                data = pickle.dumps((key, value), pickle.HIGHEST_PROTOCOL)
                with os.fdopen(passing, "wb", closefd=False) as pipe:
                    pipe.write(len(data).to_bytes(_SIZE, "big") + data)

            send({"pid": os.getpid()})
            with remembering(values, pass_on), forks_allowed():
                ended = answer_of(wanted["work"], wanted["settings"], send)
            send(ended)
        code = 0
    except BrokenPipeError:  # its page has gone
        code = 0
    finally:
        os._exit(code)


def answer_of(work: str, settings: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Calls the function `work` with the settings; returns the last line for the page."""
    module, _, name = work.partition(":")
    try:
        getattr(import_module(module), name)(settings, send)
    except BrokenPipeError:
        raise
    except LorakeetError as error:
        return {"error": error.to_mapping()}
    except OSError as error:
        found = EnvironmentProblem(f"The system refused: {error}. Free some space if the disk is full; try again.")
        return {"error": found.to_mapping()}
    except Exception as error:
        said = f"{type(error).__name__}: {error}. This is a fault of Lorakeet; please report it with these settings."
        return {"error": LorakeetError(said).to_mapping()}
    return {"done": True}


if __name__ == "__main__":
    work_on(int(sys.argv[1]))
