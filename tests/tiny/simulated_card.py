"""A CUDA device that is not there, with real numbers: what lies on it is computed by the CPU, and says that it is on cuda:0.

    with simulated_card() as card:
        finetune(…)  # model.device cuda
    card.waits      every time that the host waited for the device, with its kind and its line in the package
    card.launches   operations that launch kernels, by name; card.copies: bytes that went over, by their way
    card.largest    bytes of the largest tensor that was made

Operations on tensors of several devices raise as torch does. A backward pass computes in a thread of its own, as on a CUDA
device, so that no context variable of the caller is seen there. Attention is torch's kernel by its definition (tiny/flash).
Operators without a kernel for a device are refused, and what torch's code for CUDA takes otherwise than that for the CPU: whole
numbers in products, generators and numbers of the host, gradients laid out otherwise than parameters. Streams and the order of
what they do are not simulated (tiny/cards); its time is that of the host.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lorakeet.core.layers import grouped_experts
from lorakeet.core.scratch import SCRATCH
from lorakeet.kernels import blockwise_rows, choose, efficient_varlen, flash_varlen, row_sinks
from lorakeet.quant import nf4
from lorakeet.train import optimizer
from tiny.flash import Flash
from tiny.simulated_streams import Event, Stream

CUDA, BELOW = torch.device("cuda", 0), torch.device("meta")  # what it says, and what torch's own code takes it for
PACKAGE = "/lorakeet/"
TOTAL = 80 << 30  # bytes
READS = {  # operations whose result the host needs, or whose size it has to know
    "_local_scalar_dense": "a number is read", "nonzero": "places are counted", "masked_select": "places are counted",
    "_unique2": "values are counted", "unique_dim": "values are counted", "unique_consecutive": "values are counted",
    "equal": "a number is read", "is_nonzero": "a number is read", "bincount": "values are counted",
}  # fmt: skip
QUIET = frozenset((  # operations that launch nothing
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "unbind", "detach", "alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided", "unfold",
    "new_empty_strided", "device", "_local_scalar_dense", "_reshape_alias", "lift_fresh", "is_same_size", "diagonal", "chunk",
    "narrow", "view_as_real", "view_as_complex", "is_pinned", "_pin_memory", "_conj", "_neg_view",
))  # fmt: skip
GROUPED = (9, 10)  # of compute capabilities, on which torch's grouped product takes its ends from the card, in bf16 alone
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
INITIALISING = (  # what torch.cuda answers only once CUDA is initialised, which it then does
    "current_device", "get_device_capability", "get_device_name", "get_device_properties", "mem_get_info", "get_rng_state",
    "get_rng_state_all", "set_rng_state", "current_stream", "default_stream", "synchronize", "init",
    "set_per_process_memory_fraction",
)  # fmt: skip
BUILT = ("_cuda_getCurrentRawStream",)  # which only torch for CUDA has, and bitsandbytes takes where a device is there
READ = ("numpy", "__array__", "tolist", "untyped_storage", "data_ptr", "storage", "get_device")
OWN = (flash_varlen, efficient_varlen, blockwise_rows)  # modules whose operators are for every device
OVER = ("_to_copy", "copy_", "lift_fresh", "set_")  # operations that take tensors of two devices
WHOLE = ("stack", "cat", "searchsorted", "bucketize", "index_select", "gather", "scatter", "scatter_", "scatter_add",
         "scatter_add_", "index_add", "index_add_", "index_copy", "index_copy_")  # which take no number from the host either
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "dot")
LAZY = {"aten::_conj": torch.conj_physical, "aten::_neg_view": torch.neg}
IN_C = "/lorakeet/kernels/cpu/"  # code that passes addresses on to C
FLASH = {
    "_flash_attention_forward": "forward", "_flash_attention_backward": "backward",
    "_efficient_attention_forward": "efficient_forward", "_efficient_attention_backward": "efficient_backward",
}  # fmt: skip


class Wait(NamedTuple):
    """A time that the host waited until the device had done all that it was given."""

    kind: str
    place: str  # file:line in the package, or in what called it


class CardTensor(Tensor):
    """A tensor on the card; `value` are its numbers."""

    value: Tensor
    card: Card
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor, card: Card) -> CardTensor:
        laid = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype, "device": BELOW}
        made = torch.Tensor._make_wrapper_subclass(cls, value.shape, **laid)
        made.value, made.card = value, card
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def record_stream(self, _: Any) -> None:
        """Nothing is reused while a stream runs: there is none."""

    def __deepcopy__(self, _: Any) -> Tensor:
        copy = CardTensor(self.value.detach().clone(), self.card)
        return torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy

    def __repr__(self, **_: Any) -> str:
        return f"on the card: {self.value!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(each for each in _tensors((args, kwargs or {}), []) if isinstance(each, CardTensor))
        return found.card.computed(func, args, kwargs or {})


class Card:
    """What the card has counted; `modes` is the context in which it is there."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.launches: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.largest = 0  # bytes of the largest tensor that was made
        self.flash = Flash()
        self.flash.exact = False
        self.pinned: set[int] = set()  # addresses of pinned memory
        self.held: list[Tensor] = []  # so that no other tensor comes to lie there
        self.random = torch.Generator()
        self.initialised = False  # whether something has used CUDA: before, torch has no counters of memory
        self.fault = ""  # what every operation raises once the card has failed
        self.asked = threading.local()  # whether torch's function that runs was given the card as its device

    def reset(self) -> None:
        """Forgets what was counted."""
        self.waits, self.launches, self.copies, self.largest = [], Counter(), Counter(), 0

    @contextmanager
    def modes(self) -> Iterator[None]:
        with _Functions(self), _Operations(self):
            yield

    def wait(self, kind: str) -> None:
        self.waits.append(Wait(kind, _place()))

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage().data_ptr())
        self.held.append(tensor)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, CardTensor) and tensor.untyped_storage().data_ptr() in self.pinned

    def computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation at least one of whose tensors, or whose result, is on the card."""
        space, _, name = func._schema.name.rpartition("::")
        self.initialised = True
        if self.fault:
            raise RuntimeError(self.fault)
        given = _tensors((args, kwargs), [])
        here = [each for each in given if isinstance(each, CardTensor)]
        if space not in ("aten", "prims", "bitsandbytes"):
            return self._own(func, args, kwargs)
        if name in ("_to_copy", "copy_"):
            return self._copied(func, name, args, kwargs)
        self._require_here(name, given, here)
        _require_supported(name, given, args)
        self._count(name, func, args, kwargs)
        if name in FLASH:
            self.launches[name] += 1
            values = tree_map(_value, (args, kwargs))
            kwargs = {key: value for key, value in values[1].items() if value is not None}
            return tree_map(self._wrapped, getattr(self.flash, FLASH[name])(*values[0], **kwargs))
        if name not in QUIET:
            self.launches[name] += 1
        device = kwargs.get("device")
        on_card = device is None or device == BELOW
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        owners = {id(each.value): each for each in here}  # an operation in place returns its own argument
        made = _by_cpu(func, *_values(args), **_values(kwargs))
        if not on_card:
            return made
        if isinstance(made, Tensor):
            return owners[id(made)] if id(made) in owners else self._wrapped(made)
        return tree_map(lambda each: owners[id(each)] if id(each) in owners else self._wrapped(each), made)

    def _own(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator of the package: one for every device is what its function does with the card's tensors."""
        name = func._schema.name.rpartition("::")[2]
        function = next((getattr(module, name) for module in OWN if hasattr(module, name)), None)
        if function is None:
            raise NotImplementedError(f"Could not run '{func._schema.name}' with arguments from the 'CUDA' backend.")
        with self.modes():
            return function(*args, **kwargs)

    def _copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A cast, or a copy from or to the card."""
        source, into = (args[1], args[0]) if name == "copy_" else (args[0], None)
        device = kwargs.get("device")
        from_card = isinstance(source, CardTensor)
        to_card = isinstance(into, CardTensor) if into is not None else device == BELOW or (device is None and from_card)
        queued = bool(kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False))
        if from_card and to_card:
            self.launches[name] += 1
        elif from_card:
            self.copies["to the host"] += source.numel() * source.element_size()
            if not queued:
                self.wait("a copy to the host")
        elif source.dim() or name == "_to_copy":
            self.copies["to the card"] += source.numel() * source.element_size()
            if not (queued and self.is_pinned(source)):
                self.wait("a copy from the host")
        else:
            self.launches[name] += 1  # a number of the host, filled in
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "copy_":
            func(_value(into), _value(source))
            return into
        made = func(_value(source), **kwargs)
        made = made.clone() if made is _value(source) else made
        return self._wrapped(made) if to_card else made

    def _require_here(self, name: str, given: list[Tensor], here: list[CardTensor]) -> None:
        """Raises as torch does where tensors are on several devices; a number alone may be on the CPU, if it is only read."""
        if not here or name in OVER:
            return
        written = name.endswith("_") and not isinstance(given[0], CardTensor)
        strict = written or name in WHOLE or name.startswith("_foreach")
        others = [each for each in given if not isinstance(each, CardTensor) and (each.dim() or strict)]
        if others and name in INDEXED:
            self.wait("a copy of indices from the host")
        elif others:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and {others[0].device}! "
                f"(when checking the arguments of {name}) at {_place()}"
            )

    def _count(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if name in READS:
            self.wait(READS[name])
        if name in INDEXED and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1])):
            self.wait("places are counted")
        if name == "_grouped_mm" and not (args[0].dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in GROUPED):
            self.wait("ends are read")
        if name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
            self.wait("lengths are summed")

    def _wrapped(self, made: Any) -> Any:
        if not isinstance(made, Tensor) or isinstance(made, CardTensor):
            return made
        self.largest = max(self.largest, made.untyped_storage().nbytes())
        return CardTensor(made, self)


def _require_supported(name: str, given: list[Tensor], args: Any) -> None:
    """Raises as torch's code for CUDA does where that for the CPU does not: whole numbers, sizes and layouts."""
    if name in PRODUCTS and not given[0].is_floating_point():
        raise RuntimeError(f'"addmm_cuda" not implemented for {given[0].dtype}, at {_place()}')
    if name == "_int_mm" and (len(args[0]) <= 16 or args[0].shape[1] % 8 or args[1].shape[1] % 8):
        raise RuntimeError(f"_int_mm takes more than 16 rows, and sizes in whole 8; given: {[each.shape for each in args]}")
    if name in ("_fused_adamw_", "_fused_adam_"):
        for parameter, *others in zip(*args[:4], strict=True):
            if any(each.stride() != parameter.stride() for each in others):
                raise RuntimeError("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout")


