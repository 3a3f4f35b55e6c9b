"""A ledger of every tensor that a computation holds, kept while it runs on shapes alone: no weights, no arithmetic.

The real code runs, training step and all, on torch's fake tensors: tensors with shape, dtype and device but without memory.
Each operator that makes a new storage is entered, each storage that Python or autograd lets go is struck out, so views are
counted once, in-place results not at all, and what autograd saves for as long as it saves it.

A computation that asks a number of a tensor (`loss.item()`, `bool(isfinite(norm))`) is answered 1, one that asks where
something holds (`torch.where(chosen == expert)`): everywhere, which different numbers follow each other
(`unique_consecutive`): one, and whether two tensors are equal: no. Planned is the run in which all is finite, every gradient
arrives, one expert of a mixture gets every token, and GPTQ's columns are in no order.
"""

from __future__ import annotations

import weakref
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lorakeet.kernels.cpu import operators
from lorakeet.memory.allocator import LARGEST_HEAP_PIECE
from lorakeet.memory.lapack import WORKSPACES as LAPACK
from lorakeet.memory.operator_cache import CachedResult, ShapeMode, cacheable_result, call_of
from lorakeet.memory.usage import NO_BLOCK, PERSISTENT, Usage, UsageSegment

MOST_KNOWN = 1 << 13  # calls, of 1.4 KiB each; beyond these all are forgotten
_KNOWN: dict[tuple[Any, ...], CachedResult] = {}  # what calls have made, by all ledgers of this process
Kind = Literal["base", "adapter", "moments", "gradients", "saved activations", "logits", "scratch"]


