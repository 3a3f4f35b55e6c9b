"""A call that repeats another within a rehearsal: what the first one took is entered again, and its results are made, without
running it.

A step computes its loss in dozens of equal chunks, and 8-bit moments in thousands of equal pieces. On shapes each takes what the
first one took (memory/ledger), to the byte: its work, and of its moments the highest and the last one. The others bound nothing:
with more blocks of a model (memory/forecast) all moments of a call grow by the same. That holds for a call that uses no tensor
but its arguments and what it makes, and keeps nothing but its results; the first call shows whether it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name
from torch.utils._python_dispatch import _get_current_dispatch_mode  # nor for this

from lorakeet.kernels.device import REHEARSED
from lorakeet.memory.ledger import Ledger, Recording
from lorakeet.memory.operator_cache import NUMBERS, CachedResult, new_result, shape_anywhere
from lorakeet.memory.usage import Usage

Value = TypeVar("Value")
SETTINGS = NUMBERS | {type(None), str}  # types of arguments that are no tensors


class _Taken(NamedTuple):
    """What a call took beyond what was in use before it."""

    top: Usage
    moments: tuple[Usage, ...]
    flops: int
    written: int
    result: CachedResult
    kinds: tuple[str, ...]  # of the storages of its results


_calls: ContextVar[dict[Hashable, _Taken | None] | None] = ContextVar("_calls", default=None)


@contextmanager
def repeats_known() -> Iterator[None]:
    """A context in which calls are known by what they took; within another one those of that."""
    before = _calls.set({} if (known := _calls.get()) is None else known)
    try:
        yield
    finally:
        _calls.reset(before)


def as_before(function: Callable[..., Value], *arguments: Any, also: Any = None) -> Value:
    """`function(*arguments, also)`, without a gradient. On shapes, and within `repeats_known`, an equal call is not run again.

    It must depend on nothing but tensors, numbers and `also`, which has a hash. It results in None, a tensor or some tensors.
    """
    known, ledger = _calls.get(), _get_current_dispatch_mode()
    if known is None or not isinstance(ledger, Ledger) or ledger.recording is not None or torch.is_grad_enabled():
        return function(*arguments, also)
    tensors = [one for one in arguments if isinstance(one, FakeTensor)]
    plain = all(type(one) in SETTINGS or isinstance(one, FakeTensor) for one in arguments)
    shapes = [shape_anywhere(one) if isinstance(one, FakeTensor) else (type(one), one) for one in arguments] if plain else [None]
    if not tensors or None in shapes:
        return function(*arguments, also)
    key = function, tuple(shapes), also, REHEARSED.get(), ledger.vocabulary, torch.get_default_dtype()
    if key not in known:
        result, known[key] = _recorded(ledger, tensors, lambda: function(*arguments, also))
        return result
    taken = known[key]
    return function(*arguments, also) if taken is None else _entered(ledger, taken)


def _recorded(ledger: Ledger, tensors: list[FakeTensor], run: Callable[[], Value]) -> tuple[Value, _Taken | None]:
    """Runs a call; its result, and what it took, where that follows from its arguments alone."""
    start, before, work = ledger.now, ledger.entries, ledger.work_now
    moments_before = len(ledger.segments[-1].moments) if ledger.segments else 0
    recording = ledger.recording = Recording({tensor.untyped_storage()._cdata for tensor in tensors})
    try:
        result = run()
    finally:
        ledger.recording = None
    made: Any = result if isinstance(result, tuple) else () if result is None else (result,)
    after = ledger.entries
    cached = new_result(result) if recording.alone and all(isinstance(one, FakeTensor) for one in made) else None
    keys = [one.untyped_storage()._cdata for one in made] if cached is not None else []
    changed = any(after.get(key) is not one for key, one in before.items())
    if cached is None or changed or after.keys() - before.keys() != set(keys):
        return result, None
    flops, written = (now - then for now, then in zip(ledger.work_now, work, strict=True))
    kept = _highest_and_last(recording.moments)
    if ledger.segments:  # the same of each of the equal calls
        ledger.segments[-1].moments[moments_before:] = kept
    moments = tuple(_less(moment, start) for moment in kept)
    top = Usage() if recording.top is None else _less(recording.top, start)
    return result, _Taken(top, moments, flops, written, cached, tuple(after[key][1] for key in keys))


def _entered(ledger: Ledger, taken: _Taken) -> Any:
    """Enters what an equal call took, and returns results like its own."""
    start = ledger.now
    moments = [_more(start, moment) for moment in taken.moments]
    result = ledger.enter_again(_more(start, taken.top), moments, taken.flops, taken.written, taken.result, taken.kinds)
    return result


def _highest_and_last(moments: Sequence[Usage]) -> list[Usage]:
    """The first of the moments with the most bytes, and the last one."""
    if not moments:
        return []
    top = max(range(len(moments)), key=lambda place: moments[place].bytes)
    return [moments[place] for place in sorted({top, len(moments) - 1})]


def _less(moment: Usage, start: Usage) -> Usage:
    kinds = {kind: moment.kinds.get(kind, 0) - start.kinds.get(kind, 0) for kind in {**start.kinds, **moment.kinds}}
    kinds = {kind: size for kind, size in kinds.items() if size}
    return Usage(moment.bytes - start.bytes, kinds, moment.heap - start.heap)


def _more(start: Usage, taken: Usage) -> Usage:
    kinds = dict(start.kinds)
    for kind, size in taken.kinds.items():
        kinds[kind] = kinds.get(kind, 0) + size
    return Usage(start.bytes + taken.bytes, {kind: size for kind, size in kinds.items() if size}, start.heap + taken.heap)