def _require_generator(device: str, generator: torch.Generator) -> None:
    """Raises as torch does for the generator of another device. torch's own operations see a generator of the CPU."""
    if generator.device.type != device:
        found = generator.device.type
        raise RuntimeError(f"Expected a '{device}' device type for generator but found '{found}', at {_place()}")


def _by_cpu(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the CPU, also where only a card takes whole numbers."""
    if func._schema.name == "aten::histc" and not args[0].is_floating_point():
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    if func._schema.name == "aten::_int_mm" and args[1].stride(0) != 1:  # pytorch/pytorch issue 169956
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`")
    if func._schema.name in ("aten::mm", "aten::bmm") and func._overloadname == "dtype":
        return torch.matmul(args[0].to(args[2]), args[1].to(args[2]))
    if func._schema.name in LAZY:  # torch would mark the numbers, and what is called from here does not see the mark
        return LAZY[func._schema.name](args[0])
    return func(*args, **kwargs)


def _touches(given: Any) -> bool:
    """Whether one of the tensors in arguments is on the card. Lists within lists are looked through, as torch's own walks do,
    which take half of the time of a run here."""
    for each in given.values() if type(given) is dict else given:
        if isinstance(each, CardTensor) or (isinstance(each, tuple | list | dict) and _touches(each)):
            return True
    return False


def _tensors(given: Any, found: list[Tensor]) -> list[Tensor]:
    """Every tensor in arguments, added to `found`."""
    for each in given.values() if isinstance(given, dict) else given:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, tuple | list | dict):
            _tensors(each, found)
    return found


def _values(given: Any) -> Any:
    """Arguments with the numbers of tensors that are on the card."""
    if isinstance(given, CardTensor):
        return given.value
    if isinstance(given, tuple | list):
        return type(given)(_values(each) for each in given) if type(given) in (tuple, list) else tree_map(_value, given)
    return {key: _values(each) for key, each in given.items()} if isinstance(given, dict) else given


def _value(each: Any) -> Any:
    return each.value if isinstance(each, CardTensor) else each


def _place() -> str:
    """Where the package, or else what called it, asked for what happens."""
    frame, caller = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name and not (within := name.rpartition(PACKAGE)[2]).startswith("tests/"):
            return f"{within}:{frame.f_lineno}"
        if not caller and name != __file__ and "/torch/" not in name:
            caller = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return caller


class _Operations(TorchDispatchMode):
    """Sees operations that make something on the card of nothing that is there."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            return self.card.pin(func(*args, **{**kwargs, "pin_memory": False}))
        wanted = kwargs.get("device") == BELOW and getattr(self.card.asked, "here", False)
        if wanted or _touches((args, kwargs)):
            return self.card.computed(func, args, kwargs)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Takes cuda for the card where torch's functions are given a device."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("_parse_to", "device"):  # what nn.Module.to was given, which it passes on; torch.device
            return func(*args, **kwargs)
        if name in ("tensor", "as_tensor", "new_tensor") and (name == "new_tensor" or kwargs.get("device") is not None):
            return self._made(name, args, kwargs)
        if name == "pin_memory" and isinstance(args[0], CardTensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if name in ("is_pinned", "pin_memory"):
            pinned = self.card.is_pinned(args[0])
            return pinned if name == "is_pinned" else args[0] if pinned else self.card.pin(args[0].clone())
        if name in READ and isinstance(args[0], CardTensor):
            return self._read(name, args[0])
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], _of_places(args[1]), *args[2:])
        return self._on_card(torch.Tensor.to, (args[0], CUDA), kwargs) if name == "cuda" else self._on_card(func, args, kwargs)

    def _read(self, name: str, tensor: CardTensor) -> Any:
        """What the host gets of a tensor without an operation of torch."""
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name == "data_ptr" and IN_C in sys._getframe(2).f_code.co_filename:
            raise RuntimeError("C on the host cannot read the memory of a card")
        if name == "tolist":
            self.card.wait("numbers are read")
        return 0 if name == "get_device" else getattr(tensor.value, name)()

    def _on_card(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One of torch's functions, on the card if it was given that or its tensors."""
        meta = any(str(each) == "meta" for each in (*args[1:], kwargs.get("device")) if isinstance(each, str | torch.device))
        touched = not meta and _touches((args, kwargs))  # numbers become its own
        args, found = _here(args)
        kwargs, also = _here(kwargs)
        if kwargs.get("generator") is not None:
            _require_generator("cuda" if found or also or touched else "cpu", kwargs["generator"])
        if not (found or also or touched):
            return func(*args, **kwargs)
        before, self.card.asked.here = getattr(self.card.asked, "here", False), True
        try:
            return func(*args, **kwargs)
        finally:
            self.card.asked.here = before

    def _made(self, name: str, args: Any, kwargs: Any) -> Tensor:
        """torch.tensor and the like: made on the CPU, then copied."""
        like = args[0] if name == "new_tensor" else None
        device = kwargs.get("device") or like.device
        kwargs = {"dtype": None if like is None else like.dtype} | {key: each for key, each in kwargs.items() if key != "device"}
        with self:
            made = getattr(torch, "tensor" if like is not None else name)(args[-1], **kwargs)
            return made.to(device)


def _here(given: Any) -> tuple[Any, bool]:
    """Arguments with what torch's own code takes the card for in place of cuda, and whether there was any."""
    found = False

    def other(each: Any) -> Any:
        nonlocal found
        wanted = isinstance(each, str | torch.device) and str(each).partition(":")[0] == "cuda"
        found = found or wanted
        return BELOW if wanted else each

    if isinstance(given, dict):
        return {key: other(each) for key, each in given.items()}, found
    return tuple(other(each) for each in given), found


def _of_places(index: Any) -> Any:
    """An index whose lists of places are tensors: of lists torch would make those where the card is for it, without numbers."""
    if isinstance(index, list) and not _touches([index]):
        return torch.tensor(index)
    return tuple(map(_of_places, index)) if isinstance(index, tuple) else index


def _through_thread(card: Card, engine: Any) -> Any:
    """torch.autograd.backward or grad, in a thread of its own where the card has the tensors: no context variable is there."""

    def computed(*args: Any, **kwargs: Any) -> Any:
        return _in_its_thread(card, lambda: engine(*args, **kwargs)) if _touches(args) else engine(*args, **kwargs)

    return computed


def _in_its_thread(card: Card, work: Any) -> Any:
    made: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            card.asked.here = True  # what torch itself makes there is on the card
            made.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return made[0]


class _Generator(torch.Generator):
    """A generator that draws the CPU's numbers, for the card too; it says which of the two it is for."""

    device: torch.device

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        made = super().__new__(cls, "cpu")
        made.place = CUDA if str(device).partition(":")[0] == "cuda" else torch.device("cpu")
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()


_Generator.device = property(lambda self: self.place)  # type: ignore[assignment]


class Properties(NamedTuple):
    """What torch says of the device."""

    name: str = "Simulated card"
    total_memory: int = TOTAL
    major: int = 8
    minor: int = 0
    multi_processor_count: int = 108
    uuid: str = "simulated"


def _initialising(card: Card, made: Any) -> Any:
    """A function of torch.cuda that initialises CUDA."""

    def called(*args: Any) -> Any:
        card.initialised = True
        return made(*args)

    return called


def _limit_memory(fraction: float, device: Any = CUDA) -> None:
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    if torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")


def _reset_peaks(card: Card) -> None:
    if not card.initialised:
        raise RuntimeError("Invalid device argument 0: did you call init?")


def _patched(card: Card, patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """torch.cuda as it is with one device."""
    values: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda _: None,
        "get_device_capability": lambda *_: capability, "get_device_name": lambda *_: Properties().name,
        "get_device_properties": lambda *_: Properties(), "mem_get_info": lambda *_: (TOTAL - (600 << 20), TOTAL),
        "memory_reserved": lambda *_: 0, "memory_allocated": lambda *_: 0, "max_memory_reserved": lambda *_: 64 << 20,
        "max_memory_allocated": lambda *_: 32 << 20, "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: _reset_peaks(card),
        "set_per_process_memory_fraction": _limit_memory, "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: card.random.get_state(), "set_rng_state": lambda state, *_: card.random.set_state(state),
        "get_rng_state_all": lambda: [card.random.get_state()], "synchronize": lambda *_: card.wait("the host waits for all"),
        "Stream": Stream, "Event": Event, "current_stream": lambda *_: Stream(), "default_stream": lambda *_: Stream(),
        "stream": lambda *_: nullcontext(), "device": lambda *_: nullcontext(), "is_initialized": lambda: card.initialised,
        "is_current_stream_capturing": lambda: False,
        "manual_seed_all": lambda seed: card.random.manual_seed(seed) and None, "_is_in_bad_fork": lambda: False,
        "memory_stats": lambda *_: {}, "init": lambda: None, "set_sync_debug_mode": lambda _: None,
    }  # fmt: skip
    for name in INITIALISING:
        values[name] = _initialising(card, values[name])
    for name, value in values.items():
        patch.setattr(torch.cuda, name, value)
    built = torch._C
    for name in BUILT:
        patch.setattr(built, name, lambda *_: 0, raising=False)
    patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    patch.setattr(torch, "Generator", _Generator)
    run = threading.Thread.run

    def there(thread: threading.Thread) -> None:
        with card.modes():
            run(thread)

    patch.setattr(threading.Thread, "run", there)  # readers of weights copy to the card too
    patch.setattr(torch.autograd, "has_torch_function", lambda *_: False)  # what it calls is not called within torch's functions
    for name in ("backward", "grad"):
        patch.setattr(torch.autograd, name, _through_thread(card, getattr(torch.autograd, name)))


def _forget() -> None:
    """Drops what the package keeps of a device from one run to the next."""
    kernels = flash_varlen._has_kernel, efficient_varlen._has_kernel
    laid = flash_varlen.sequences, efficient_varlen._places_of_logs, blockwise_rows.keys_seen
    of_attention = flash_varlen.proved, row_sinks.sinks_proved, *laid, *kernels
    for kept in (grouped_experts.grouped_product_proved, *of_attention):
        kept.cache_clear()
    choose.CANDIDATES.clear()
    nf4._CACHED.clear()
    optimizer._GRIDS.clear()
    SCRATCH.clear()


@contextmanager
def simulated_card(capability: tuple[int, int] = (8, 0)) -> Iterator[Card]:
    """A context in which torch has one CUDA device, cuda:0, of that compute capability."""
    card = Card()
    with ExitStack() as stack:
        _forget()
        stack.callback(_forget)
        _patched(card, stack.enter_context(pytest.MonkeyPatch.context()), capability)
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # a moved parameter stays the same one
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        stack.enter_context(card.modes())
        yield card
