"""Caches the results of operators on tensors without numbers: the same operator on the same shapes has the same result.

A rehearsal makes a hundred thousand calls with a few thousand different operators and shapes, and torch's shape rules take most
of the time of a call. The cache keeps which tensors of a result are new, with their shapes, which are views of an argument and
which are the argument itself. A call whose result may depend on more than shapes and given numbers is not cached.
Where a tensor begins in its storage counts for operators that make views alone: code that walks over tokens would be new at each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # torch offers no public name

NUMBERS = frozenset((int, float, bool))  # 1, 1.0 and True are equal, but make different dtypes
PLAIN = frozenset((str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


META = torch.device("meta")


class ShapeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode of fake tensors; those of a copied module belong to the same one.

    torch's own cache of results is off: the one in this file is faster.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache_enabled = False
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of a fake tensor as torch makes it

    def __deepcopy__(self, memo: dict[int, Any]) -> ShapeMode:
        return self

    def tensor(self, bare: Tensor, device: torch.device) -> FakeTensor:
        """Returns the fake tensor of a `bare` meta tensor, in a quarter of the time of torch's own constructor."""
        if device not in self._attributes:
            first = FakeTensor(self, bare, device)
            self._attributes[device] = dict(vars(first))
            return first
        found = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device)
        vars(found).update(self._attributes[device])
        return found

    def new(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> FakeTensor:
        """Returns a fake tensor with a storage of its own."""
        with torch._C._DisableTorchDispatch():
            bare = torch.empty_strided(shape, stride, dtype=dtype, device=META)
        return self.tensor(bare, device)

    def view(
        self, of: FakeTensor, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype, device: torch.device
    ) -> FakeTensor:
        """Returns a fake tensor in the storage of another."""
        with torch._C._DisableTorchDispatch():
            bare = torch.empty(0, dtype=dtype, device=META)
            bare.set_(of.untyped_storage(), offset, shape, stride)
        return self.tensor(bare, device)


class OperatorCall(NamedTuple):
    """An operator call: the key that determines its result, and the tensors among its arguments, in order."""

    key: tuple[Any, ...]
    tensors: list[FakeTensor]


class Cost(NamedTuple):
    """What a call takes: the FLOPs of its matrix products, and the function for the bytes of its workspace, if it has one."""

    flops: int = 0
    workspace: Callable[..., int] | None = None


class CachedResult(NamedTuple):
    """The result of a call, and what it takes."""

    results: tuple[_One | None, ...]
    kind: type | None  # list or tuple; None where it is one tensor
    cost: Cost

    def made(self, mode: ShapeMode, tensors: Sequence[FakeTensor]) -> Any:
        """Returns the result of the same call with other tensors of the same shapes."""
        if self.kind is None:
            one = self.results[0]
            return None if one is None else one.made(mode, tensors)
        return self.kind([None if one is None else one.made(mode, tensors) for one in self.results])


class _One(NamedTuple):
    """A tensor of a result: new, or a view of the argument of this number, or that argument itself."""

    argument: int | None
    itself: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @property
    def is_view(self) -> bool:
        return self.argument is not None and not self.itself

    def made(self, mode: ShapeMode, tensors: Sequence[FakeTensor]) -> FakeTensor:
        if self.itself:
            return tensors[self.argument or 0]
        if self.argument is None:
            return mode.new(self.shape, self.stride, self.dtype, self.device)
        return mode.view(tensors[self.argument], self.shape, self.stride, self.offset, self.dtype, self.device)


class _NotCacheable(Exception):
    """An argument or a result is more than shapes and plain numbers describe."""


def call_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> OperatorCall | None:
    """Returns the call; None if a tensor of it has numbers or is not a plain one, or if its result would have numbers.

    A call without tensors has, while torch's fake mode is unset (`unset_fake_temporarily`).
    """
    tensors: list[FakeTensor] = []
    shape = _shape_of if makes_views(func) else _shape_within
    try:
        positional = tuple([_key_of(value, tensors, shape) for value in args])
        named = tuple([(name, _key_of(value, tensors, shape)) for name, value in kwargs.items()]) if kwargs else ()
    except _NotCacheable:
        return None
    if not tensors and not without_numbers():
        return None
    same = _places(tensors) if len(tensors) > 1 else None
    return OperatorCall((func, torch.get_default_dtype(), positional, named, same), tensors)


def without_numbers() -> bool:
    """Whether new tensors are without numbers; small copies of modules are compared with numbers within a rehearsal."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _places(tensors: Sequence[FakeTensor]) -> tuple[int, ...] | None:
    """The first place of each tensor, where one is given twice: a result may be that one."""
    ids = [id(tensor) for tensor in tensors]
    return None if len(set(ids)) == len(ids) else tuple([ids.index(one) for one in ids])


@cache
def makes_views(func: Any) -> bool:
    """True if a result of the operator may be a view of an argument, or if it may move an argument within a storage."""
    returned = [each.alias_info for each in func._schema.returns]
    shared = any(alias is not None and not alias.is_write for alias in returned)
    return shared or func._overloadpacket.__name__ in ("_unsafe_view", "set_")


def _key_of(value: Any, tensors: list[FakeTensor], shape: Callable[[FakeTensor], tuple[Any, ...]]) -> Any:
    """Returns the part of a key for an argument; appends its tensors, which `shape` describes, to `tensors`."""
    kind = value.__class__
    if kind is FakeTensor:
        tensors.append(value)
        return shape(value)
    if kind in NUMBERS:
        return kind, value
    if kind in PLAIN:
        return value
    if kind is torch.Generator:  # which a call on shapes leaves as it is
        return kind, value.device
    if not isinstance(value, (list, tuple)):
        raise _NotCacheable
    return tuple([_key_of(item, tensors, shape) for item in value])


def _shape_of(tensor: FakeTensor) -> tuple[Any, ...]:
    if tensor.constant is not None or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise _NotCacheable
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device, tensor.requires_grad


def _shape_within(tensor: FakeTensor) -> tuple[Any, ...]:
    """The same, wherever it begins."""
    if tensor.constant is not None or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise _NotCacheable
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device, tensor.requires_grad


def cacheable_result(
    call: OperatorCall, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, cost: Cost
) -> CachedResult | None:
    """Returns what is cached of `call` and its `result`; None if the same call might have another result."""
    after = call_of(call.key[0], args, kwargs)
    if after is None or after.key != call.key or torch.Tag.inplace_view in call.key[0].tags:
        return None  # it changed the shape or memory of an argument
    kind = type(result) if isinstance(result, (list, tuple)) else None
    found = result if kind else [result]
    try:
        results = tuple([_one(item, call.tensors) for item in found])
        if not makes_views(call.key[0]) and any(one is not None and one.is_view for one in results):
            return None  # whose place may be another next time
    except _NotCacheable:
        return None
    new = [item for item, one in zip(found, results, strict=True) if one is not None and one.argument is None]
    apart = len({item.untyped_storage()._cdata for item in new}) == len(new)
    return CachedResult(results, kind, cost) if apart else None


def _one(result: Any, tensors: Sequence[FakeTensor]) -> _One | None:
    """Returns what is cached of one tensor of a result of these `tensors`."""
    if result is None:
        return None
    if not isinstance(result, FakeTensor):
        raise _NotCacheable
    storage = result.untyped_storage()
    shape, stride, offset, dtype, device, wants_gradient = _shape_of(result)
    sources = [number for number, tensor in enumerate(tensors) if tensor is result]
    itself = bool(sources)
    if itself:
        sources = sources[:1]  # another place of the same tensor is a part of the key
    else:
        sources = [number for number, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage._cdata]
    if len(sources) > 1 or (wants_gradient and not itself):  # it could be any of these arguments
        raise _NotCacheable
    if not sources and (offset or storage.nbytes() != _bytes(shape, stride, dtype)):  # a part of something larger
        raise _NotCacheable
    return _One(sources[0] if sources else None, itself, tuple(shape), stride, offset, dtype, device)


def _bytes(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """Returns the bytes of memory that such a tensor spans."""
    if 0 in shape:
        return 0
    return dtype.itemsize * (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)))


def packed_results(known: Mapping[tuple[Any, ...], CachedResult]) -> dict[tuple[Any, ...], CachedResult]:
    """The results in a form for another process: operators by name. Those that need a workspace are left out."""
    return {(str(key[0]), *key[1:]): one for key, one in known.items() if one.cost.workspace is None}


def unpacked_results(packed: Mapping[tuple[Any, ...], CachedResult]) -> dict[tuple[Any, ...], CachedResult]:
    """What `packed_results` was made of, as far as this process has the operators."""
    operators = {name: _operator_of(name) for name in {key[0] for key in packed}}
    return {(operators[key[0]], *key[1:]): one for key, one in packed.items() if operators[key[0]] is not None}


def _operator_of(name: str) -> Any:
    """The operator of such a name as "aten.mm.default"; None if there is none."""
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
