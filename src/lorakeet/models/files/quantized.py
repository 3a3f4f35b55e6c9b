"""Loads a text model with packed linear layers, tensor by tensor: only one dense matrix at a time is in memory.

transformers builds the model on the meta device, names the tensors, and ties and initialises them. It gets lazy tensors, which
are read when it needs them; a packed weight becomes a PackedLinear.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakeet.core.layers.experts import pass_through, stack_shape, stored_transposed, why_not_experts
from lorakeet.data.batches import distribute_rows
from lorakeet.errors import ConfigError, DataError, nearest
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models import modules
from lorakeet.models.files.float_scales import Dequantised
from lorakeet.models.files.foreign_code import NO_HUB_KERNELS, build_native
from lorakeet.models.files.joined_experts import JoinedStack, joined_stacks, rows_joined
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.stored_tensors import READERS, StoredModel, dense_model, method_of, stored_quantisation, tensor_files
from lorakeet.models.files.validate import auto_class_of, loading, misfits_in, require_whole
from lorakeet.quant import safetensors_layout
from lorakeet.quant.construct import empty_of, quantise_stack, quantise_weight
from lorakeet.quant.nf4 import Nf4Base, bitsandbytes_advice
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack


@dataclass(frozen=True)
class DividedPacking:
    """Packing by several processes that load one model: each packs its part of the weights, and gets the others'.

    `send` copies tensors from the process of that rank to all others; every process calls it in the same order.
    """

    rank: int
    count: int
    send: Callable[[Iterable[Tensor], int], None]

    def owners(self, layers: Mapping[str, nn.Module]) -> dict[str, int]:
        """The process that packs each weight, by path: about equally many numbers each, and the same in every process."""
        paths = sorted(layers)
        sizes = [cast(Tensor, layers[path].weight).numel() for path in paths]
        return {paths[number]: rank for rank, part in enumerate(distribute_rows(sizes, self.count)) for number in part}


_divided: ContextVar[DividedPacking | None] = ContextVar("_divided", default=None)


@contextmanager
def packing_divided(rank: int, count: int, send: Callable[[Iterable[Tensor], int], None]) -> Iterator[None]:
    """A context in which process `rank` of `count` packs its part of the weights that it loads, as in DividedPacking."""
    before = _divided.set(DividedPacking(rank, count, send) if count > 1 else None)
    try:
        yield
    finally:
        _divided.reset(before)


_METHOD = "lorakeet"  # the name of WeightHook in transformers
Loaded = tuple[Any, dict[str, Any]]  # a model with transformers' report of missing and mismatched tensors


def load_quantised(source: Path, config: Any, dtype: torch.dtype, spec: QuantSpec, say: Callable[[str], None]) -> Any:
    """Loads the frozen model in eval mode on the CPU, with eager attention, packed as `spec` says or as its files already are.

    Within `packing_divided` this process packs its part of what is packed now.

    Raises ConfigError if the two contradict each other or the method is unknown, DataError for damaged files.
    """
    divided = _divided.get()
    model = load_packed(stored_model_of(source, config, spec, divided), config, dtype, source)
    stored = stored_quantisation(config)
    if divided is not None and not stored:
        _exchange(model, spec, divided)
    name = method_of(stored) if stored else spec.method
    bases = [module for module in model.modules() if isinstance(module, PackedBase)]
    stacks = [module for module in model.modules() if isinstance(module, PackedStack)]
    packed = sum(base.bytes for base in bases) + sum(stack.bytes for stack in stacks)
    dense = sum(math.prod(each.shape) for held in (bases, stacks) for each in held) * dtype.itemsize
    if packed:
        experts = f"{len(stacks)} stacks of experts" if stacks else ""
        what = " and ".join(filter(None, (f"{len(bases)} linear layers" if bases else "", experts)))
        say(f"{what} are {name}: {bytes_text(packed)} in place of {bytes_text(dense)}.")
    else:
        say(f"The weights were {name} and are now {str(dtype).removeprefix('torch.')}.")
    for line in limits_of_packing(model):
        say(line)
    return model


def limits_of_packing(model: nn.Module) -> list[str]:
    """Returns messages on a packed model's limits: what stays unpacked, and what makes dequantisation slow."""
    packed = any(isinstance(module, Nf4Base) for module in model.modules())
    return [line for line in (kept_experts(model), bitsandbytes_advice() if packed else "") if line]


