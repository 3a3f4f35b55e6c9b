"""LoRA adapters as GGUF files, the way llama.cpp reads them.

    general.type "adapter" · general.architecture as in the base · adapter.type "lora" · adapter.lora.alpha (float)
    BLOCK.weight.lora_a   (rank, in)     BLOCK.weight.lora_b   (out, rank)

llama.cpp's scale is alpha/rank with the rank of each tensor, or 1 if alpha is missing or 0. Pairs that all have one alpha by that
rule are written unchanged; otherwise each scale is multiplied into B, and no alpha is written.

Llama and Mistral files have the rows of q and k in another order (rotary positions rotate neighbours instead of halves). This
permutes the rows of B, not A. The number of heads comes from our note in the file, or else from the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import Kind, alpha_for
from lorakeet.errors import ConfigError, DataError, Problems, nearest, reader
from lorakeet.formats.components import table
from lorakeet.formats.files import gguf_header
from lorakeet.formats.files.base_model import BaseModel
from lorakeet.formats.files.gguf_array import WholeArray
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.formats.files.gguf_header import gguf_package
from lorakeet.formats.files.json_object import parse_object
from lorakeet.formats.files.tensors import check_finite, factor_problem
from lorakeet.formats.limits import check_supported, metadata_without_peft

NAME, SUFFIX, WEIGHTS, MAGIC = "gguf", ".gguf", "", gguf_header.MAGIC  # as `AdapterFormat` says
_NOTE = "lorakeet.note"  # our key, for what GGUF has no key for; llama.cpp ignores it
_ALPHA = "adapter.lora.alpha"
_MOST_BLOCKS, _MOST_HEADS = 2000, 100_000  # gguf names some hundred tensors for each declared block
_A, _B = ".weight.lora_a", ".weight.lora_b"
_MOST_PARTS = 200_000  # keys, tensors and array elements in an adapter's header, which has no vocabulary


@dataclass(frozen=True)
class GgufLayout:
    """Decides names and row orders: transformers' model type, the number of blocks, and of heads."""

    model_type: str
    blocks: int
    heads: int
    kv_heads: int
    text: str = "model."  # where the text part is in the model

    @property
    def architecture(self) -> str:
        return str(table("gguf")["architectures"][self.model_type])

    def heads_of(self, module: str) -> int:
        """The number of heads by which the rows of `module` are permuted; 0 if they stay in place."""
        return permuted_heads(self.model_type, module, self.heads, self.kv_heads)

    def names(self) -> dict[str, str]:
        """From GGUF's names to the paths of all modules that can have a pair."""
        mapped = tensor_names(self.architecture, self.blocks)
        modules = table("gguf")["modules"]
        found: dict[str, str] = {}
        for template in modules.get(self.model_type, modules[""]):
            for block in range(self.blocks if "{n}" in template else 1):
                path = template.replace("{n}", str(block))
                if (name := mapped.get_name(path)) is not None:
                    found[name] = self.text + path.removeprefix("model.") if path.startswith("model.") else path
        return found


def gguf_layout_of(config: Mapping[str, Any], where: object) -> GgufLayout:
    """The layout that a config.json describes. ConfigError for an unknown model type or missing numbers."""
    known = table("gguf")["architectures"]
    text, place = config.get("text_config"), "model."
    if isinstance(text, Mapping):  # a model with towers beside its text part
        config, place = {**config, **text}, "model.language_model."
    model_type = str(config.get("model_type", ""))
    if model_type not in known:
        raise ConfigError(
            f"{where}: the model type {model_type!r} has no known GGUF layout here; known are {', '.join(sorted(known))}."
            f"{nearest(model_type, known)} Merge the adapter into its base instead (lorakeet merge)."
        )
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv_heads = config.get("num_key_value_heads") or heads
    numbers = (blocks, heads, kv_heads)
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers)
    if not whole or blocks > _MOST_BLOCKS or max(heads, kv_heads) > _MOST_HEADS:
        names = "num_hidden_layers, num_attention_heads and num_key_value_heads"
        raise ConfigError(
            f"{where}: {names} are {numbers}; expected whole numbers of 1 or more, at most {_MOST_BLOCKS:,} layers and "
            f"{_MOST_HEADS:,} heads. Name the base that the adapter belongs to: --base."
        )
    return GgufLayout(model_type, int(blocks), int(heads), int(kv_heads), place)


