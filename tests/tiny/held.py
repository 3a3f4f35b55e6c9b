"""Counts the bytes of the tensors with numbers that a computation makes and holds."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an operator's arguments or result; torch's own walk takes ten times as long."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


class HeldBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context: `now` are the bytes of tensors made in it that are still there, `peak` the most there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False leaves out torch's check for compiled code at every call; nothing is compiled in here."""
        return False

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before, as long as they are."""
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, Tensor):  # most often a view of the first argument, or that argument
            key = result.untyped_storage()._cdata
            if key in self._known or (args and isinstance(args[0], Tensor) and args[0].untyped_storage()._cdata == key):
                return result
        made = [tensor for tensor in tensors_in(result) if tensor.untyped_storage()._cdata not in self._known]
        if made:
            given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
            for tensor in made:
                if tensor.untyped_storage()._cdata not in given:
                    self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not tensor.is_meta and key not in self._known:
            self.now += size
            self.peak = max(self.peak, self.now)
            self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.pop(key, None)


@contextmanager
def held_bytes() -> Iterator[Callable[[], int]]:
    """A context, and what tells the most that was held in it: tensors, and what Python and numpy allocate, each at its peak."""
    found: list[int] = []
    with HeldBytes():
        float(torch.ones(2).double().sum())  # torch imports 75 MB of modules when a dispatch mode is first used
    tracemalloc.start()
    try:
        with HeldBytes() as held:
            before = tracemalloc.get_traced_memory()[0]
            yield lambda: found[0]
            found.append(held.peak + tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


@contextmanager
def counted_from(owner: object, name: str) -> Iterator[HeldBytes]:
    """Counts the tensors that are made from the first call of `owner.name` to the end of the context."""
    held, real = HeldBytes(), getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as counting:

        def called(*given: Any, **more: Any) -> Any:
            patch.setattr(owner, name, real)
            counting.enter_context(held)
            return real(*given, **more)

        patch.setattr(owner, name, called)
        yield held