def stored_model_of(source: Path, config: Any, spec: QuantSpec, divided: DividedPacking | None = None) -> StoredModel:
    """Returns the lazy tensors of a model's files: packed as they are, or dense, or packed as `spec` says when they are read.

    Raises ConfigError if the two contradict each other or the method is unknown, DataError with every tensor whose header does
    not match config.json.
    """
    stored = stored_quantisation(config)
    method = str(stored.get("quant_method", "")) if stored else ""
    if stored and method not in READERS:
        raise ConfigError(
            f"{source} has weights quantised by '{method}'; readable are {', '.join(READERS)}.{nearest(method, READERS)} "
            "Name the unquantised model."
        )
    if stored and spec.method != "none" and (spec.method, method) != ("gguf", safetensors_layout.GGUF_METHOD):
        raise ConfigError(
            f"model.quantize.method is {spec.method}, but the weights in {source} are quantised already ({method}), and rounding "
            "them twice would lose more. Set model.quantize.method to none, or name the unquantised model."
        )
    files = tensor_files(source)
    stored_model = READERS[method](files, stored) if stored else dense_model(files)
    plain = skeleton(config)
    known = plain.state_dict()
    if stored:
        stored_model = with_joined_stacks(plain, stored_model, files, stored)
    stored_model = with_packed_stacks(plain, with_joined_dense(plain, stored_model))
    shapes = {target: shape_of(files, stored_model, name) for name, target in targets_of(plain, stored_model.dense).items()}
    misfits = {target: (found, tuple(known[target].shape)) for target, found in shapes.items() if found != known[target].shape}
    require_whole(source, config.model_type, misfits=misfits, missing=())
    twice = sorted(set(shapes) & {f"{path}.weight" for path in owners(plain, stored_model.packed).values()})
    if twice:
        raise DataError(f"{source} has {len(twice)} weights both packed and dense, such as {twice[0]}. Fetch the model again.")
    return stored_model if stored or spec.method == "none" else quantised_model(stored_model, config, spec, divided)


def shape_of(files: Mapping[str, SafeFile], stored_model: StoredModel, name: str) -> tuple[int, ...]:
    """Returns the shape of a dense tensor, also of one that is dequantised as it is read."""
    read = stored_model.dense[name]
    return read.shape if isinstance(read, Dequantised) else files[name].tensors[name].shape


def with_joined_dense(model: Any, stored_model: StoredModel) -> StoredModel:
    """Returns the stored model with packed matrices that transformers joins into others, such as those of experts, as dense ones.

    They are dequantised as they are read. Those that transformers ignores, such as of the prediction of several tokens, are left
    out.
    """
    joined, ignored = joined_names(model, stored_model.packed), ignored_names(model, stored_model.packed)

    def dense(name: str) -> Callable[[], Tensor]:
        return lambda: stored_model.packed[name]().dense()

    packed = {name: read for name, read in stored_model.packed.items() if name not in joined | ignored}
    return replace(stored_model, dense={**stored_model.dense, **{name: dense(name) for name in joined}}, packed=packed)


def with_joined_stacks(
    model: Any, stored_model: StoredModel, files: Mapping[str, SafeFile], stored: Mapping[str, Any]
) -> StoredModel:
    """Returns the stored model with packed matrices of single experts, which transformers would join, as packed stacks."""
    found = joined_stacks(model, packable_stacks(model), files, stored)
    own = targets_of(model, found)
    packed: dict[str, Callable[[], PackedBase | PackedStack]] = dict(stored_model.packed)
    for path, stack in found.items():
        if own.get(path) != path or not all(name in packed for parts in stack.parts for name in parts):
            continue
        reads = [[packed.pop(name) for name in parts] for parts in stack.parts]
        packed[path] = partial(_read_joined, stack, reads)
    return replace(stored_model, packed=packed)


