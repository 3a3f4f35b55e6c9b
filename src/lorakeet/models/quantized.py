"""Loads a text model with packed linear layers, tensor by tensor: the dense model is never in memory, one matrix at a time is.

transformers builds the model on the meta device, names the tensors, ties and initialises what belongs to it; what it is given
as tensors are promises that are read when their turn comes. A promise of a packed weight ends in a PackedLinear.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakeet.errors import ConfigError, DataError, Problems, nearest
from lorakeet.formats.safe import SafeFile, open_safetensors
from lorakeet.models import modules
from lorakeet.models.quiet import quiet_transformers
from lorakeet.quant import gptq, gptq_config, on_disk
from lorakeet.quant.adopt import quantised
from lorakeet.quant.nf4 import Nf4Base, missing_kernels
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec

_METHOD = "lorakeet_packed"  # under which transformers knows our way of loading
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Stock:
    """What a model folder holds, by the names in its files; nothing is read before it is called."""

    dense: Mapping[str, Callable[[], Tensor]]
    packed: Mapping[str, Callable[[], PackedBase]]  # by the name that the dense weight would have, such as "….q_proj.weight"


def load_quantised(source: Path, config: Any, dtype: torch.dtype, spec: QuantSpec, say: Callable[[str], None]) -> Any:
    """The frozen model in eval mode on the CPU, with eager attention: packed as `spec` asks, or as its files already are.

    Raises ConfigError where the two contradict each other or the way of packing is unknown, DataError for damaged files.
    """
    stored = stored_quantisation(config)
    method = str(stored.get("quant_method", "")) if stored else ""
    name = method_of(stored) if stored else spec.method
    if stored and method not in READERS:
        raise ConfigError(
            f"{source} holds weights quantised by '{method}'; readable are {', '.join(READERS)}.{nearest(method, READERS)} "
            "Name the unquantised model."
        )
    if stored and spec.method != "none" and (spec.method, method) != ("gguf", on_disk.GGUF_METHOD):
        raise ConfigError(
            f"model.quantize.method is {spec.method}, but the weights in {source} are quantised already ({method}), and rounding "
            "them twice would lose more. Set model.quantize.method to none, or name the unquantised model."
        )
    files = tensor_files(source)
    stock = READERS[method](files, stored) if stored else quantised_stock(dense_stock(files), config, spec)
    model = load_packed(stock, config, dtype, source)
    bases = [module for module in model.modules() if isinstance(module, PackedBase)]
    packed, dense = sum(base.bytes for base in bases), sum(base.shape[0] * base.shape[1] for base in bases) * dtype.itemsize
    say(f"{len(bases)} linear layers are {name}: {packed / 1e6:,.1f} MB in place of {dense / 1e6:,.1f} MB.")
    experts = sum(module.get_parameter(name).nbytes for module in model.modules() for name in modules.expert_stacks(module))
    if experts:
        say(f"The experts of this model are no linear layers to transformers and stay as they are: {experts / 1e6:,.1f} MB.")
    if any(isinstance(base, Nf4Base) for base in bases) and missing_kernels():
        say(missing_kernels())
    return model


def stored_quantisation(config: Any) -> dict[str, Any] | None:
    """The quantization_config of a model's config.json as a mapping, or None where its weights are plain numbers."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def method_of(stored: Mapping[str, Any]) -> str:
    """What Lorakeet calls the way of packing that a quantization_config describes: nf4, int8, gptq, …; empty without one."""
    method = str(stored.get("quant_method", ""))
    return "nf4" if method == "bitsandbytes" else method.removeprefix("lorakeet_")


