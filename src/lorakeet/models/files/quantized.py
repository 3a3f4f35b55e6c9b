"""Loads a text model with packed linear layers, tensor by tensor: the dense model is never in memory, one matrix at a time is.

transformers builds the model on the meta device, names the tensors, ties and initialises what belongs to it; what it is given
as tensors are promises that are read when their turn comes. A promise of a packed weight ends in a PackedLinear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakeet.errors import ConfigError, DataError, nearest
from lorakeet.models import modules
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.stored_tensors import READERS, StoredModel, dense_model, method_of, stored_quantisation, tensor_files
from lorakeet.models.files.validate import misfits_in, refused, require_whole
from lorakeet.quant import safetensors_layout
from lorakeet.quant.construct import quantise_weight
from lorakeet.quant.nf4 import Nf4Base, bitsandbytes_advice
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec

_METHOD = "lorakeet_packed"  # under which transformers knows our way of loading
Loaded = tuple[Any, dict[str, Any]]  # a model with transformers' report on what was missing, or of another shape


def load_quantised(source: Path, config: Any, dtype: torch.dtype, spec: QuantSpec, say: Callable[[str], None]) -> Any:
    """The frozen model in eval mode on the CPU, with eager attention: packed as `spec` asks, or as its files already are.

    Raises ConfigError where the two contradict each other or the way of packing is unknown, DataError for damaged files.
    """
    model = load_packed(stored_model_of(source, config, spec), config, dtype, source)
    stored = stored_quantisation(config)
    name = method_of(stored) if stored else spec.method
    bases = [module for module in model.modules() if isinstance(module, PackedBase)]
    packed, dense = sum(base.bytes for base in bases), sum(base.shape[0] * base.shape[1] for base in bases) * dtype.itemsize
    say(f"{len(bases)} linear layers are {name}: {packed / 1e6:,.1f} MB in place of {dense / 1e6:,.1f} MB.")
    for line in limits_of_packing(model):
        say(line)
    return model


def limits_of_packing(model: nn.Module) -> list[str]:
    """What a user should know of a model that is packed: what stays as it is, and what unpacks it more slowly than it could."""
    packed = any(isinstance(module, Nf4Base) for module in model.modules())
    return [line for line in (kept_experts(model), bitsandbytes_advice() if packed else "") if line]


def stored_model_of(source: Path, config: Any, spec: QuantSpec) -> StoredModel:
    """What the files of a model promise: packed as they are, or dense, or packed as `spec` asks when they are read.

    Raises ConfigError where the two contradict each other or the way of packing is unknown, DataError that names every tensor
    that is not as config.json says, as far as the files' headers tell.
    """
    stored = stored_quantisation(config)
    method = str(stored.get("quant_method", "")) if stored else ""
    if stored and method not in READERS:
        raise ConfigError(
            f"{source} holds weights quantised by '{method}'; readable are {', '.join(READERS)}.{nearest(method, READERS)} "
            "Name the unquantised model."
        )
    if stored and spec.method != "none" and (spec.method, method) != ("gguf", safetensors_layout.GGUF_METHOD):
        raise ConfigError(
            f"model.quantize.method is {spec.method}, but the weights in {source} are quantised already ({method}), and rounding "
            "them twice would lose more. Set model.quantize.method to none, or name the unquantised model."
        )
    files = tensor_files(source)
    stock = READERS[method](files, stored) if stored else dense_model(files)
    plain = skeleton(config)
    known = plain.state_dict()
    places = {target: files[name].tensors[name].shape for name, target in targets_of(plain, stock.dense).items()}
    misfits = {target: (found, tuple(known[target].shape)) for target, found in places.items() if found != known[target].shape}
    require_whole(source, config.model_type, misfits=misfits, missing=())
    twice = sorted(set(places) & {f"{path}.weight" for path in owners(plain, stock.packed).values()})
    if twice:
        raise DataError(f"{source} has {len(twice)} weights both packed and dense, such as {twice[0]}. Fetch the model again.")
    return stock if stored or spec.method == "none" else quantised_model(stock, config, spec)


def kept_experts(model: nn.Module) -> str:
    """A sentence on the stacked experts of a model, which no way of packing takes; empty where it has none."""
    size = sum(module.get_parameter(name).nbytes for module in model.modules() for name in modules.expert_stacks(module))
    if not size:
        return ""
    return f"The experts of this model are no linear layers to transformers and stay as they are: {size / 1e6:,.1f} MB."


def quantised_model(stock: StoredModel, config: Any, spec: QuantSpec) -> StoredModel:
    """The stock with the weights of linear layers packed as they are read, from the dtype in which they are stored."""
    plain = skeleton(config)
    chosen = packable(plain, head=spec.head == "quantize")
    targets = {name: path for name, path in owners(plain, stock.dense).items() if path in chosen}

    def packed(name: str, path: str) -> Callable[[], PackedBase]:
        transposed = isinstance(chosen[path], Conv1D)

        def make() -> PackedBase:
            weight = stock.dense[name]()
            return quantise_weight(weight.t() if transposed else weight, spec)

        return make

    dense = {name: read for name, read in stock.dense.items() if name not in targets}
    return replace(stock, dense=dense, packed={name: packed(name, path) for name, path in targets.items()})


def skeleton(config: Any) -> Any:
    """The model that `config` describes, on the meta device: shapes without numbers."""
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(plain_config(config))


def read_into(empty: Any, reads: Mapping[str, Callable[[], Any]], dtype: torch.dtype, **settings: Any) -> Loaded:
    """The model that is a skeleton so far, with eager attention, from what `reads` give when it is asked for; dense tensors are
    cast to `dtype`."""
    with quiet_transformers():
        found: Loaded = type(empty).from_pretrained(
            None,
            config=empty.config,  # of the text model, where the folder's holds others
            state_dict={name: _Promise(read) for name, read in reads.items()},
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **settings,
        )
    return found


class _Promise:
    """A tensor or a packed weight that is read when transformers asks for all of it."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Any:
        return self._read()