def _read_joined(stack: JoinedStack, reads: list[list[Callable[[], Any]]]) -> PackedStack:
    return PackedStack.of(rows_joined([read() for read in parts], stack.settings) for parts in reads)


def with_packed_stacks(model: Any, stored_model: StoredModel) -> StoredModel:
    """Returns the stored model with stacks of experts as packed ones, where the files have them so and the model keeps them."""
    places = targets_of(model, stored_model.dense)
    known = packable_stacks(model)
    packed: dict[str, Callable[[], Any]] = {}
    for name, read in stored_model.dense.items():
        module = known.get(places.get(name, ""))
        if module is None or not isinstance(read, Dequantised) or read.packed is None:
            continue
        if read.shape == tuple(module.get_parameter(places[name].rpartition(".")[2]).shape):
            packed[name] = read.packed
    dense = {name: read for name, read in stored_model.dense.items() if name not in packed}
    return replace(stored_model, dense=dense, packed={**stored_model.packed, **packed})


def kept_experts(model: nn.Module) -> str:
    """Returns a sentence on the stacked experts of a model that are not packed; empty if there are none."""
    stacks = [getattr(module, name) for module in model.modules() for name in modules.expert_stacks(module)]
    size = sum(stack.nbytes for stack in stacks if isinstance(stack, Tensor))
    if not size:
        return ""
    return f"Experts of this model stay as they are, since its code needs them whole: {bytes_text(size)}."


def _exchange(model: nn.Module, spec: QuantSpec, divided: DividedPacking) -> None:
    """Sends each packed weight of the model from the process that has packed it to the others."""
    packed = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    for path, owner in sorted(divided.owners(packable(skeleton(model.config), head=spec.head == "quantize")).items()):
        if path in packed:
            divided.send(packed[path].base.packed_buffers(), owner)


def quantised_model(
    stored_model: StoredModel, config: Any, spec: QuantSpec, divided: DividedPacking | None = None
) -> StoredModel:
    """Returns the stored model with linear layers packed as they are read, from their stored dtype.

    With `divided`, those of other processes are empty, and nothing is read of them.
    """
    plain = skeleton(config)
    chosen = packable(plain, head=spec.head == "quantize")
    targets = {name: path for name, path in owners(plain, stored_model.dense).items() if path in chosen}
    others = {} if divided is None else {path for path, owner in divided.owners(chosen).items() if owner != divided.rank}

    def packed(name: str, path: str) -> Callable[[], PackedBase]:
        transposed = isinstance(chosen[path], Conv1D)

        def make() -> PackedBase:
            if path in others:
                shape = tuple(cast(Tensor, chosen[path].weight).shape)
                return empty_of(shape[::-1] if transposed else shape, spec)
            weight = stored_model.dense[name]()
            return quantise_weight(weight.t() if transposed else weight, spec)

        return make

    packs = {path: partial(_packed_stack, spec, stored_transposed(module)) for path, module in packable_stacks(plain).items()}
    places = _places(plain, stored_model.dense)
    dense = {
        name: partial(_AsStored.read_by, read) if places.get(name, ("",))[0] in packs else read
        for name, read in stored_model.dense.items()
        if name not in targets
    }
    return replace(stored_model, dense=dense, packed={name: packed(name, path) for name, path in targets.items()}, pack=packs)


class _AsStored:
    """A tensor that transformers is not to cast before it is packed: it calls `to` of what it has read."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @classmethod
    def read_by(cls, read: Callable[[], Tensor]) -> Any:
        """What `read` reads, not to be cast."""
        return cls(read())

    def to(self, *_: Any, **__: Any) -> Tensor:
        """The tensor as it is."""
        return self._tensor


def _packed_stack(spec: QuantSpec, transposed: bool, weight: Tensor) -> PackedStack:
    """A stack of experts as the model has it, of which `transposed` ones are (count, in, out), packed matrix by matrix."""
    return quantise_stack(weight.transpose(1, 2) if transposed else weight, spec)


def packable_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks of experts whose 3-D parameters are packed, by the path of the parameter.

    Left out are those whose code in transformers multiplies by a whole parameter, and those that can have no pairs.
    """
    found: dict[str, nn.Module] = {}
    for path, module in modules.original_modules(model):
        one_by_one = hasattr(module, "is_concatenated") or pass_through(module)
        if (stacks := modules.expert_stacks(module)) and one_by_one and not why_not_experts(module):
            found |= {f"{path}.{name}": module for name in stacks}
    return found


