"""The library's functions as operators of torch, which a rehearsal on shapes sees, and whether tensors are for them.

States are bf16, contiguous, on the CPU: (tokens, heads, d) where heads are told apart, d a multiple of 64; else (…, width), the
width a multiple of 16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name

from lorakeet.kernels.cpu.compile import library
from lorakeet.kernels.device import is_cpu

READ = (Tensor, nn.Parameter)  # whose numbers lie where they say
PLAIN = (*READ, FakeTensor)
LANES, HEAD = 16, 64
GROUPS = 8  # of rows, at most, whose work is parted backward
FEW = 256  # tokens of a prefix, over all groups but the first, up to which it does not matter that each sums its own
WORK = 32  # parts of the work, of heads and groups of rows, of which threads have enough
PARTS = 12  # of that work; with as many, or all groups of rows, heads that share keys stay together, else each is by itself

_DEFINED = torch.library.Library("lorakeet", "FRAGMENT")  # type: ignore[no-untyped-call]
_used: ContextVar[bool] = ContextVar("used", default=True)  # of a thread: others may compute meanwhile


class AttentionShape(ctypes.Structure):
    """As attention.h has it; `held` are the numbers that it points to."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "prefix", "tokens", "heads", "kv", "d", "parts", "groups")),
        ("scale", ctypes.c_float),
    )


@contextmanager
def without() -> Iterator[None]:
    """A context in which torch's own operations compute; but what was laid out for the library, weights and pairs that tokens are
    written with, is multiplied by it."""
    before = _used.set(False)
    try:
        yield
    finally:
        _used.reset(before)


def in_use() -> bool:
    """Whether the library is there, and to be used in this thread."""
    return _used.get() and library() is not None


def serves(products: torch.dtype, *states: Tensor, width: int = LANES) -> bool:
    """Whether the operators are to compute with these states, where matrix products run in `products`."""
    if not _used.get() or products != torch.bfloat16:
        return False
    fit = (type(x) in PLAIN and x.dtype == torch.bfloat16 and is_cpu(x.device) and x.is_contiguous() for x in states)
    return all(fit) and all(x.shape[-1] % width == 0 for x in states) and library() is not None


def _laid(rows: Sequence[int], prefix: int) -> tuple[list[int], list[int], int]:
    """Where each row begins and how many tokens are its own, the prefix being the first one's; the most keys that a row sees."""
    lengths = [prefix + rows[0], *rows[1:]]
    starts = [0, *accumulate(lengths[:-1])]
    return starts, lengths, max(lengths[0], prefix + max(rows))


def _shape(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], prefix: int, scale: float) -> tuple[AttentionShape, int]:
    """What attention.c is told, and the bytes of scratch that each thread needs."""
    (tokens, heads, d), kv = q.shape, k.shape[1]
    if k.shape != (tokens, kv, d) or v.shape != k.shape:
        shapes = f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
        raise ValueError(f"keys and values are no rows of the queries' tokens and heads: {shapes}")
    return shape_of(rows, prefix, scale, (tokens, heads, kv, d)), _scratch_of_thread(_laid(rows, prefix)[2], d)


def shape_of(rows: Sequence[int], prefix: int, scale: float, states: tuple[int, int, int, int]) -> AttentionShape:
    """What attention.c is told of rows of `states`: so many tokens, query heads, key heads, numbers of a head."""
    starts, lengths, _ = _laid(rows, prefix)
    tokens, heads, kv, d = states
    if heads % kv or d % HEAD or min(lengths) < 0 or sum(lengths) > tokens:
        shapes = f"{tokens} tokens, {heads} heads over {kv}, of {d} numbers, a prefix of {prefix}"
        raise ValueError(f"rows of {list(rows)} tokens are no rows of {shapes}, in whole groups and heads of {HEAD} numbers")
    if not scale > 0:
        raise ValueError(f"scores are multiplied by {scale}; attention.c takes a factor above 0")
    array = ctypes.c_int64 * len(rows)
    held = array(*starts), array(*lengths)
    addresses = (ctypes.cast(each, ctypes.c_void_p) for each in held)
    parts, groups = _parts(heads, kv, rows), _groups(rows, prefix, kv)
    shape = AttentionShape(*addresses, len(rows), prefix, tokens, heads, kv, d, parts, groups, scale)
    shape.held = held
    return shape


def _parts(heads: int, kv: int, rows: Sequence[int]) -> int:
    return kv if len(rows) >= GROUPS or kv * len(rows) >= PARTS else heads


