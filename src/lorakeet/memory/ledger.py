"""A ledger of all tensors of a computation, recorded while it runs on shapes alone: no weights, no arithmetic.

The real code, such as a training step, runs on torch's fake tensors: they have shape, dtype and device, but no memory. Each new
storage of an operator is added, and each storage that Python or autograd frees is removed. So views count once, in-place results
not at all, and saved activations as long as autograd saves them.

Reading a number of a tensor (`loss.item()`, `bool(isfinite(norm))`) returns 1; where a condition is true
(`torch.where(chosen == expert)`): everywhere; runs of different numbers (`unique_consecutive`): one; equality of two tensors:
False. So the planned run is the one in which all numbers are finite, every gradient arrives, one expert of a mixture gets every
token, and GPTQ's columns are unordered.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lorakeet.kernels.cpu import operators
from lorakeet.memory.allocator import LARGEST_HEAP_PIECE
from lorakeet.memory.lapack import WORKSPACES as LAPACK
from lorakeet.memory.operator_cache import (
    CachedResult,
    Cost,
    ShapeMode,
    cacheable_result,
    call_of,
    packed_results,
    unpacked_results,
    without_numbers,
)
from lorakeet.memory.usage import NO_BLOCK, PERSISTENT, Usage, UsageSegment

CPU = torch.device("cpu")
CLOCK = 256  # operators between two readings of the time
DEVICE_OF, NUMBER_OF = torch.ops.prim.device.default, torch.ops.aten._local_scalar_dense.default
LIFT = torch.ops.aten.lift_fresh.default
MOST_KNOWN = 1 << 13  # cached calls, of 1.4 KiB each; beyond these the cache is cleared
_KNOWN: dict[tuple[Any, ...], CachedResult] = {}  # results by call, for all ledgers of this process
Kind = Literal["base", "adapter", "moments", "gradients", "saved activations", "logits", "scratch"]


@dataclass
class Work:
    """The work of one phase: FLOPs of matrix products (2 per multiply-add), and bytes of results."""

    flops: int = 0
    written: int = 0


class TooLong(Exception):
    """The computation has taken more of the processor's time than it was given."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which code runs on fake tensors and its memory is recorded. `vocabulary` is the width that marks logits.
    Raises TooLong after `seconds` of the processor's time: code that draws until numbers fit would never end.

    `peaks` and `work` are by phase; a phase's peak includes tensors from before it. `segments` are all moments of the run, if
    its blocks are watched.
    """

    def __init__(self, vocabulary: int = 0, *, seconds: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self._calls, self._until = 0, time.process_time() + seconds
        self.in_use: Counter[str] = Counter()  # bytes by kind
        self.bytes = 0
        self.heap = 0
        self._moment: Usage | None = None  # these three, where they have been requested since they changed
        self.peaks: dict[str, Usage] = {}
        self.work: dict[str, Work] = defaultdict(Work)
        self.segments: list[UsageSegment] = []
        self._phase = ""
        # By storage: bytes, kind, and a reference whose callback removes the entry.
        self._entries: dict[int, tuple[int, str, weakref.ref[Any]]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._fake = ShapeMode()
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """True: nothing is compiled in here, and torch would check for it at every call."""
        return False

    def __enter__(self) -> Ledger:
        self._fake.__enter__()
        self._saving.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._saving.__exit__(*error)
        self._fake.__exit__(*error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context for a part of the run with its own peak. Phases do not nest; the same name again may raise its peak."""
        before, self._phase = self._phase, name
        self._mark()
        self._start_segment("phase", NO_BLOCK)
        try:
            yield
        finally:
            self._phase = before
            self._start_segment("phase", NO_BLOCK)

    def name(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Sets the kind of these tensors; results are scratch by default."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self._enter_storage(tensor, kind)
                self._rename(tensor, kind)
        self._keep_moment()

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts the `.grad` of these parameters as gradients."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.name("gradients", [parameter.grad])

        for parameter in parameters:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]

    def watch_blocks(self, blocks: Sequence[nn.Module]) -> None:
        """Keeps every moment from now on in `segments`, with marks where the passes of these blocks start and end."""
        for index, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._before_block, index)))
            self._hooks.append(block.register_forward_hook(partial(self._after_block, index)))
        self.segments.append(UsageSegment(self._phase, "phase"))
        self._keep_moment()

    def _before_block(self, index: int, *_: Any) -> None:
        self._start_segment("forward", index)

    def _after_block(self, index: int, _block: nn.Module, _given: Any, output: Any) -> None:
        self._start_segment("after", index)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(lambda _: self._start_segment("backward", index))

    def _start_segment(self, event: str, block: int) -> None:
        if self.segments:
            self._keep_moment()
            self.segments.append(UsageSegment(self._phase, event, block))
            self._keep_moment()

    def _keep_moment(self) -> None:
        if self.segments:
            self.segments[-1].moments.append(self.now)

    def close(self) -> None:
        """Removes the hooks from parameters and blocks."""
        while self._hooks:
            self._hooks.pop().remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        if func is NUMBER_OF and isinstance(args[0], FakeTensor):
            return _one(args[0].dtype)
        self._calls += 1
        if self._calls % CLOCK == 0 and time.process_time() > self._until:
            raise TooLong
        kwargs = kwargs or {}
        result, cost = self._made(func, args, kwargs)
        if result.__class__ is FakeTensor:
            made = self._enter_storage(result)
        else:
            made = sum([self._enter_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)])
        work = self.work[self._phase]
        work.flops += cost.flops
        work.written += made
        if cost.workspace is not None and without_numbers():
            self._add_temporarily(cost.workspace(*args, **kwargs))
        if made:
            self._keep_moment()
        return result

    def _add_temporarily(self, size: int) -> None:
        """Records a moment with `size` bytes more, and one without them."""
        for sign in (1, -1):
            self.bytes += sign * size
            self._count("scratch", sign * size)
            self._mark()
            self._keep_moment()

    def _made(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Cost]:
        """Returns the result of an operator and what it takes, from the cache or by torch's rules."""
        call = call_of(func, args, kwargs)
        known = None if call is None else _KNOWN.get(call.key)
        if call is not None and known is not None:
            return known.made(self._fake, call.tensors), known.cost
        result = _ANSWERS.get(func, func)(*args, **kwargs)
        count = FLOPS.get(getattr(func, "_overloadpacket", None))
        cost = Cost(0 if count is None else int(count(*args, **kwargs, out_val=result)), WORKSPACES.get(func))
        if call is not None and (known := cacheable_result(call, args, kwargs, result, cost)) is not None:
            if len(_KNOWN) >= MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[call.key] = known
        return result, cost

    def _kind_of(self, tensor: Tensor) -> Kind:
        return "logits" if self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else "scratch"

    def _enter_storage(self, tensor: FakeTensor, kind: Kind | None = None) -> int:
        """Adds the tensor's storage if it is new, as `kind` or by its shape; returns the bytes added."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries or (size := storage.nbytes()) == 0 or tensor.fake_device.type == "meta":  # a shape without memory
            return 0
        kind = kind or self._kind_of(tensor)
        self._entries[key] = size, kind, weakref.ref(storage, lambda _: self._remove(key))
        self.bytes += size
        self._count(kind, size)
        self._mark()
        return size

    def _count(self, kind: str, size: int) -> None:
        self._moment = None
        self.in_use[kind] += size
        if kind not in PERSISTENT and abs(size) < LARGEST_HEAP_PIECE:
            self.heap += size

    def _remove(self, key: int) -> None:
        size, kind, _ = self._entries.pop(key)
        self._count(kind, -size)
        self.bytes -= size

    def _rename(self, tensor: Tensor, kind: Kind) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._entries:
            return
        size, old, watch = self._entries[key]
        self._count(old, -size)
        self._count(kind, size)
        self._entries[key] = size, kind, watch

    def _saved(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            _, kind, _ = self._entries.get(tensor.untyped_storage()._cdata, (0, "base", None))
            if kind not in PERSISTENT:  # a persistent tensor keeps its kind when autograd saves it too
                self._rename(tensor, "saved activations")
        return tensor

    def _mark(self) -> None:
        peak = self.peaks.get(self._phase)
        if self.bytes > (0 if peak is None else peak.bytes):
            self.peaks[self._phase] = self.now

    @property
    def now(self) -> Usage:
        """What is in use."""
        if self._moment is None:
            self._moment = Usage(self.bytes, {kind: size for kind, size in self.in_use.items() if size}, self.heap)
        return self._moment


def known_operators() -> dict[tuple[Any, ...], CachedResult]:
    """The results of operators that this process knows, for `know_operators` in another one."""
    return packed_results(_KNOWN)


def know_operators(packed: Mapping[tuple[Any, ...], CachedResult]) -> None:
    """Adds results that another process of the same program found."""
    if len(_KNOWN) + len(packed) <= MOST_KNOWN:
        _KNOWN.update(unpacked_results(packed))


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, *, products: int, **_: Any
) -> int:
    """FLOPs of attention; under a causal mask only of the scores that count: the kernel skips most of the others."""
    queries, keys = query.shape[-2], key.shape[-2]
    short = min(queries, keys)  # query i attends to the keys up to i
    hidden = short * (keys - 1) - short * (short - 1) // 2 if causal else 0
    seen = queries * keys - hidden
    return products * 2 * query.shape[:-2].numel() * seen * (query.shape[-1] + value.shape[-1]) // 2


def _attention_backward_flops(  # noqa: PLR0917 - as the kernel takes them
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, dropout: float, causal: bool, **__: Any
) -> int:
    return _attention_flops(query, key, value, dropout, causal, products=5)


# FLOPs of an operation, from its arguments and result; torch's own table lacks integers, in-place sums and CPU attention.
FLOPS: Mapping[Any, Callable[..., int]] = ChainMap({
    **flop_registry,
    torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm],
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: partial(_attention_flops, products=2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}, operators.FLOPS)  # and of Lorakeet's own kernels


# Bytes of an operation's workspace, beside its arguments and results.
WORKSPACES: Mapping[Any, Callable[..., int]] = ChainMap({**LAPACK}, operators.WORKSPACES)


def _everywhere(condition: Tensor) -> Tensor:
    """Indices of all elements of `condition` (numel, dims), int64."""
    return condition.new_empty((condition.numel(), condition.dim()), dtype=torch.int64)


def _grouped_product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> Tensor:
    """The result shape of left (tokens, in) times right (groups, in, out); torch's own rule knows only bf16."""
    return left.new_empty(left.shape[0], right.shape[-1])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The result shape of left (n, k) times right (k, m); torch's own rule refuses what does not fit together."""
    fake = isinstance(left, FakeTensor) and isinstance(right, FakeTensor) and left.fake_device == right.fake_device
    if not fake or left.dtype != right.dtype or left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        return cast(Tensor, torch.ops.aten.mm.default(left, right))
    return left.new_empty(left.shape[0], right.shape[1])


