"""Writes a whole model, with an adapter merged in, as one GGUF file for llama.cpp and Ollama, tensor by tensor.

Each matrix is read, merged in fp32 by `merging/edits`, put in llama.cpp's order, rounded once to its type and written. One matrix
is in memory at a time, or only some rows if the adapter does not change it. Norms, biases and other vectors stay fp32, as
llama.cpp needs them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakeet.core.adapter import Adapter
from lorakeet.core.tiled_product import RowSource, as_matrix, parts
from lorakeet.disk import written_whole
from lorakeet.errors import Problems
from lorakeet.exporting.gguf_layout import ModelLayout, model_layout
from lorakeet.exporting.gguf_vocabulary import Vocabulary, name_for_llama_cpp, vocabulary_of
from lorakeet.exporting.llama_cpp import quantise
from lorakeet.exporting.merged_tensors import MergedTensors, Part
from lorakeet.formats.files.gguf_array import WholeArray
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.formats.files.gguf_header import gguf_package
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.formats.files.whole_output import new_output, require_free, require_new
from lorakeet.models.text.load import read_config

DIRECT = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}  # type, general.file_type
FILE_TYPE, NAME = "general.file_type", "general.name"
DIGEST = "lorakeet.adapter_sha256"  # our key: the merged adapter; other programs ignore it
# Matrices that llama.cpp multiplies in fp32 alone: norms of groups, routers and convolutions.
_WIDE = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")
_BLOCK = 32  # weights in a block of Q8_0
_TOWERS = (
    "vision_tower.", "multi_modal_projector.", "vision_model.", "audio_tower.", "embed_vision.", "embed_audio.", "visual.",
    "vision_embedder.", "merger.",
)  # fmt: skip
_PREDICTION = "the prediction of several tokens"
_NOT_WRITTEN = {
    "the vision and audio parts": (*_TOWERS, *(f"model.{name}" for name in _TOWERS)),
    _PREDICTION: ("mtp.", "model.mtp."),
}
_NUMBERED = re.compile(r"model\.layers\.(\d+)\.")
_INNER = re.compile(r"^(model\.)?language_model\.(?:model\.)?")
Progress = Callable[[int, int, str], None]  # tensors written, tensors in all, name of the last


@dataclass(frozen=True)
class GgufModel:
    """What was written: the number of tensors of each type, and notes for the reader."""

    path: Path
    bytes: int
    types: Mapping[str, int]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, notes: tuple[str, ...] = ()) -> GgufModel:
        """A file that is there."""
        return cls(path, path.stat().st_size, dict(GgufFile(path).tensor_types), notes)

    @property
    def words(self) -> str:
        """How many tensors of each type it has, the commonest first."""
        return ", ".join(f"{count:,} {name}" for name, count in sorted(self.types.items(), key=lambda item: -item[1]))



@dataclass(frozen=True)
class _Item:
    """A tensor to write. It stands in for an array in GGUFWriter: made, quantised and written some rows at a time."""

    name: str  # in the GGUF file
    shape: tuple[int, ...]
    type: str
    rows: Callable[[], RowSource]

    @property
    def kind(self) -> Any:
        return gguf_package().GGMLQuantizationType[self.type]

    @property
    def nbytes(self) -> int:
        block, size = gguf_package().GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block) * int(size)

    def tofile(self, file: Any) -> None:
        """As numpy's: appends the bytes."""
        rows = as_matrix(self.rows())
        shape = tuple(rows.shape)
        for part in parts(shape) if shape else [...]:
            values = rows[part].contiguous().numpy()  # type: ignore[index]
            gguf_package().quants.quantize(values, self.kind).view(WholeArray).tofile(file)


class GgufTensors(MergedTensors):
    """The tensors of a base with an adapter merged in, by GGUF name, computed on request: fp32, in llama.cpp's order."""

    def __init__(self, source: Path, adapter: Adapter | None) -> None:
        """ConfigError lists what does not fit, or has no name in llama.cpp's architecture."""
        super().__init__(source, adapter)
        known = read_config(source)  # with the defaults and names of the family's own class, which files may leave out
        self.layout: ModelLayout = model_layout({**known.get_text_config().to_dict(), **self.edits.config}, source)
        self._tied = self.edits.config.get("tie_word_embeddings", getattr(known, "tie_word_embeddings", False)) is True
        self.notes = [*self.edits.notes, *self.layout.notes]
        self.home = self._named()

    def _named(self) -> dict[str, Part]:
        """The parts of each tensor of the file, by GGUF name."""
        problems = Problems(f"{self.checkpoint.folder} cannot be written as GGUF")
        stored: dict[str, str] = {}
        skipped = dict.fromkeys(_NOT_WRITTEN, 0)
        for name in self.home:
            plain = _INNER.sub("", name) if name.endswith("lm_head.weight") else _INNER.sub("model.", name)
            other = next((what for what, prefixes in _NOT_WRITTEN.items() if name.startswith(prefixes)), None)
            block = _NUMBERED.match(plain)
            if block and int(block[1]) >= int(self.layout.config["num_hidden_layers"]):  # DeepSeek's and GLM's place for it
                other = _PREDICTION
            if other is not None:
                skipped[other] += 1
            elif plain != "lm_head.weight" or not self._tied:  # llama.cpp uses the embedding if there is no output.weight
                stored[plain] = name
        self.notes += [f"{count} tensors of {what} were left out." for what, count in skipped.items() if count]
        parts = self.layout.parts(stored, problems)
        problems.raise_if_any()
        return parts


