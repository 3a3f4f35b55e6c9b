"""Distributed training: exchanges between the processes of one run, decisions of the first, and detection of dead processes.

Uses torch's process group, started by torchrun: gloo between CPUs, also for the few numbers that all must agree on, and NCCL
between CUDA devices. Every process calls the same methods in the same order. A single process exchanges nothing.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn import Parameter

from lorakeet.errors import LorakeetError, Problems, RunStopped, visible
from lorakeet.train.launch import Launch
from lorakeet.train.rng import current_cuda_devices

Made = TypeVar("Made")
PATIENCE = timedelta(hours=2)  # timeout of an exchange; a dead process is noticed at once
HOSTS_MEET = ("cuda",)  # types of devices before whose exchanges the hosts meet
OVER = 0.9  # of that time: an exchange that fails sooner has an error of its own
ROLL_CALL = 3.0  # seconds in which live processes answer a roll call
_LISTEN = 0.2  # seconds between two polls of the store


class ProcessLost(RunStopped):
    """Raised if another process died or gave up."""


class Processes:
    """All processes of a run, as seen by this one. `store` is torchrun's key-value store."""

    def __init__(self, launch: Launch | None = None, store: Any = None) -> None:
        self.launch = launch or Launch()
        self.rank, self.count, self.first = self.launch.rank, self.launch.count, self.launch.first
        self._store, self._open, self._called = store, self.count > 1, False
        self._exchanges = 0  # that this process has come to
        self._done = threading.Event()
        self._listener = threading.Thread(target=self._answer, daemon=True)
        if self._open:
            self._listener.start()

    def total(self, *numbers: int) -> tuple[int, ...]:
        """Each number summed over all processes."""
        if self.count == 1:
            return numbers
        found = self.summed(torch.tensor(numbers, dtype=torch.int64))
        return tuple(int(number) for number in found)

    def maximum(self, number: int) -> int:
        """The largest `number` of any process."""
        if self.count > 1:
            found = torch.tensor(number)
            with self._exchanging():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)
            return int(found)
        return number

    def any(self, flag: bool) -> bool:
        """True if `flag` is true in any process."""
        return self.total(int(flag))[0] > 0

    def summed(self, values: Tensor) -> Tensor:
        """Sums `values` of equal shapes over all processes; the result is on the CPU, except for a single process."""
        if self.count == 1:
            return values
        found = values.detach().cpu().clone()
        with self._exchanging():
            dist.all_reduce(found)
        return found

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Sums gradients over all processes, in one flat buffer; a parameter without a gradient anywhere keeps none."""
        if self.count == 1:
            return
        trained = list(parameters)
        sizes = [parameter.numel() for parameter in trained]
        flat = torch.zeros(sum(sizes) + len(trained), device=trained[0].device)  # at the end: in how many processes each exists
        *parts, counts = flat.split([*sizes, len(trained)])  # type: ignore[no-untyped-call]
        for number, (parameter, part) in enumerate(zip(trained, parts, strict=True)):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
                counts[number] = 1
        with self._exchanging():
            self._meet(flat.device)
            dist.all_reduce(flat)
        for parameter, part, count in zip(trained, parts, counts.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if count else None

    def broadcast(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Copies every tensor from one process to the others."""
        if self.count == 1:
            return
        with self._exchanging(), torch.no_grad():
            for number, tensor in enumerate(tensors):
                there = tensor.detach().contiguous()
                if not number:
                    self._meet(there.device)
                dist.broadcast(there, src=source)
                tensor.copy_(there)

    def _meet(self, device: torch.device) -> None:
        """Before an exchange between CUDA devices, one between the hosts: NCCL waits without end, and names no process."""
        if device.type in HOSTS_MEET:
            dist.all_reduce(torch.zeros(1))

    def from_first(self, make: Callable[[], Made]) -> Made:
        """Calls `make` in the first process alone and returns its result, or raises its LorakeetError, in all."""
        if self.count == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except LorakeetError as error:
                answer[1] = error
        with self._exchanging():
            dist.broadcast_object_list(answer, src=0)
        made, raised = answer
        if raised is not None:
            raise raised
        return made  # type: ignore[no-any-return]

    def require_equal(self, values: Mapping[str, Any]) -> None:
        """Raises ConfigError that names every value that differs between processes."""
        if self.count == 1:
            return
        everywhere: list[Any] = [None] * self.count
        with self._exchanging():
            dist.all_gather_object(everywhere, dict(values))
        problems = Problems("The processes do not train the same run")
        for key in sorted({key for found in everywhere for key in found}):
            others = [rank for rank, found in enumerate(everywhere) if found.get(key) != everywhere[0].get(key)]
            if others:
                problems.add(f"'{key}' is another in process {others[0]} than in process 0. Give all the same files and flags.")
        problems.raise_if_any()

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """A context with random numbers of this process's own; after it, torch's generator is where it is in every process."""
        if self.count == 1:
            yield
            return
        seed = int(torch.randint(2**62, (1,)))
        with torch.random.fork_rng(devices=current_cuda_devices()):
            torch.manual_seed(seed + self.rank)
            yield

    def disband(self) -> None:
        """Ends the group: each process continues alone once all have arrived here."""
        if self._open:
            self.total(0)
        self.end()

    def end(self) -> None:
        """Closes the process group and stops answering roll calls."""
        self._close()
        self._done.set()
        if self._listener.is_alive():
            self._listener.join()

    def give_up(self, error: BaseException) -> None:
        """Records the error that ends this process in the store, for the others."""
        if self._open and not isinstance(error, ProcessLost):
            self._leave_word("gave-up", f"{type(error).__name__}: {error}")  # as _missed reads it
        self._close()

    def already_reported(self, text: str) -> bool:
        """True if a process of lower rank reports the same text; called by each before reporting it."""
        self._leave_word("said", text)
        deadline = time.monotonic() + 2 * ROLL_CALL  # others may be waiting for an answer themselves
        while self.rank and time.monotonic() < deadline:
            if any(self._word("said", rank) == text for rank in range(self.rank)):
                return True
            time.sleep(_LISTEN)
        return False

    def _close(self) -> None:
        if self._open:
            self._open = False
            dist.destroy_process_group()

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """A context for torch's exchanges: turns their error for a process that is dead, or late, into ProcessLost."""
        self._exchanges += 1
        before = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - before
            traceback.clear_frames(error.__traceback__)  # they keep the connections open
            self._close()  # so that others waiting for this one notice too
            lost = self._missed()
            if not lost and waited >= OVER * PATIENCE.total_seconds():
                lost = self._late()
            if lost:
                raise ProcessLost(lost) from error
            raise

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """A context for forward and backward passes of a sharded model, where torch gathers blocks from other processes.

        Turns the error for a dead process into ProcessLost; own errors, such as out of memory, stay."""
        try:
            yield
        except RuntimeError as error:
            if not self._open or not (lost := self._missed()):
                raise
            traceback.clear_frames(error.__traceback__)
            self._close()
            raise ProcessLost(lost) from error

    @contextmanager
    def terminable(self) -> Iterator[None]:
        """A context that ends at the first SIGTERM, by ProcessLost if another process died (torchrun then terminates the rest).

        Otherwise by KeyboardInterrupt. A single process keeps its handler. A second SIGTERM ends the process.
        Python drops what a signal handler raises within `__del__`: the context then ends so at the next error, or at its end.
        """
        if not self._open or threading.current_thread() is not threading.main_thread():
            yield
            return

        raised: list[BaseException] = []

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, before)
            if self._called:  # a roll call is in progress, or the loss is already reported
                return
            if self._open and (lost := self._missed(stopping=True)):
                self._close()
                raised.append(ProcessLost(lost))
            else:
                raised.append(KeyboardInterrupt("SIGTERM"))
            raise raised[0]

        def report(dropped: sys.UnraisableHookArgs) -> None:
            if not raised or dropped.exc_value is not raised[0]:
                print_dropped(dropped)

        before, print_dropped = signal.getsignal(signal.SIGTERM), sys.unraisablehook
        signal.signal(signal.SIGTERM, handle)
        sys.unraisablehook = report
        try:
            yield
            if raised:
                raise raised[0]
        except Exception as error:
            if raised and error is not raised[0]:
                raise raised[0] from error
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            sys.unraisablehook = print_dropped

    def _missed(self, *, stopping: bool = False) -> str:
        """Names the processes that do not answer, or gave up; empty if all are alive.

        A process that is `stopping` on request ignores others that stopped too."""
        self._called = True
        self._leave_word("roll-call", "now")
        others = [rank for rank in range(self.count) if rank != self.rank]
        answered: set[int] = set()
        deadline = time.monotonic() + ROLL_CALL
        while len(answered) < len(others) and time.monotonic() < deadline:
            time.sleep(_LISTEN)
            answered = {rank for rank in others if self._word("here", rank) or self._word("gave-up", rank)}
        words = {rank: self._word("gave-up", rank) for rank in others}
        stopped = f"{RunStopped.__name__}: "  # as give_up writes it
        gone = {rank: "" if stopping and why.startswith(stopped) else why for rank, why in words.items()}
        said = [f"process {rank} of {self.count} gave up ({why})" for rank, why in gone.items() if why]
        silent = [rank for rank in others if rank not in answered]
        return " and ".join([*said, *(f"process {rank} of {self.count} died" for rank in silent)])

    def _late(self) -> str:
        """Names the processes that answered a roll call, but have not come to the exchange that failed: its time was over."""
        come = {rank: self._word("here", rank) for rank in range(self.count) if rank != self.rank}
        late = [rank for rank, count in come.items() if count and int(count) < self._exchanges]
        patience = f"{PATIENCE.total_seconds():g} s"
        return " and ".join(
            f"process {rank} of {self.count} runs, but for {patience} has not come to an exchange with the others"
            for rank in late
        )

    def _answer(self) -> None:
        """Answers a roll call with the number of exchanges that this process has come to, in a thread of its own."""
        try:
            store = self._store.clone()  # an own connection, which never blocks
            while not self._done.wait(_LISTEN):
                if any(store.check([f"roll-call/{rank}"]) for rank in range(self.count)):
                    store.set(f"here/{self.rank}", str(self._exchanges))
                    return
        except RuntimeError:  # the store is gone
            return

    def _leave_word(self, kind: str, text: str) -> None:
        try:
            self._store.set(f"{kind}/{self.rank}", text)
        except RuntimeError as error:
            print(visible(f"Process {self.rank} cannot notify the others: {error}"), file=sys.stderr)

    def _word(self, kind: str, rank: int) -> str:
        try:
            key = f"{kind}/{rank}"
            return bytes(self._store.get(key)).decode() if self._store.check([key]) else ""
        except RuntimeError:  # its process is gone
            return ""


ALONE = Processes()


@contextmanager
def joined(launch: Launch) -> Iterator[Processes]:
    """A context in which the processes of `launch` form a group.

    A LorakeetError ends every process with its exit code: the first process raises it; the others print it unless a process of
    lower rank does, and raise SystemExit.
    """
    if launch.count == 1:
        yield ALONE
        return
    store, rank, count = next(rendezvous("env://"))
    nccl = torch.cuda.is_available() and dist.is_nccl_available()  # some builds of torch for small boards have none
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    processes = Processes(launch, store)
    try:
        yield processes
    except LorakeetError as error:
        processes.give_up(error)
        said = processes.already_reported(str(error))
        if launch.first:
            raise
        if not said:
            print(visible(f"Error: process {rank}: {error}"), file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except BaseException as error:
        processes.give_up(error)
        raise
    finally:
        processes.end()
