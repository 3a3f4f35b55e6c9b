"""Continuous batching: one thread runs the model step by step; texts join and leave between steps, each with its own adapters.

    submit ──► queue (bounded) ──► slot ──► prompt, a chunk a step ──► a token a step ──► done, stopped, cancelled, too late

Every step computes one token of each running text, and at most `chunk` tokens of prompts, so that a long prompt delays the others
by no more than a chunk.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import Tensor

from lorakeet.core.selection import Selection
from lorakeet.errors import ConfigError, DataError, LorakeetError, is_device_fault
from lorakeet.formats.files.loaded_file import free_spare_memory
from lorakeet.kernels.threads import compute_with
from lorakeet.memory.allocator import release_free_memory
from lorakeet.memory.cuda import device_fault_text
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, check_cached, step
from lorakeet.models.generate.sample import end_ids
from lorakeet.models.text.model import TextModel
from lorakeet.serve.cache_slots import CacheSlots, prefix_key
from lorakeet.serve.grammar import Grammar, GrammarFailed
from lorakeet.serve.sampling import SampledToken, Sampling, TokenSampler, rows_finite
from lorakeet.serve.text_stream import TextStream

NOT_FINITE = "The logits are not finite with these adapters and weights; use smaller weights, or check the adapter."
KEEP_COPIES = 10.0  # seconds without a text until the layers' copies of adapters are freed
Reason = Literal["stop", "length", "timeout", "cancelled", "error"]
T = TypeVar("T")
log = logging.getLogger("lorakeet.serve")


class QueueFull(LorakeetError):
    """The queue is full; retry after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting, the most that this server queues; try again in {retry_after} s.")
        self.retry_after = retry_after


class Draining(LorakeetError):
    """The server is shutting down and accepts no requests."""


@dataclass(frozen=True)
class Event:
    """An event of a text: a new token (`chosen`, with the text that is final now), or its end (`reason`)."""

    text: str = ""
    chosen: SampledToken | None = None
    reason: Reason | None = None
    error: str = ""


@dataclass(frozen=True)
class Request:
    """A text to generate after the tokens `ids`, with adapter weights by version."""

    ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    adapters: Mapping[str, float] = field(default_factory=dict)
    timeout: float | None = None  # seconds from submission to the last token
    grammar: Grammar | None = None  # of the text


@dataclass
class Timing:
    """Times in seconds of time.monotonic; 0.0 for what has not happened."""

    submitted: float = 0.0
    first: float = 0.0
    ended: float = 0.0


class EngineRequest:
    """A request in the engine. The engine's thread calls `listener` with its events; it must return at once."""

    def __init__(self, request: Request, listener: Callable[[Event], None], stream: TextStream) -> None:
        self.request, self.listener, self.stream = request, listener, stream
        self.chooser = TokenSampler(request.sampling, request.grammar.begin() if request.grammar else None, request.ids)
        self.timing = Timing(submitted=time.monotonic())
        self.cancelled = False
        self.slot = -1
        self.done = 0  # tokens of prompt and text in the KV cache
        self.cached = 0  # tokens of the prompt reused from the cache
        self.written: list[int] = []
        self.pending: tuple[int, ...] = request.ids  # to compute next: the rest of the prompt, or the last token

    def cancel(self) -> None:
        """Ends the text before its next token; its slot is then free."""
        self.cancelled = True