def _groups(rows: Sequence[int], prefix: int, kv: int) -> int:
    """All but the first sum by themselves what their rows add to a prefix: of a long one, no more than there are tokens, and in
    no more groups than make enough parts."""
    most = min(len(rows), GROUPS)
    if (most - 1) * prefix <= FEW:
        return most
    return min(most, -(-WORK // kv), 1 + (prefix + sum(rows)) // prefix)


def _most_of_prefixes(tokens: int, kv: int) -> int:
    """The most tokens of a prefix that all groups sum by themselves, whatever rows of so many tokens share."""
    return max(FEW, tokens if kv < WORK else 0)


def _threads(parts: int) -> int:
    """How many threads compute: no more than there are parts of the work, since each has scratch."""
    return min(torch.get_num_threads(), parts)


def _scratch_of_thread(longest: int, d: int) -> int:
    return int(loaded().attention_scratch(ctypes.c_int64(longest), ctypes.c_int64(d)))


def pointers(*tensors: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[ctypes.c_void_p]:
    """Where they are; ValueError for tensors that C cannot read so."""
    if any(tensor.dtype != dtype or not tensor.is_contiguous() for tensor in tensors):
        given = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]
        raise ValueError(f"the operator takes contiguous tensors of {dtype}, and was given {given}")
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def row_attention(q: Tensor, k: Tensor, v: Tensor, rows: list[int], prefix: int, scale: float) -> tuple[Tensor, Tensor]:
    """O (tokens, heads, d) and the logs, to base 2, of the sums (heads, tokens) of q, and k and v (tokens, kv, d).

    `rows` are the lengths behind a prefix that all of them see; tokens behind the last one get zeros.
    """
    shape, room = _shape(q, k, v, rows, prefix, scale)
    threads = _threads(shape.heads * shape.rows)
    out, logs = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    out[prefix + sum(rows) :] = 0
    scratch = torch.empty(threads * room, dtype=torch.uint8)
    given = *pointers(q, k, v, out), *pointers(logs, dtype=torch.float32), *pointers(scratch, dtype=torch.uint8)
    loaded().attention_forward(ctypes.byref(shape), *given, threads)
    return out, logs


def row_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *laid: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and ∂V in the shapes of q, k and v, from what `row_attention` was given (`laid`: rows, prefix, scale) and gave."""
    rows, prefix, scale = laid
    shape, room = _shape(q, k, v, rows, prefix, scale)
    threads = _threads(shape.parts * shape.groups)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grads[0][prefix + sum(rows) :] = 0
    sums = torch.empty(2, shape.parts, len(q), q.shape[2])
    of_prefix = torch.empty(2, shape.parts, shape.groups - 1, prefix, q.shape[2])
    scratch = torch.empty(threads * room, dtype=torch.uint8)
    narrow, wide = pointers(q, k, v, out, grad, *grads), pointers(logs, sums, of_prefix, dtype=torch.float32)
    given = *narrow[:4], wide[0], *narrow[4:], *wide[1:], *pointers(scratch, dtype=torch.uint8)
    loaded().attention_backward(ctypes.byref(shape), *given, threads)
    return grads


def workspace(q: Tensor, k: Tensor, v: Tensor, rows: list[int], prefix: int, scale: float) -> int:
    """Bytes that `row_attention` holds for as long as it computes."""
    return _threads(q.shape[1] * len(rows)) * _scratch_of_thread(_laid(rows, prefix)[2], q.shape[2])


def workspace_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *laid: Any) -> int:
    """The most that `row_attention_backward` holds, whose sums are fp32, whatever rows of so many tokens share: a plan, which
    asks, does not know."""
    rows, prefix, _ = laid
    (tokens, heads, d), kv = q.shape, k.shape[1]
    parts, groups = _parts(heads, kv, rows), _groups(rows, prefix, kv)
    scratch = _threads(parts * groups) * _scratch_of_thread(_laid(rows, prefix)[2], d)
    return int(scratch + 8 * parts * (tokens + max((groups - 1) * prefix, _most_of_prefixes(tokens, kv))) * d)


def flops(q: Tensor, k: Tensor, v: Tensor, rows: list[int], prefix: int, scale: float, **_: Any) -> int:
    """Of the two products of `row_attention`, of the scores that the causal mask lets through."""
    return 4 * scores_of(rows, prefix) * q.shape[1] * q.shape[2]


def scores_of(rows: Sequence[int], prefix: int) -> int:
    """How many scores of a head the causal mask lets through."""
    return sum(length * (length + 1) // 2 for length in (prefix + rows[0], *rows[1:])) + prefix * sum(rows[1:])


def flops_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *laid: Any, **_: Any) -> int:
    """Of the five products of `row_attention_backward`."""
    rows, prefix, scale = laid
    return 5 * flops(q, k, v, rows, prefix, scale) // 2


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y = w ∘ (x·ρ) and ρ = 1/√(mean(x²) + ε) (…, 1) in fp32, of x (…, width) and w (width,)."""
    y, rho = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
    loaded().norm(*pointers(x, weight), ctypes.c_float(epsilon), *pointers(y), *pointers(rho, dtype=torch.float32), *_sizes(x))
    return y, rho


def norm_again(x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """The y of `norm`, to the last bit, from its ρ."""
    y = torch.empty_like(x)
    loaded().norm_again(*pointers(x), *pointers(rho, dtype=torch.float32), *pointers(weight, y), *_sizes(x))
    return y


def norm_backward(grad: Tensor, x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)), x̂ = x·ρ."""
    found = torch.empty_like(x)
    loaded().norm_backward(*pointers(grad, x), *pointers(rho, dtype=torch.float32), *pointers(weight, found), *_sizes(x))
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up."""
    inner = torch.empty_like(gate)
    loaded().gated(*pointers(gate, up, inner), ctypes.c_int64(gate.numel()), torch.get_num_threads())
    return inner


def gated_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """With the gradient of `gated`: writes ∂gate and ∂up into gate and up, and what `gated` gave into `grad`."""
    loaded().gated_backward(*pointers(gate, up, grad), ctypes.c_int64(gate.numel()), torch.get_num_threads())


def turn_(states: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Turns (tokens, heads, head) by the angles (tokens, head), or back, in place: core/fused/attention.turned."""
    tokens, heads, head = states.shape
    sizes = (ctypes.c_int64(size) for size in (tokens, heads, head // 2))
    loaded().turn(*pointers(states, cos, sin), *sizes, int(back), torch.get_num_threads())


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, int]:
    """Tokens, width and threads."""
    return ctypes.c_int64(x.numel() // x.shape[-1]), ctypes.c_int64(x.shape[-1]), torch.get_num_threads()


def loaded() -> ctypes.CDLL:
    """The library, where `serves` or `in_use` has said that it is there."""
    found = library()
    assert found is not None
    return found


def define(schema: str, function: Callable[..., Any], shapes: Callable[..., Any], key: str = "CPU") -> Any:
    """The operator `schema` of torch, computed by `function` (for torch's dispatch `key`), whose results have the shapes that
    `shapes` makes."""
    name = schema.partition("(")[0]
    _DEFINED.define(schema)  # type: ignore[no-untyped-call]
    _DEFINED.impl(name, function, key)  # type: ignore[no-untyped-call]
    _DEFINED.impl(name, shapes, "Meta")  # type: ignore[no-untyped-call]
    return getattr(torch.ops.lorakeet, name).default


def attention_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Of an attention over q (tokens, heads, d): its result, and the logs of the sums (heads, tokens)."""
    return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


def attention_backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and ∂V."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_STATES, _LAID = "Tensor q, Tensor k, Tensor v", "int[] rows, int prefix, float scale"
ROW_ATTENTION = define(
    f"row_attention({_STATES}, {_LAID}) -> (Tensor, Tensor)",
    row_attention,
    attention_shapes,
)
ROW_ATTENTION_BACKWARD = define(
    f"row_attention_backward(Tensor grad, {_STATES}, Tensor out, Tensor logs, {_LAID}) -> (Tensor, Tensor, Tensor)",
    row_attention_backward,
    attention_backward_shapes,
)
NORM = define(
    "norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    norm,
    lambda x, *_: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
)
NORM_AGAIN = define("norm_again(Tensor x, Tensor rho, Tensor weight) -> Tensor", norm_again, lambda x, *_: torch.empty_like(x))
NORM_BACKWARD = define(
    "norm_backward(Tensor grad, Tensor x, Tensor rho, Tensor weight) -> Tensor",
    norm_backward,
    lambda grad, x, *_: torch.empty_like(x),
)
GATED = define("gated(Tensor gate, Tensor up) -> Tensor", gated, lambda gate, _: torch.empty_like(gate))
GATED_BACKWARD = define(
    "gated_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor(c!) grad) -> ()", gated_backward_, lambda *_: None
)
TURN = define("turn_(Tensor(a!) states, Tensor cos, Tensor sin, bool back) -> ()", turn_, lambda *_: None)