def tensor_files(folder: Path) -> dict[str, SafeFile]:
    """The file of each tensor of a model folder, headers checked; nothing is read."""
    if (folder / _INDEX).is_file():
        home = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {file: open_safetensors(folder / file) for file in sorted(set(home.values()))}
        lost = [name for name, file in home.items() if name not in files[file].tensors]
        if lost:
            raise DataError(f"{folder / _INDEX} lists {len(lost)} tensors that their files do not have, such as {lost[0]}.")
        return {name: files[file] for name, file in home.items()}
    shards = [folder / _SINGLE] if (folder / _SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    return {name: file for file in map(open_safetensors, shards) for name in file.tensors}


def dense_stock(files: Mapping[str, SafeFile]) -> Stock:
    """Every tensor as it lies in the files."""
    return Stock({name: _reader(file, name) for name, file in files.items()}, {})


def quantised_stock(stock: Stock, config: Any, spec: QuantSpec) -> Stock:
    """The stock with the weights of linear layers packed as they are read, from the dtype in which they are stored."""
    plain = skeleton(config)
    chosen = packable(plain, head=spec.head == "quantize")
    targets = {name: path for name, path in owners(plain, stock.dense).items() if path in chosen}

    def packed(name: str, path: str) -> Callable[[], PackedBase]:
        transposed = isinstance(chosen[path], Conv1D)

        def make() -> PackedBase:
            weight = stock.dense[name]()
            return quantised(weight.t() if transposed else weight, spec)

        return make

    dense = {name: read for name, read in stock.dense.items() if name not in targets}
    return replace(stock, dense=dense, packed={name: packed(name, path) for name, path in targets.items()})


def skeleton(config: Any) -> Any:
    """The model that `config` describes, on the meta device: shapes without numbers."""
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(plain_config(config))


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
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for name in names:
        target, joined = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, joined = rename_source_key(name, [], [], prefix, known)
        if joined is None and target in known and target.endswith(".weight"):
            found[name] = target.removesuffix(".weight")
    return found


def load_packed(stock: Stock, config: Any, dtype: torch.dtype, source: Path) -> Any:
    """The frozen model in eval mode on the CPU, with eager attention, from what `stock` promises; DataError lists what is wrong.

    Dense tensors are cast to `dtype`; packed ones are taken as they are.
    """
    _register()
    plain, empty = plain_config(config), skeleton(config)
    places = owners(empty, stock.packed)
    strange = sorted(set(stock.packed) - set(places))
    if strange:
        raise DataError(
            f"{source} has {len(strange)} packed weights that no layer of a '{config.model_type}' model takes, such as "
            f"{strange[0]}."
        )
    loading = _PackedConfig({f"{path}.weight" for path in places.values()})
    promises = {name: _Promise(read) for name, read in (*stock.dense.items(), *stock.packed.items())}
    try:
        with quiet_transformers():
            model, report = type(empty).from_pretrained(
                None,
                config=plain,
                state_dict=promises,
                quantization_config=loading,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise DataError(
            f"The '{config.model_type}' model in {source} cannot be loaded for text generation: {type(error).__name__}: {error}"
        ) from error
    problems = [*loading.problems, *(f"'{name}' is missing." for name in sorted(report["missing_keys"]))]
    if problems:
        shown = "".join(f"\n  - {line}" for line in problems[:40])
        raise DataError(f"{source} is no whole '{config.model_type}' model ({len(problems)} problems):{shown}")
    return model.requires_grad_(False).eval()


class _Promise:
    """A tensor or a packed weight that is read when transformers asks for all of it."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> Any:
        return self._read()


class _PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which parameters arrive packed, and what was wrong with them."""

    def __init__(self, targets: set[str]) -> None:
        self.quant_method = _METHOD
        self.targets = targets
        self.problems: list[str] = []

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
        return _Place(self.quantization_config.problems)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)  # to transformers it is a plain model again
        return model


class _Place(ConversionOps):  # type: ignore[misc]
    """Puts a PackedLinear where the linear layer of the skeleton is."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        name, model = context["full_layer_name"], context["model"]
        (base,) = input_dict.values()
        base = base[0] if isinstance(base, list) else base
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        transposed = isinstance(module, Conv1D)
        expected = tuple(module.weight.shape[::-1] if transposed else module.weight.shape)
        context["missing_keys"].discard(name)
        if not isinstance(base, PackedBase) or base.shape != expected:
            self.problems.append(f"'{name}' is {getattr(base, 'shape', type(base).__name__)}, but the model needs {expected}.")
            return {}
        model.set_submodule(path, PackedLinear(base, module.bias, transposed=transposed))
        return {}


def _register() -> None:
    """Tells transformers about our way of loading, through its own registry, once."""
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_METHOD)(_PackedConfig)
        register_quantizer(_METHOD)(_PackedQuantizer)


def plain_config(config: Any) -> Any:
    """The configuration without its word about quantisation."""
    found = copy.deepcopy(config)
    for part in (found, found.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return found


def _reader(file: SafeFile, name: str) -> Callable[[], Tensor]:
    return lambda: file.read(name)


def _stock_of(
    files: Mapping[str, SafeFile],
    mark: str,
    parts: tuple[str, ...],
    decode: Callable[[str, Mapping[str, Tensor]], PackedBase],
) -> Stock:
    """The stock of a folder in which the tensor `x` + `mark` tells that `x` is packed, in tensors `x` + each of `parts`."""
    names = [name.removesuffix(mark) for name in files if name.endswith(mark)]
    taken = {name + part for name in names for part in parts}

    def packed(name: str) -> Callable[[], PackedBase]:
        held = [part for part in parts if name + part in files]
        return lambda: decode(name, {part: files[name + part].read(name + part) for part in held})

    dense = {name: _reader(file, name) for name, file in files.items() if name not in taken}
    return Stock(dense, {name: packed(name) for name in names})


def _nf4_stock(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> Stock:
    kind = stored.get("bnb_4bit_quant_type", "fp4") if stored.get("load_in_4bit") else "LLM.int8"
    if kind != "nf4":
        raise ConfigError(
            f"The quantised weights are {kind} of bitsandbytes, of whose ways only nf4 is read. Name the unquantised model."
        )
    return _stock_of(files, on_disk.NF4_STATE, on_disk.NF4_PARTS, on_disk.nf4_base)


def _int8_stock(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> Stock:
    return _stock_of(files, "_scale", on_disk.INT8_PARTS, on_disk.int8_base)


def _gguf_stock(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> Stock:
    return _stock_of(files, on_disk.GGUF_TYPE, ("", on_disk.GGUF_TYPE), on_disk.gguf_base)


def _gptq_stock(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> Stock:
    config = gptq_config.parse(stored, "config.json")
    ends = {f".{part}" for part in gptq.PARTS}
    names = dict.fromkeys(name.rpartition(".")[0] for name in files if name.endswith((".qweight", ".qzeros")))
    problems = Problems("The model's GPTQ tensors do not fit its settings", DataError)
    packed: dict[str, Callable[[], PackedBase]] = {}
    for name in names:
        settings = config.for_layer(name)
        held = {part: files[f"{name}.{part}"] for part in gptq.PARTS if f"{name}.{part}" in files}
        kept = {part: file.tensors[f"{name}.{part}"] for part, file in held.items()}
        if settings is None:
            problems.add(f"'{name}' is packed, but 'dynamic' in config.json says that it is dense.")
            continue
        for problem in gptq_config.layer_problems(name, {part: (one.dtype, one.shape) for part, one in kept.items()}, settings):
            problems.add(problem)
        packed[f"{name}.weight"] = _gptq_reader(name, held, settings)
    problems.raise_if_any()
    taken = {f"{name}{end}" for name in names for end in ends}
    return Stock({name: _reader(file, name) for name, file in files.items() if name not in taken}, packed)


def _gptq_reader(name: str, held: Mapping[str, SafeFile], settings: gptq_config.GptqConfig) -> Callable[[], PackedBase]:
    return lambda: gptq_config.base_from(name, {part: file.read(f"{name}.{part}") for part, file in held.items()}, settings)


# What config.json calls a way of packing, and what reads a folder in it: a new one is a line here.
READERS: dict[str, Callable[[Mapping[str, SafeFile], Mapping[str, Any]], Stock]] = {
    "bitsandbytes": _nf4_stock,
    on_disk.INT8_METHOD: _int8_stock,
    on_disk.GGUF_METHOD: _gguf_stock,
    gptq_config.METHOD: _gptq_stock,
}
