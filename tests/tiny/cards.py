"""A simulated CUDA device: a stream is a queue, and nothing in it happens when it is asked for, but when the simulation chooses.

It may choose any order that the recorded and awaited events allow.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Event:
    """What torch.cuda.Event is to whoever waits for it."""

    def __init__(self, device: Device) -> None:
        self.device, self.over = device, False

    def synchronize(self) -> None:
        with self.device.lock:
            while not self.over:
                assert self.device.advance(), "the device waits for something that nobody asked of it"


class Stream:
    """A queue of what was asked for; its head is done when `Device.advance` chooses it and it waits for nothing."""

    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name
        self.queue: deque[tuple[str, Any]] = deque()

    def ask(self, kind: str, what: Any) -> None:
        with self.device.lock:
            self.device.log.append((self.name, kind))
            self.queue.append((kind, what))

    def record_event(self) -> Event:
        event = Event(self.device)
        self.ask("record", event)
        return event

    def wait_event(self, event: Event) -> None:
        if self.name not in self.device.deaf:
            self.ask("wait", event)

    def synchronize(self) -> None:
        with self.device.lock:
            while self.queue:
                assert self.device.advance(), "the stream waits for something that nobody asked of it"

    def step(self) -> bool:
        """Does what is first, if it can be done now."""
        if not self.queue or (self.queue[0][0] == "wait" and not self.queue[0][1].over):
            return False
        kind, what = self.queue.popleft()
        if kind == "record":
            what.over = True
        elif kind == "do":
            what()
        return True


class Late(TorchFunctionMode):
    """Puts every copy that is asked for in a stream's context into its queue."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            assert kwargs == {"non_blocking": True}
            into, source = args
            self.stream.ask("do", lambda: into.numpy().__setitem__(slice(None), source.numpy()))
            return into
        return func(*args, **(kwargs or {}))


class Device:
    """Stands for torch.cuda. `choose` picks the stream that goes on; streams named in `deaf` wait for no event."""

    def __init__(self, choose: Callable[[list[Stream]], list[Stream]], deaf: tuple[str, ...] = ()) -> None:
        self.choose, self.deaf = choose, deaf
        self.lock = threading.RLock()
        self.log: list[tuple[str, str]] = []
        self.computing, self.copying = Stream(self, "computing"), Stream(self, "copying")

    def Stream(self, device: torch.device) -> Stream:
        return self.copying

    def current_stream(self, device: torch.device) -> Stream:
        return self.computing

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with Late(stream):
            yield

    def advance(self) -> bool:
        """Does one thing of one stream; whether there was any that could be done."""
        with self.lock:
            return any(stream.step() for stream in self.choose([self.computing, self.copying]))

    def finish(self) -> None:
        while self.advance():
            pass
        assert not self.computing.queue and not self.copying.queue


class Prompt(Device):
    """One whose computing is the CPU's own: done when it is asked for. Copies happen when something waits for them, no sooner."""

    def __init__(self) -> None:
        super().__init__(lambda streams: streams)
        self.computing = _Now(self, "computing")


class _Now(Stream):
    """A stream that does at once what it is asked for, whatever has to happen before."""

    def ask(self, kind: str, what: Any) -> None:
        self.device.log.append((self.name, kind))
        if kind == "wait":
            what.synchronize()
        elif kind == "record":
            what.over = True


def pinned(size: int) -> torch.Tensor:
    """Memory like any other."""
    return torch.empty(size, dtype=torch.uint8)


def computing_first(streams: list[Stream]) -> list[Stream]:
    """The computing stream goes on as long as it can."""
    return streams


def copying_first(streams: list[Stream]) -> list[Stream]:
    """The copying stream goes on as long as it can."""
    return streams[::-1]


def by_chance(seed: int) -> Callable[[list[Stream]], list[Stream]]:
    """Either goes on."""
    chance = random.Random(seed)
    return lambda streams: chance.sample(streams, len(streams))
