"""The library's functions as operators of torch, so that a rehearsal on shapes sees them.

States are bf16, contiguous, on the CPU: (tokens, heads, d) with d a multiple of 64, or (…, width) with a width that is a multiple
of 16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name

from lorakeet.kernels.cpu import compile
from lorakeet.kernels.cpu.compile import library
from lorakeet.kernels.device import REHEARSED
from lorakeet.kernels.protocol import Situation

READ = (Tensor, nn.Parameter)  # tensors whose memory C may read
PLAIN = (*READ, FakeTensor)
LANES, HEAD = 16, 64  # numbers of a register, and what the numbers of a head are a multiple of

FLOPS: dict[Any, Callable[..., int]] = {}  # by operator, of its arguments: the FLOPs of its products
WORKSPACES: dict[Any, Callable[..., int]] = {}  # by operator, of its arguments: bytes that it allocates while it runs

_DEFINED = torch.library.Library("lorakeet", "FRAGMENT")  # type: ignore[no-untyped-call]
ENABLED: ContextVar[bool] = ContextVar("enabled", default=True)  # of a thread: others may compute at the same time
NEEDS = f"contiguous bfloat16, widths in multiples of {LANES}"


@contextmanager
def torch_only() -> Iterator[None]:
    """A context in which torch's own operations compute, also norms, gates and losses on a GPU; except with weights and pairs
    that were already copied into the library's layout for inference."""
    before = ENABLED.set(False)
    try:
        yield
    finally:
        ENABLED.reset(before)


def in_use() -> bool:
    """True if the library is available and enabled in this thread."""
    return ENABLED.get() and library() is not None


def why_not(situation: Situation) -> str:
    """Why C kernels do not run in a situation."""
    if situation.device.type != "cpu" or situation.rehearsed:
        return "it is a kernel for the CPU"
    if situation.products != torch.bfloat16 or situation.dtype != torch.bfloat16:
        narrow = f"states are {situation.dtype}, matrix products run in {situation.products}".replace("torch.", "")
        return f"takes bfloat16; {narrow}"
    if not situation.c:
        return "C kernels are off in this thread"
    return compile.why_not()


def takes(states: Sequence[Tensor], width: int = LANES, *_: object) -> bool:
    """True if C can read the states: contiguous bf16 on the CPU, with last dimensions in multiples of `width`."""
    for x in states:
        if not x.is_cpu or x.dtype is not torch.bfloat16 or not x.is_contiguous() or x.shape[-1] % width or type(x) not in PLAIN:
            return False
    return True


def supports(*states: Tensor, width: int = LANES) -> bool:
    """True if the library is in use, and can read the states."""
    return ENABLED.get() and not REHEARSED.get() and takes(states, width) and library() is not None


def pointers(*tensors: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[ctypes.c_void_p]:
    """The tensors' addresses; ValueError for a dtype or layout that C cannot read."""
    if any(tensor.dtype != dtype or not tensor.is_contiguous() for tensor in tensors):
        given = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]
        raise ValueError(f"the operator takes contiguous tensors of {dtype}; given: {given}")
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def loaded() -> ctypes.CDLL:
    """The library, which must be available."""
    found = library()
    assert found is not None
    return found


def define(
    schema: str,
    function: Callable[..., Any],
    shapes: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    workspace: Callable[..., int] | None = None,
    *,
    key: str = "CPU",
) -> Any:
    """Defines an operator of torch by its `schema`, computed by `function` for the dispatch `key`; `shapes` gives empty results.

    `flops` and `workspace` take the operator's arguments; memory/ledger counts with them. None: none worth counting.
    """
    name = schema.partition("(")[0]
    _DEFINED.define(schema)  # type: ignore[no-untyped-call]
    _DEFINED.impl(name, function, key)  # type: ignore[no-untyped-call]
    _DEFINED.impl(name, shapes, "Meta")  # type: ignore[no-untyped-call]
    packet = getattr(torch.ops.lorakeet, name)
    if flops is not None:
        FLOPS[packet] = flops
    if workspace is not None:
        WORKSPACES[packet.default] = workspace
    return packet.default