def write_gguf(
    source: Path,
    adapter: Adapter | None,
    out: Path,
    *,
    tokenizer: Any,
    quant: str = "f16",
    facts: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> GgufModel:
    """Writes the model in `source` with `adapter` merged in to the new file `out`, which appears whole or not at all.

    quant: f32, f16, bf16 or q8_0; other types are made by llama.cpp from a wide file, which is then removed. `facts` go into the
    metadata, general.name as llama.cpp needs it (`name_for_llama_cpp`).
    ConfigError lists what does not fit or exists already, EnvironmentProblem what the machine lacks.
    """
    require_new(out)
    if quant not in DIRECT:
        with written_whole(out) as made:
            wide = made.with_name(f"{out.name}.wide")
            more: dict[str, Any] = {"tokenizer": tokenizer, "facts": facts, "on_progress": on_progress}
            kept = write_gguf(source, adapter, wide, quant=wide_type(source), **more)
            quantise(wide, made, quant)
        return GgufModel.of(out, kept.notes)
    merged = GgufTensors(source, adapter)
    vocabulary = vocabulary_of(tokenizer, merged.shape("token_embd.weight")[0])
    items, notes = _items(merged, DIRECT[quant][0])
    values: dict[str, str | int] = {**(facts or {}), FILE_TYPE: DIRECT[quant][1]}
    name, why = name_for_llama_cpp(str(values.pop(NAME, "")), merged.layout.architecture.name, vocabulary)
    values |= {NAME: name} if name else {}
    notes += [why] if why else []
    with new_output(out, sum(item.nbytes for item in items), "The model") as made:
        _write(made, merged.layout, vocabulary, items, values, on_progress)
    types = Counter(item.type for item in items)
    return GgufModel(out, out.stat().st_size, dict(types), (*merged.notes, *notes))


def _items(merged: GgufTensors, wanted: str) -> tuple[list[_Item], list[str]]:
    """The tensors to write, in order, and a note on matrices that need a wider type."""
    items = [_Item(name, tuple(t.shape), "F32", lambda t=t: t) for name, t in merged.layout.rope.items()]  # type: ignore[misc]
    wide = 0
    for name in merged.home:
        shape = merged.shape(name)
        kind = wanted if len(shape) > 1 and name.endswith(".weight") and not name.endswith(_WIDE) else "F32"
        if kind == "Q8_0" and shape[-1] % _BLOCK:
            kind, wide = "F16", wide + 1
        items.append(_Item(name, shape, kind, lambda name=name: merged.rows(name)))  # type: ignore[misc]
    said = f"{wide} matrices have a width that blocks of {_BLOCK} do not divide; they are stored as F16."
    return items, [said] if wide else []


def _write(
    path: Path,
    layout: ModelLayout,
    vocabulary: Vocabulary,
    items: list[_Item],
    facts: Mapping[str, str | int],
    on_progress: Progress | None,
) -> None:
    gguf = gguf_package()
    writer = gguf.GGUFWriter(str(path), layout.architecture.name)
    try:
        writer.add_type("model")
        writer.add_quantization_version(2)
        values = {**facts, **{f"{layout.architecture.name}.{key}": value for key, value in layout.metadata.items()}}
        for key, value in values.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, int(value))
        _add_vocabulary(writer, vocabulary)
        for item in items:
            if item.type in ("F32", "F16"):
                dtype = "float32" if item.type == "F32" else "float16"
                writer.add_tensor_info(item.name, item.shape, np.dtype(dtype), item.nbytes)
            else:
                shape = gguf.quant_shape_to_byte_shape(item.shape, item.kind)
                writer.add_tensor_info(item.name, shape, np.dtype("uint8"), item.nbytes, raw_dtype=item.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        header = writer.fout[0].tell()
        sizes = (header, *(item.nbytes for item in items))
        needed = sum(writer.ggml_pad(size, writer.data_alignment) for size in sizes)
        require_free(path.parent, needed, "The model", written=header)
        for number, item in enumerate(items, 1):
            writer.write_tensor_data(item)
            if on_progress is not None:
                on_progress(number, len(items), item.name)
    finally:
        writer.close()


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for key, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def wide_type(source: Path) -> str:
    """The type that loses nothing of the stored base: f32, or bf16 where all matrices are bf16."""
    kinds = {
        str(stored.dtype)
        for file in source.glob("*.safetensors")
        for stored in open_safetensors(file).tensors.values()
        if len(stored.shape) > 1
    }
    return "bf16" if kinds == {"torch.bfloat16"} else "f32"