@dataclass
class Work:
    """What one phase computes and moves: FLOPs of matrix products (2 a multiplication with addition), bytes of results."""

    flops: int = 0
    written: int = 0


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context: runs what is in it on fake tensors and keeps the account. `vocabulary` tells logits by their width.

    `peaks` and `work` are by the name of the phase; a phase's peak counts what was there before it began. `stretches` are all
    moments of the run, where its blocks are watched.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.held: Counter[str] = Counter()
        self.bytes = 0
        self.heap = 0
        self.peaks: dict[str, Usage] = {}
        self.work: dict[str, Work] = defaultdict(Work)
        self.segments: list[UsageSegment] = []
        self._phase = ""
        self._entries: dict[int, tuple[int, str, weakref.ref[Any]]] = {}  # storage → bytes, kind, and the watch on its end
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._fake = ShapeMode()
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._saved, _same)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, so that torch need not see to it at every call."""
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
        """A stretch of the run with a peak of its own. Phases do not nest; the same name again raises that phase's peak."""
        before, self._phase = self._phase, name
        self._mark()
        self._start_segment("phase", NO_BLOCK)
        try:
            yield
        finally:
            self._phase = before
            self._start_segment("phase", NO_BLOCK)

    def name(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Says what these tensors are; until then a result is scratch."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self._enter_storage(tensor, kind)
                self._rename(tensor, kind)
        self._keep_moment()

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts what arrives in `.grad` of these as gradients."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.name("gradients", [parameter.grad])

        for parameter in parameters:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]

    def watch_blocks(self, blocks: Sequence[nn.Module]) -> None:
        """Keeps every moment from now on in `stretches`, with marks where the passes of these blocks begin and end."""
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
            self.segments[-1].moments.append(self._now())

    def close(self) -> None:
        """Takes the hooks off parameters and blocks again."""
        while self._hooks:
            self._hooks.pop().remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # a fifth of all calls
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _one(args[0].dtype)
        kwargs = kwargs or {}
        result, flops = self._made(func, args, kwargs)
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        made = sum([self._enter_storage(leaf) for leaf in leaves if isinstance(leaf, FakeTensor)])
        work = self.work[self._phase]
        work.flops += flops
        work.written += made
        if func in WORKSPACES:
            self._pass_by(WORKSPACES[func](*args, **kwargs))
        if made:
            self._keep_moment()
        return result

    def _pass_by(self, size: int) -> None:
        """A moment with `size` bytes more, which are gone when it ends."""
        for sign in (1, -1):
            self.bytes += sign * size
            self._count("scratch", sign * size)
            self._mark()
            self._keep_moment()

    def _made(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """What an operator makes, and the FLOPs of its products: as of the same call before, or by torch's rules."""
        call = call_of(func, args, kwargs)
        known = None if call is None else _KNOWN.get(call.key)
        if call is not None and known is not None:
            return known.made(self._fake, call.tensors), known.flops
        result = _ANSWERS.get(func, func)(*args, **kwargs)
        count = FLOPS.get(getattr(func, "_overloadpacket", None))
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
        if call is not None and (known := cacheable_result(call, args, kwargs, result, flops)) is not None:
            if len(_KNOWN) >= MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[call.key] = known
        return result, flops

    def _kind_of(self, tensor: Tensor) -> Kind:
        return "logits" if self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else "scratch"

    def _enter_storage(self, tensor: FakeTensor, kind: Kind | None = None) -> int:
        """Enters the tensor's storage if it is new, as `kind` or as what its shape tells; the bytes that it adds."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._entries or size == 0 or tensor.fake_device.type == "meta":  # a shape whose numbers are elsewhere
            return 0
        kind = kind or self._kind_of(tensor)
        self._entries[key] = size, kind, weakref.ref(storage, lambda _: self._strike(key))
        self.bytes += size
        self._count(kind, size)
        self._mark()
        return size

    def _count(self, kind: str, size: int) -> None:
        self.held[kind] += size
        if kind not in PERSISTENT and abs(size) < LARGEST_HEAP_PIECE:
            self.heap += size

    def _strike(self, key: int) -> None:
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
            if kind not in PERSISTENT:  # a tensor of these stays what it is when autograd saves it too
                self._rename(tensor, "saved activations")
        return tensor

    def _mark(self) -> None:
        if self.bytes > self.peaks.get(self._phase, Usage()).bytes:
            self.peaks[self._phase] = self._now()

    def _now(self) -> Usage:
        return Usage(self.bytes, {kind: size for kind, size in self.held.items() if size}, self.heap)


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, *, products: int, **_: Any
) -> int:
    """FLOPs of the scores and their use; under a causal mask of those that count: the kernel leaves out most of the others."""
    queries, keys = query.shape[-2], key.shape[-2]
    short = min(queries, keys)  # query i sees the keys up to i, whichever are more
    hidden = short * (keys - 1) - short * (short - 1) // 2 if causal else 0
    seen = queries * keys - hidden
    return products * 2 * query.shape[:-2].numel() * seen * (query.shape[-1] + value.shape[-1]) // 2


def _attention_backward_flops(  # noqa: PLR0917 - as the kernel takes them
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, dropout: float, causal: bool, **__: Any
) -> int:
    return _attention_flops(query, key, value, dropout, causal, products=5)


# Of an aten operation and its result; torch itself leaves out integers, sums in place, and attention on a CPU.
FLOPS: Mapping[Any, Callable[..., int]] = ChainMap({
    **flop_registry,
    torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm],
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: partial(_attention_flops, products=2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}, operators.FLOPS)  # and of Lorakeet's own kernels


# Of an operation's arguments: what it holds while it runs, beside these and its results.
WORKSPACES: Mapping[Any, Callable[..., int]] = ChainMap({**LAPACK}, operators.WORKSPACES)


def _everywhere(condition: Tensor) -> Tensor:
    """Every place of `condition` (numel, dims), int64."""
    return condition.new_empty((condition.numel(), condition.dim()), dtype=torch.int64)


def _grouped_product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> Tensor:
    """The shape of left (tokens, in) times right (groups, in, out), which torch's own rule gives for bf16 alone."""
    return left.new_empty(left.shape[0], right.shape[-1])


def _one_run(values: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None) -> Any:
    """The only number that `values` has, since every number is one. Who asks for places or counts gets no answer."""
    if return_inverse or return_counts or dim is not None:
        return torch.ops.aten.unique_consecutive.default(values, return_inverse, return_counts, dim)
    return values.new_empty(1), values.new_empty(0), values.new_empty(0)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tensors with numbers are compared; those without are not equal."""
    numbered = not isinstance(one, FakeTensor) and not isinstance(other, FakeTensor)
    return numbered and bool(torch.ops.aten.equal.default(one, other))


def _in_place(*_: Any, out: Any = None, L: Any = None, info: Any = None, **__: Any) -> Any:
    """What LAPACK writes where it is told to, without the copy that torch's own rule for shapes makes."""
    return out if L is None else (L, info)


_ANSWERS = {
    torch.ops.aten.linalg_cholesky_ex.L: _in_place,
    torch.ops.aten.cholesky_inverse.out: _in_place,
    torch.ops.aten.nonzero.default: _everywhere,
    torch.ops.aten.unique_consecutive.default: _one_run,
    torch.ops.aten._grouped_mm.default: _grouped_product,
    torch.ops.aten.equal.default: _equal,
}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _one(dtype: torch.dtype) -> Any:
    """The number that stands for every number."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else cast(Any, 1)