def skeleton(config: Any) -> Any:
    """Returns the model that `config` describes, on the meta device."""
    with torch.device("meta"), quiet_transformers():
        return build_native(auto_class_of(config), plain_config(config))


def read_into(empty: Any, reads: Mapping[str, Callable[[], Any]], dtype: torch.dtype, **settings: Any) -> Loaded:
    """Loads the empty model with eager attention from the lazy tensors `reads`; dense ones are cast to `dtype`."""
    with quiet_transformers():
        found: Loaded = type(empty).from_pretrained(
            None,
            config=empty.config,  # of the text model, if the folder's contains others
            state_dict={name: _LazyTensor(read) for name, read in reads.items()},
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **NO_HUB_KERNELS,
            **settings,
        )
    return found


class _LazyTensor:
    """A tensor or a packed weight that is read when transformers indexes it."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Any:
        return self._read()


def packable(model: nn.Module, *, head: bool) -> dict[str, nn.Module]:
    """Returns the linear layers of a model that are packed, by path: no router, nothing tied, the head only with `head`.

    Raises ConfigError with `head` if the head is the embedding table, which stays dense.
    """
    tied = {name.removesuffix(".weight") for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())  # transformers' own quantisers skip them too
    found: dict[str, nn.Module] = {}
    for path, module in linear_layers(model).items():
        if modules.is_router(model, path):
            continue
        is_head = modules.is_head(model, path, module)
        if is_head and head and path in tied:
            raise ConfigError(
                f"model.quantize.head is quantize, but '{path}' is the embedding table of this model, which stays as it is. "
                "Set model.quantize.head to keep."
            )
        if path not in tied and (head or not is_head) and not set(path.split(".")) & set(wide):
            found[path] = module
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every dense linear layer of a model, by path: exactly nn.Linear and GPT-2's Conv1D, no subclasses."""
    return {path: module for path, module in modules.original_modules(model) if type(module) in (nn.Linear, Conv1D)}