@lru_cache(maxsize=8)  # building one takes 8 ms, and each layer needs it
def tensor_names(architecture: str, blocks: int) -> Any:
    """gguf's own map from transformers' names to GGUF's, for a model of so many blocks."""
    gguf = gguf_package()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(arch, blocks)


def permuted_heads(model_type: str, module: str, heads: int, kv_heads: int) -> int:
    """The number of heads by which llama.cpp permutes the rows of `module`; 0 if they stay in place."""
    if model_type not in table("gguf")["permuted"]:
        return 0
    return {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2], 0)


def permute(B: Tensor, heads: int) -> Tensor:
    """The rows of (out, …) in llama.cpp's order: within each head, halves interleaved."""
    return B.reshape(heads, 2, B.shape[0] // heads // 2, -1).transpose(1, 2).reshape(B.shape)


def unpermute(B: Tensor, heads: int) -> Tensor:
    """The inverse of `permute`."""
    return B.reshape(heads, B.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(B.shape)


def owns(tensor: str) -> bool:
    """False for every name: a GGUF file is no safetensors file."""
    return False


def write(adapter: Adapter, path: Path, *, base: BaseModel | None = None, **_unused: object) -> None:
    """Writes `adapter` to the file `path` for the model that `base` describes; the same adapter gives the same bytes.

    ConfigError names what a GGUF adapter cannot hold. The caller renames the file into place.
    """
    check_supported(adapter, "gguf", kinds=("linear", "conv1d"), dora=False, folds=True)
    if base is None:
        raise ConfigError("A GGUF adapter has its base's names and head counts; name the base: --base FOLDER or its config.json.")
    layout = gguf_layout_of(base.config(), base.path)
    names = {module: name for name, module in layout.names().items()}
    problems = Problems("The adapter cannot be written as gguf")
    for module, pair in adapter.pairs.items():
        heads = layout.heads_of(module)
        if module not in names:
            problems.add(f"{module} has no name in GGUF's {layout.architecture} layout.{nearest(module, names)}")
        elif heads and pair.B.shape[0] % (2 * heads):
            rows = pair.B.shape[0]
            problems.add(f"{module} has {rows} rows, which {heads} heads do not share evenly; is --base the right model?")
    if "lm_head" in adapter.pairs and base.config().get("tie_word_embeddings"):
        problems.add("lm_head shares its weight with the embedding in this base, so GGUF has no tensor for its pair. Merge it.")
    problems.raise_if_any()
    alphas = {float(torch.tensor(alpha_for(pair.scale, pair.rank))) for pair in adapter.pairs.values()}
    alpha = alphas.pop() if len(alphas) == 1 else None
    gguf = gguf_package()
    writer = gguf.GGUFWriter(str(path), layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    note = {"base": adapter.base, "layout": vars(layout), "metadata": metadata_without_peft(adapter)}
    writer.add_string(_NOTE, json.dumps(note, sort_keys=True, ensure_ascii=False))
    for module, pair in sorted(adapter.pairs.items()):
        B = pair.B.float() if alpha else pair.B.float() * pair.scale
        heads = layout.heads_of(module)
        for slot, factor in ((_A, pair.A.float()), (_B, permute(B, heads) if heads else B)):
            writer.add_tensor(names[module] + slot, factor.detach().cpu().contiguous().numpy().view(WholeArray))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


@reader("an adapter")
def read(path: Path, /, *, base: BaseModel | None = None, **_unused: object) -> Adapter:
    """The adapter in the file `path`. DataError lists everything that cannot be understood.

    ConfigError if neither the file nor `base` says how many blocks and heads there are.
    """
    file = GgufFile(path, most_parts=_MOST_PARTS)
    texts = {key: file.text(key) for key in ("general.type", "general.architecture", "adapter.type", _NOTE)}
    if (texts["general.type"], texts["adapter.type"]) != ("adapter", "lora"):
        raise DataError(
            f"{path} is a GGUF file of type {texts['general.type']!r}; expected 'adapter' with adapter.type 'lora' "
            f"(it says {texts['adapter.type']!r})."
        )
    note = parse_object(texts[_NOTE] or "{}", f"{path}: the key {_NOTE}", expected="a table")
    if not isinstance(note.get("metadata", {}), dict):
        raise DataError(f"{path}: the metadata in the key {_NOTE} is not a table.")
    layout = _layout_for(path, texts["general.architecture"], note, base)
    problems = Problems(f"The adapter in {path} cannot be read", DataError)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors():
        slot = next((suffix for suffix in (_A, _B) if name.endswith(suffix)), "")
        if not slot:
            problems.add(f"{path}: {name} is a kind of tensor that is not known here.")
            continue
        values = torch.from_numpy(tensor.numbers().copy())
        check_finite(values, f"{path}: {name}", problems)
        groups.setdefault(name.removesuffix(slot), {})[slot] = values
    alpha = file.value(_ALPHA)
    if not (alpha is None or (isinstance(alpha, (int, float)) and math.isfinite(alpha))):
        raise DataError(f"{path}: the key {_ALPHA} is {repr(alpha)[:80]}; expected a finite number. Fetch the file again.")
    pairs = _pairs(path, groups, layout, alpha, problems)
    if "lm_head" in pairs and base is not None and base.config().get("tie_word_embeddings"):
        problems.add(f"{path} has a pair of the head, whose weight is the embedding's in this base: llama.cpp refuses it too.")
    problems.raise_if_any()
    metadata = {str(key): str(value) for key, value in note.get("metadata", {}).items()}
    return Adapter(pairs, base=str(note.get("base", "")), metadata=metadata)


def _pairs(
    path: Path, groups: Mapping[str, Mapping[str, Tensor]], layout: GgufLayout, alpha: float | None, problems: Problems
) -> dict[str, Pair]:
    names = layout.names()
    pairs: dict[str, Pair] = {}
    for name, slots in groups.items():
        module = names.get(name)
        if module is None:
            model = f"a {layout.model_type} model with {layout.blocks} blocks"
            problems.add(f"{path}: {name} is no module of {model}.{nearest(name, names)}")
        elif missing := [slot for slot in (_A, _B) if slot not in slots]:
            problems.add(f"{path}: {name} has no {' and no '.join(slot.rpartition('.')[2] for slot in missing)}.")
        elif wrong := factor_problem(name, slots[_A], slots[_B]):
            problems.add(f"{path}: {wrong}")
        else:
            A, B, heads = slots[_A], slots[_B], layout.heads_of(module)
            if heads and B.shape[0] % (2 * heads):
                problems.add(f"{path}: {name} has {B.shape[0]} rows, which {heads} heads do not share evenly.")
                continue
            kind: Kind = "conv1d" if layout.model_type == "gpt2" and module != "lm_head" else "linear"
            B = unpermute(B, heads).contiguous() if heads else B
            pairs[module] = Pair(A, B, float(alpha or A.shape[0]), kind)
    return dict(sorted(pairs.items()))


def _layout_for(path: Path, architecture: str, note: Mapping[str, Any], base: BaseModel | None) -> GgufLayout:
    """The layout from the base, else from our note in the file."""
    if base is not None:
        layout = gguf_layout_of(base.config(), base.path)
    elif isinstance(note.get("layout"), dict):
        keys = {"blocks": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
        config = {keys.get(name, name): value for name, value in note["layout"].items()}
        layout = gguf_layout_of(config, f"{path}: {_NOTE}")
    else:
        raise ConfigError(
            f"{path} is for the architecture {architecture!r} and does not say how many blocks and heads its base has. "
            "Name the base: --base FOLDER or its config.json."
        )
    if layout.architecture != architecture:
        ours = f"{layout.architecture!r} ({layout.model_type})"
        raise DataError(f"{path} is for the architecture {architecture!r}; the base is {ours}. Name its own base.")
    return layout
