"""Loads a text model with packed linear layers, tensor by tensor: only one dense matrix at a time is in memory.

transformers builds the model on the meta device, names the tensors, and ties and initialises them. It gets lazy tensors, which
are read when it needs them; a packed weight becomes a PackedLinear.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
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

from lorakeet.data.batches import distribute_rows
from lorakeet.errors import ConfigError, DataError, nearest
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models import modules
from lorakeet.models.files.float_scales import Dequantised
from lorakeet.models.files.foreign_code import build_native
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.stored_tensors import READERS, StoredModel, dense_model, method_of, stored_quantisation, tensor_files
from lorakeet.models.files.validate import auto_class_of, loading, misfits_in, require_whole
from lorakeet.quant import safetensors_layout
from lorakeet.quant.construct import empty_of, quantise_weight
from lorakeet.quant.nf4 import Nf4Base, bitsandbytes_advice
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec


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
    packed, dense = sum(base.bytes for base in bases), sum(base.shape[0] * base.shape[1] for base in bases) * dtype.itemsize
    if bases:
        say(f"{len(bases)} linear layers are {name}: {bytes_text(packed)} in place of {bytes_text(dense)}.")
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
    stored_model = with_joined_dense(plain, stored_model)
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


def kept_experts(model: nn.Module) -> str:
    """Returns a sentence on the stacked experts of a model, which are not packed; empty if it has none."""
    size = sum(module.get_parameter(name).nbytes for module in model.modules() for name in modules.expert_stacks(module))
    if not size:
        return ""
    return f"The experts of this model are no linear layers to transformers and stay as they are: {bytes_text(size)}."


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

    dense = {name: read for name, read in stored_model.dense.items() if name not in targets}
    return replace(stored_model, dense=dense, packed={name: packed(name, path) for name, path in targets.items()})


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
    paths = owners(empty, stored_model.packed)
    unknown = sorted(set(stored_model.packed) - set(paths))
    if unknown:
        raise DataError(
            f"{source} has {len(unknown)} packed weights that no layer of a '{config.model_type}' model takes, such as "
            f"{unknown[0]}. Fetch it again."
        )
    weights, slot = {f"{path}.weight" for path in paths.values()}, _LinearSlot()
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


class _LinearSlot(ConversionOps):  # type: ignore[misc]
    """Replaces a linear layer of the empty model by a PackedLinear."""

    def __init__(self) -> None:
        self.misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # by name: found and expected shape

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        name, model = context["full_layer_name"], context["model"]
        (base,) = input_dict.values()
        base = base[0] if isinstance(base, list) else base
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        transposed = isinstance(module, Conv1D)
        expected = tuple(module.weight.shape[::-1] if transposed else module.weight.shape)
        context["missing_keys"].discard(name)
        if base.shape != expected:
            self.misfits[name] = (tuple(base.shape), expected)
            return {}
        model.set_submodule(path, PackedLinear(base, module.bias, transposed=transposed))
        return {}


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