class Engine:
    """One model, its cache and its thread. `start` it, `submit` to it from any thread, `drain` it."""

    def __init__(
        self,
        text: TextModel,
        selection: Selection,
        *,
        slots: int = 16,
        context: int = 2048,
        waiting: int = 256,
        chunk: int = 256,
        cores: Callable[[], int] | None = None,
    ) -> None:
        """`slots` texts of at most `context` tokens, prompts included, run at once; `waiting` more may queue.

        `cores` returns the number of cores for the next step or call; by default torch's number of threads. ConfigError for a
        model whose texts cannot share a batch, be written over a cache, or be as long as `context`.
        """
        selection.use(None)  # the adapters of an earlier engine's last step
        check_cached(text, context)
        self.text, self.selection, self.context, self.chunk = text, selection, context, chunk
        self.cache = KeyValues(slots=slots, capacity=context)
        self.slots = CacheSlots(self.cache)
        self.most_waiting, self.cores = waiting, cores
        self.steps = 0
        self.most_copies: int | None = None  # bytes that copies of adapters may take between steps
        self._ends = end_ids(text)
        self._known = int(text.model.get_input_embeddings().weight.shape[0])  # tokens with a row in the embedding
        self._queue: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Condition()
        self._state: Literal["new", "running", "draining", "stopped"] = "new"
        self._thread = threading.Thread(target=self._run, name="lorakeet-engine", daemon=True)
        self._pace = 1.0  # moving average of the seconds of a text
        self.failure = ""

    @property
    def ready(self) -> bool:
        """True if requests are accepted."""
        return self._state == "running"

    @property
    def load(self) -> tuple[int, int]:
        """(running texts, waiting texts)."""
        return len(self._running), len(self._queue)

    def start(self) -> None:
        """Starts the thread."""
        self._state = "running"
        self._thread.start()

    def submit(self, request: Request, listener: Callable[[Event], None]) -> EngineRequest:
        """Queues `request`. ConfigError if it cannot be served, QueueFull if too many wait, Draining during shutdown."""
        request.sampling.check()
        if not request.ids:
            raise ConfigError("The prompt has no token; it needs at least one.")
        if len(request.ids) >= self.context:
            raise ConfigError(
                f"The prompt has {len(request.ids):,} tokens; with at least one to write, at most {self.context - 1:,} fit the "
                "context. Shorten it, or start the server with a larger --context."
            )
        if not 0 <= min(request.ids) <= max(request.ids) < self._known:
            wrong = next(number for number in request.ids if not 0 <= number < self._known)
            raise ConfigError(
                f"The prompt has the token {wrong}, but the model knows 0 … {self._known - 1} only. Leave it out; if the prompt "
                "is a text, the tokenizer has tokens that the model was not trained with, as a merged model may."
            )
        job = EngineRequest(request, listener, TextStream(self.text.tokenizer, request.sampling.stop))
        with self._wake:
            if self._state != "running":
                raise Draining(self.failure or "The server is shutting down.")
            if len(self._queue) >= self.most_waiting:
                turns = -(-len(self._queue) // self.cache.slots)
                raise QueueFull(len(self._queue), max(1, round(turns * self._pace)))
            self._queue.append(job)
            self._wake.notify()
        return job

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs `function` in the engine's thread between two steps, when nothing else runs the model."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # raised where the result is read
                future.set_exception(error)

        with self._wake:
            if self._state == "stopped":
                raise Draining("The server has stopped.")
            self._calls.put(run)
            self._wake.notify()
        return future

    def cut(self) -> None:
        """Accepts no requests, and ends those that are accepted before their next token."""
        with self._wake:
            self._state = "draining" if self._state == "running" else self._state
            self._wake.notify()
        for job in (*self._queue, *self._running):
            job.cancel()

    def drain(self, timeout: float | None = None) -> bool:
        """Accepts no requests, finishes the accepted ones, and stops; after `timeout` seconds cancels the rest.

        Returns True if nothing was cancelled.
        """
        with self._wake:
            self._state = "draining" if self._state == "running" else self._state
            self._wake.notify()
        self._thread.join(timeout)
        finished = not self._thread.is_alive()
        if not finished:
            self.cut()
            self._thread.join()
        return finished

    def _run(self) -> None:
        try:
            self._loop()
        except RuntimeError as error:
            if not is_device_fault(error):
                raise
            with self._wake:
                self._state, self.failure = "stopped", device_fault_text(error)
            log.error(self.failure)
        finally:
            with self._wake:
                if self._state != "stopped":  # an unexpected error: reported to all requests, and raised
                    self._state, self.failure = "stopped", "The engine has failed; its log says why. Start the server again."
            while not self._calls.empty():
                self._calls.get()()
            for job in (*self._running, *tuple(self._queue)):
                self._finish(job, "error", self.failure)

    def _loop(self) -> None:
        taken = 0
        while self._wait():
            if self.cores is not None and (cores := self.cores()) != taken:
                compute_with(cores)
                taken = cores
            while not self._calls.empty():
                self._calls.get()()
            self._sweep()
            self._admit()
            if self._running:
                self._guarded_step()

    def _wait(self) -> bool:
        """Waits for work; False if there will be none.

        After KEEP_COPIES seconds without work, the layers' copies of adapters are freed.
        """
        patience: float | None = KEEP_COPIES
        while True:
            with self._wake:
                if self._queue or self._running or not self._calls.empty():
                    return True
                if self._state == "draining":
                    self._state = "stopped"
                    return False
                woken = self._wake.wait(patience)
            if not woken:
                self.selection.release()
                free_spare_memory()
                release_free_memory()
                patience = None

    def _sweep(self) -> None:
        """Ends cancelled texts and those past their time limit, running or waiting."""
        now = time.monotonic()
        for job in (*self._running, *tuple(self._queue)):
            limit = job.request.timeout
            if job.cancelled:
                self._finish(job, "cancelled")
            elif limit is not None and now - job.timing.submitted > limit:
                self._finish(job, "timeout")

    def _admit(self) -> None:
        while self._queue and self.slots.free:
            with self._wake:
                job = self._queue.popleft()
            job.slot, job.cached = self.slots.take(prefix_key(job.request.adapters), job.request.ids)
            job.done, job.pending = job.cached, job.request.ids[job.cached :]
            self._running.append(job)

    def _guarded_step(self) -> None:
        """One step. An error of the model (a bug, memory) ends the texts of this step, and the engine continues; not one of a GPU
        that failed, which every later step would meet."""
        jobs, rows = self._rows()
        try:
            logits = step(self.text, self.cache, rows, self.selection)
        except (RuntimeError, ValueError, MemoryError) as error:
            if is_device_fault(error):
                raise
            for job in jobs:
                self.slots.wipe(job.slot)  # a part of the layers may have gone on
                self._finish(job, "error", f"{type(error).__name__}: {error}")
            return
        finally:  # each layer keeps the copies of earlier batches
            if self.most_copies is not None and self.selection.table_bytes > self.most_copies:
                self.selection.release()
        self.steps += 1
        self._take(jobs, rows, logits.cpu())

    def _rows(self) -> tuple[list[EngineRequest], list[CacheRow]]:
        """The rows of the next step: all running texts, and prompts of up to a chunk, sorted by length and slot."""
        left, chosen = self.chunk, []
        for job in self._running:  # in the order of arrival
            count = len(job.pending)
            if job.written or count == 1:
                chosen.append((job, count))
            elif left > 0:
                count = min(count, left)
                left -= count
                chosen.append((job, count))
        chosen.sort(key=lambda pair: (pair[1], pair[0].slot))
        rows = [CacheRow(job.slot, job.done, job.pending[:count], job.request.adapters) for job, count in chosen]
        return [job for job, _ in chosen], rows

    def _take(self, jobs: list[EngineRequest], rows: list[CacheRow], logits: Tensor) -> None:
        for job, row, found, finite in zip(jobs, rows, logits, rows_finite(logits), strict=True):
            if not finite:
                self.slots.wipe(job.slot)
                self._finish(job, "error", NOT_FINITE)
                continue
            self.slots.wrote(job.slot, row.ids)
            job.done += len(row.ids)
            job.pending = job.pending[len(row.ids) :]
            if not job.pending:
                self._next(job, found)

    def _next(self, job: EngineRequest, logits: Tensor) -> None:
        """Samples the next token of a text and passes it to the listener; the text continues or ends."""
        try:
            chosen = job.chooser.choose(logits)
        except GrammarFailed as error:
            self._finish(job, "error", str(error))
            return
        except (IndexError, ValueError, RuntimeError) as error:  # of one text's settings: the others go on
            self._finish(job, "error", f"The next token cannot be sampled with these settings: {error}.")
            return
        if not job.written:
            job.timing.first = time.monotonic()
        job.written.append(chosen.token)
        if chosen.token in self._ends:
            self._finish(job, "stop")
            return
        try:
            piece = job.stream.add(chosen.token)
        except DataError as error:  # of a stranger's tokenizer: the other texts go on
            self._finish(job, "error", str(error))
            return
        job.listener(Event(piece, chosen))
        if job.stream.stopped or (job.chooser.guide is not None and job.chooser.guide.finished):
            self._finish(job, "stop")
        elif len(job.written) >= job.request.sampling.max_tokens or job.done >= self.context:
            self._finish(job, "length")
        else:
            job.pending = (chosen.token,)

    def _finish(self, job: EngineRequest, reason: Reason, error: str = "") -> None:
        if job.slot >= 0:
            self._running.remove(job)
            self.slots.release(job.slot)
            self._pace += 0.1 * (time.monotonic() - job.timing.submitted - self._pace)
        else:
            with self._wake:
                self._queue.remove(job)
        job.timing.ended = time.monotonic()
        try:
            rest = job.stream.end()
        except DataError as failed:
            rest, reason, error = "", "error", error or str(failed)
        job.listener(Event(rest, None, reason, error))
