"""What operators make of tensors without numbers, remembered: the same operator on the same shapes makes the same again.

A rehearsal calls a few thousand different operators and shapes a hundred thousand times, and torch's rules for shapes take longer
over a call than everything else in it. Remembered is which tensors of a result are new, and of what shape, which are views of an
argument, and which are an argument itself. A call whose result may hang on more than shapes and numbers given is not remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # torch offers no public name

PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


class ShapeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """The mode to which fake tensors belong; a copied module's tensors belong to the same one.

    It remembers no results: that is done here, and takes less time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache_enabled = False
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of a fake tensor as torch makes it

    def __deepcopy__(self, memo: dict[int, Any]) -> ShapeMode:
        return self

    def tensor(self, bare: Tensor, device: torch.device) -> FakeTensor:
        """The fake tensor of a `bare` one on the meta device, in a quarter of the time that torch's own constructor takes."""
        if device not in self._attributes:
            first = FakeTensor(self, bare, device)
            self._attributes[device] = dict(vars(first))
            return first
        found = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device)
        vars(found).update(self._attributes[device])
        return found


class OperatorCall(NamedTuple):
    """An operator with its arguments: all that its result hangs on, and the tensors among the arguments, in their order."""

    key: tuple[Any, ...]
    tensors: list[FakeTensor]


class CachedResult(NamedTuple):
    """What a call makes, and the FLOPs of its products."""

    results: tuple[_One | None, ...]
    kind: type | None  # list or tuple; None where it is one tensor
    flops: int

    def made(self, mode: ShapeMode, tensors: Sequence[FakeTensor]) -> Any:
        """The result of the same call with other tensors of these shapes."""
        found = [None if one is None else one.made(mode, tensors) for one in self.results]
        return found[0] if self.kind is None else self.kind(found)


class _One(NamedTuple):
    """A tensor of a result: new, or in the memory of the argument of this number, or that argument itself."""

    argument: int | None
    itself: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    def made(self, mode: ShapeMode, tensors: Sequence[FakeTensor]) -> FakeTensor:
        if self.itself:
            return tensors[self.argument or 0]
        with torch._C._DisableTorchDispatch():
            bare = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            if self.argument is not None:
                bare.set_(tensors[self.argument].untyped_storage(), self.offset, self.shape, self.stride)
        return mode.tensor(bare, self.device)


class _Untold(Exception):
    """There is more to an argument, or to a result, than is told here."""


def call_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> OperatorCall | None:
    """The call; None where one of its tensors has numbers or is no plain one, or where what it makes would have numbers.

    The latter is so without tensors while torch's mode for fake ones is left for a moment (`unset_fake_temporarily`).
    """
    tensors: list[FakeTensor] = []
    try:
        told = _told(args, tensors)
        named = tuple([(name, _told(value, tensors)) for name, value in kwargs.items()])
    except _Untold:
        return None
    if not tensors and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
        return None
    return OperatorCall((func, torch.get_default_dtype(), told, named), tensors)


def _told(value: Any, tensors: list[FakeTensor]) -> Any:
    """What is told of an argument; the tensors in it go into `tensors`."""
    if isinstance(value, FakeTensor):
        tensors.append(value)
        return _shape_of(value)
    if isinstance(value, (list, tuple)):
        return tuple([_told(item, tensors) for item in value])
    if value.__class__ not in PLAIN:
        raise _Untold
    return value.__class__, value  # 1 and 1.0 are equal, but make different dtypes


def _shape_of(tensor: FakeTensor) -> tuple[Any, ...]:
    if tensor.constant is not None or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise _Untold
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device, tensor.requires_grad


def cacheable_result(
    call: OperatorCall, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, flops: int
) -> CachedResult | None:
    """What there is to remember of `call` once it has made `result`; None where the same call might make another one."""
    after = call_of(call.key[0], args, kwargs)
    if after is None or after.key != call.key or torch.Tag.inplace_view in call.key[0].tags:
        return None  # it gave an argument another shape, or other memory
    kind = type(result) if isinstance(result, (list, tuple)) else None
    found = result if kind else [result]
    try:
        results = tuple([_one(item, call.tensors) for item in found])
    except _Untold:
        return None
    new = [item for item, one in zip(found, results, strict=True) if one is not None and one.argument is None]
    apart = len({item.untyped_storage()._cdata for item in new}) == len(new)
    return CachedResult(results, kind, flops) if apart else None


def _one(result: Any, tensors: Sequence[FakeTensor]) -> _One | None:
    """What there is to remember of a tensor of a result of these `tensors`."""
    if result is None:
        return None
    if not isinstance(result, FakeTensor):
        raise _Untold
    storage = result.untyped_storage()
    shape, stride, offset, dtype, device, wants_gradient = _shape_of(result)
    places = [place for place, tensor in enumerate(tensors) if tensor is result]
    itself = bool(places)
    if not itself:
        places = [place for place, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage._cdata]
    if len(places) > 1 or (wants_gradient and not itself):  # which of these arguments it is cannot be told
        raise _Untold
    if not places and (offset or storage.nbytes() != _bytes(shape, stride, dtype)):  # a part of something larger
        raise _Untold
    return _One(places[0] if places else None, itself, tuple(shape), stride, offset, dtype, device)


def _bytes(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """How long the memory is that such a tensor needs."""
    if 0 in shape:
        return 0
    return dtype.itemsize * (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)))