def owners(model: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """Returns the path of the module whose `weight` each checkpoint tensor is, without tensors that are joined into others."""
    targets = targets_of(model, names)
    return {name: target.removesuffix(".weight") for name, target in targets.items() if target.endswith(".weight")}


def targets_of(model: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """Returns the model's name of each checkpoint tensor, without those that it lacks or joins into others."""
    return {name: target for name, (target, joined) in _places(model, names).items() if not joined}


def joined_names(model: Any, names: Mapping[str, Any]) -> set[str]:
    """Returns the checkpoint tensors that transformers joins into others, such as the matrices of experts."""
    return {name for name, (_, joined) in _places(model, names).items() if joined}


def ignored_names(model: Any, names: Iterable[str]) -> set[str]:
    """Returns the checkpoint tensors that the model's class ignores, such as those of the prediction of several tokens."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _places(model: Any, names: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """The model's name of each checkpoint tensor, and whether others are joined with it there."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[str, bool]] = {}
    for name in names:
        target, joined = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, joined = rename_source_key(name, [], [], prefix, known)
        if target in known:
            found[name] = target, joined is not None
    return found


def load_packed(stored_model: StoredModel, config: Any, dtype: torch.dtype, source: Path) -> Any:
    """Loads the frozen model in eval mode on the CPU, with eager attention, from lazy tensors; DataError lists what is wrong.

    Dense tensors are cast to `dtype`; packed ones stay unchanged.
    """
    empty = skeleton(config)
    targets, paths = targets_of(empty, stored_model.packed), owners(empty, stored_model.packed)
    packed_stacks = {target for target in targets.values() if empty.get_parameter(target).dim() == 3}
    unknown = sorted(name for name in stored_model.packed if name not in paths and targets.get(name) not in packed_stacks)
    if unknown:
        raise DataError(
            f"{source} has {len(unknown)} packed weights that no layer of a '{config.model_type}' model takes, such as "
            f"{unknown[0]}. Fetch it again."
        )
    weights = {f"{path}.weight" for path in paths.values()} | stored_model.pack.keys() | packed_stacks
    slot = _PackedSlot(stored_model.pack)
    with loading(source, config.model_type, tensor_files(source)):  # misfits are refused below, with names and shapes
        model, report = read_into(
            empty,
            stored_model.reads,
            dtype,
            quantization_config=WeightHook(slot, weights.__contains__),
            ignore_mismatched_sizes=True,
        )
    misfits = misfits_in(report) | slot.misfits
    require_whole(source, config.model_type, misfits=misfits, missing=report["missing_keys"])
    return model.requires_grad_(False).eval()


class WeightHook(QuantizationConfigMixin):  # type: ignore[misc]
    """Makes transformers convert the parameters that `wants` selects by name with `operation`: its hook for quantised weights."""

    def __init__(self, operation: ConversionOps, wants: Callable[[str], bool]) -> None:
        if _METHOD not in AUTO_QUANTIZER_MAPPING:  # transformers' own registry
            register_quantization_config(_METHOD)(WeightHook)
            register_quantizer(_METHOD)(_HookQuantizer)
        self.quant_method, self.operation, self.wants = _METHOD, operation, wants

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightHook:
        """Returns itself: transformers copies its settings, but the operation collects its results in one place."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class _HookQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' side of a WeightHook."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return bool(self.quantization_config.wants(param_name))

    def get_quantize_ops(self) -> ConversionOps:
        return self.quantization_config.operation

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)  # for transformers it is a plain model again
        return model


class _PackedSlot(ConversionOps):  # type: ignore[misc]
    """Replaces a linear layer of the empty model by a PackedLinear, and a stack of experts by a packed one.

    `pack` are by name what makes a packed stack of a dense one.
    """

    def __init__(self, pack: Mapping[str, Callable[[Tensor], PackedStack]]) -> None:
        self.pack = pack
        self.misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # by name: found and expected shape

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        known = set(input_dict) & self.pack.keys()  # a conversion may make several parameters
        names = {name: name if name in known else context["full_layer_name"] for name in input_dict}
        for name, value in input_dict.items():
            self._put(names[name], value[0] if isinstance(value, list) else value, context)
        return {}

    def _put(self, name: str, base: Any, context: dict[str, Any]) -> None:
        model = context["model"]
        if isinstance(base, Tensor):
            base = self.pack[name](base)
        if isinstance(base, PackedStack):
            self._put_stack(name, base, context)
            return
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        transposed = isinstance(module, Conv1D)
        expected = tuple(module.weight.shape[::-1] if transposed else module.weight.shape)
        context["missing_keys"].discard(name)
        if base.shape != expected:
            self.misfits[name] = (tuple(base.shape), expected)
            return
        model.set_submodule(path, PackedLinear(base, module.bias, transposed=transposed))

    def _put_stack(self, name: str, stack: PackedStack, context: dict[str, Any]) -> None:
        model = context["model"]
        owner, _, leaf = name.rpartition(".")
        expected = stack_shape(model.get_submodule(owner), leaf)
        context["missing_keys"].discard(name)
        if stack.shape != expected:
            self.misfits[name] = (tuple(stack.shape), expected)
        else:
            modules.put_stack(model, name, stack)


def with_quantisation(config: Any, settings: Mapping[str, Any]) -> Any:
    """Returns a copy of the configuration with the given quantization_config."""
    found = plain_config(config)
    found.quantization_config = dict(settings)
    return found


def plain_config(config: Any) -> Any:
    """Returns a copy of the configuration without quantization_config."""
    found = copy.deepcopy(config)
    for part in (found, found.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return found