def packable(model: nn.Module, *, head: bool) -> dict[str, nn.Module]:
    """The linear layers of a model that are packed, by path: no router, nothing tied, the head if asked.

    Raises ConfigError where the head is asked for and is the embedding table, which stays dense.
    """
    tied = {name.removesuffix(".weight") for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())  # what transformers' own quantisers leave alone too
    found: dict[str, nn.Module] = {}
    for path, module in linear_layers(model).items():
        if modules.is_router(model, path):
            continue
        is_head = modules.is_head(model, path, module)
        if is_head and head and path in tied:
            raise ConfigError(
                f"model.quantize.head is quantize, but '{path}' is the embedding table of this model, which is kept as it is. "
                "Set model.quantize.head to keep."
            )
        if path not in tied and (head or not is_head) and not set(path.split(".")) & set(wide):
            found[path] = module
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense linear layer of a model, by path: nn.Linear and GPT-2's Conv1D themselves, no class derived from them."""
    return {path: module for path, module in modules.original_modules(model) if type(module) in (nn.Linear, Conv1D)}


def owners(model: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """The path of the module whose `weight` each checkpoint tensor is; tensors that are joined into others are left out."""
    targets = targets_of(model, names)
    return {name: target.removesuffix(".weight") for name, target in targets.items() if target.endswith(".weight")}


def targets_of(model: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """What the model calls each checkpoint tensor; those that it does not have, or joins into others, are left out."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for name in names:
        target, joined = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, joined = rename_source_key(name, [], [], prefix, known)
        if joined is None and target in known:
            found[name] = target
    return found


def load_packed(stock: StoredModel, config: Any, dtype: torch.dtype, source: Path) -> Any:
    """The frozen model in eval mode on the CPU, with eager attention, from what `stock` promises; DataError lists what is wrong.

    Dense tensors are cast to `dtype`; packed ones are taken as they are.
    """
    _register()
    empty = skeleton(config)
    places = owners(empty, stock.packed)
    strange = sorted(set(stock.packed) - set(places))
    if strange:
        raise DataError(
            f"{source} has {len(strange)} packed weights that no layer of a '{config.model_type}' model takes, such as "
            f"{strange[0]}."
        )
    loading = _PackedConfig({f"{path}.weight" for path in places.values()})
    try:  # misfits are refused below, with names and shapes
        model, report = read_into(empty, stock.reads, dtype, quantization_config=loading, ignore_mismatched_sizes=True)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise refused(source, config.model_type, tensor_files(source), error) from error
    misfits = misfits_in(report) | loading.misfits
    require_whole(source, config.model_type, misfits=misfits, missing=report["missing_keys"])
    return model.requires_grad_(False).eval()


class _PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which parameters arrive packed, and what was wrong with them."""

    def __init__(self, targets: set[str]) -> None:
        self.quant_method = _METHOD
        self.targets = targets
        self.misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # by name: as found, and as it should be

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class _PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' hook for weights that are set in another form than they are named in."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.quantization_config.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _LinearSlot(self.quantization_config.misfits)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)  # to transformers it is a plain model again
        return model


class _LinearSlot(ConversionOps):  # type: ignore[misc]
    """Puts a PackedLinear where the linear layer of the skeleton is."""

    def __init__(self, misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        self.misfits = misfits

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


def _register() -> None:
    """Tells transformers about our way of loading, through its own registry, once."""
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_METHOD)(_PackedConfig)
        register_quantizer(_METHOD)(_PackedQuantizer)


def with_quantisation(config: Any, words: Mapping[str, Any]) -> Any:
    """The configuration of the same model with its weights quantised as `words`, a quantization_config, says."""
    found = plain_config(config)
    found.quantization_config = dict(words)
    return found


def plain_config(config: Any) -> Any:
    """The configuration without its word about quantisation."""
    found = copy.deepcopy(config)
    for part in (found, found.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return found