def _one_run(values: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None) -> Any:
    """The only value of `values`, since every number is one. With indices, counts or `dim`, torch's own rule answers."""
    if return_inverse or return_counts or dim is not None:
        return torch.ops.aten.unique_consecutive.default(values, return_inverse, return_counts, dim)
    return values.new_empty(1), values.new_empty(0), values.new_empty(0)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compares tensors with numbers; those without are not equal."""
    numbered = not isinstance(one, FakeTensor) and not isinstance(other, FakeTensor)
    return numbered and bool(torch.ops.aten.equal.default(one, other))


def _lifted(numbers: Tensor) -> Tensor:
    """A tensor without numbers, like one of Python's numbers. One number, or a part of a storage, is left to torch's own rule."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode.__class__ is not ShapeMode or numbers.__class__ is not Tensor or numbers.numel() < 2 or numbers.requires_grad:
        return cast(Tensor, LIFT(numbers))
    whole = numbers.is_contiguous() and numbers.untyped_storage().nbytes() == numbers.nbytes and not numbers.is_neg()
    if not whole or numbers.device != CPU:
        return cast(Tensor, LIFT(numbers))
    return mode.new(numbers.shape, numbers.stride(), numbers.dtype, CPU)


@cache
def _promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    with _disable_current_modes():
        return torch.promote_types(one, other)


def _in_place(*_: Any, out: Any = None, L: Any = None, info: Any = None, **__: Any) -> Any:
    """The output of LAPACK in the given tensor, without the copy that torch's own shape rule makes."""
    return out if L is None else (L, info)


_ANSWERS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.linalg_cholesky_ex.L: _in_place,
    torch.ops.aten.cholesky_inverse.out: _in_place,
    torch.ops.aten.nonzero.default: _everywhere,
    torch.ops.aten.unique_consecutive.default: _one_run,
    torch.ops.aten.mm.default: _product,
    torch.ops.aten._grouped_mm.default: _grouped_product,
    torch.ops.aten.equal.default: _equal,
    torch.ops.aten.promote_types.default: _promoted,
    LIFT: _lifted,
}


def _one(dtype: torch.dtype) -> Any:
    """The number that stands for every number."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else cast(Any, 1)
