"""`export.gguf_model`: what is written is what llama.cpp computes, for every family, with an adapter folded in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.core.tiled_product import PART, parts
from lorakeet.errors import ConfigError, DataError
from lorakeet.export.compare_stored import PART_BYTES
from lorakeet.export.gguf_model import DIGEST, _Item, _Stored, write_gguf
from lorakeet.export.llama_cpp import LlamaCpp
from lorakeet.export.merged_tensors import Fp32Rows
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors
from lorakeet.models.text.load import load_tokenizer
from tiny.adapters import random_adapter
from tiny.dense import fold_into
from tiny.held import held_bytes
from tiny.models import save_tiny_llama

TEXT = "<|im_start|>user\nIt's 123 o'clock, né?\n\n  two  spaces<|im_end|>\n<|im_start|>assistant\n"
# ggml looks Gemma's GELU up in a table of half-precision numbers
LIMITS = {"gemma2": 5e-3, "gemma3": 5e-3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    ("llama", {"attention_bias": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("phi3", {"tie_word_embeddings": False, "sliding_window": None}),
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_llama_cpp_computes_the_merged_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base", family=family, **changes)
    tokenizer = load_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    adapter = random_adapter(model)
    written = write_gguf(folder, adapter, tmp_path / "model.gguf", tokenizer=tokenizer, quant="f32", facts={DIGEST: "abc"})
    fold_into(model, adapter)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    with LlamaCpp(written.path, context=128) as engine:
        assert engine.tokenise(TEXT) == ids
        torch.testing.assert_close(engine.logits(ids), wanted, atol=LIMITS.get(family, 2e-5), rtol=0)
        assert engine.ends(tokenizer.eos_token_id) and engine.vocabulary == len(tokenizer)
    file = GgufFile(written.path)
    assert file.value(DIGEST) == "abc" and not file.is_adapter and set(file.types) == {"F32"}


@pytest.mark.parametrize(("quant", "limit"), [("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.5)])
def test_narrow_types_differ_by_their_rounding(quant: str, limit: float, tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_folder)
    written = write_gguf(tiny_llama_folder, None, tmp_path / "model.gguf", tokenizer=tokenizer, quant=quant)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder, attn_implementation="eager")
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad(), LlamaCpp(written.path, context=128) as engine:
        difference = float((engine.logits(ids) - model(torch.tensor([ids])).logits[0]).abs().max())
    assert 0 < difference < limit
    stored = dict(GgufFile(written.path).tensors())
    assert torch.equal(stored["output_norm.weight"][:], model.model.norm.weight)  # vectors stay fp32
    narrow = written.types[quant.upper()]
    assert narrow >= 13 and narrow + (written.types.get("F16", 0) if narrow == 13 else 0) == 15 and written.types["F32"] == 5


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0"])
def test_parts_of_a_tensor_are_written_as_the_whole_is(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_llama(tmp_path / "base", tie_word_embeddings=False)
    adapter = random_adapter(transformers.AutoModelForCausalLM.from_pretrained(folder))
    given = {"tokenizer": load_tokenizer(folder), "quant": quant}
    whole = write_gguf(folder, adapter, tmp_path / "whole.gguf", **given).path.read_bytes()
    tensors = {name: rows[:] for name, rows in GgufFile(tmp_path / "whole.gguf").tensors()}
    cut: list[int] = []

    def few(shape: tuple[int, ...]) -> Iterator[slice]:
        yield from (found := list(parts(shape, 999)))
        cut.append(len(found))

    monkeypatch.setattr("lorakeet.export.gguf_model.parts", few)
    assert write_gguf(folder, adapter, tmp_path / "parts.gguf", **given).path.read_bytes() == whole and max(cut) > 5
    for name, rows in GgufFile(tmp_path / "parts.gguf").tensors():
        read = torch.cat([rows[part] for part in parts(tuple(rows.shape), 999)])
        assert torch.equal(read, tensors[name]) and read.dtype == rows.dtype


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("shape", [(12_000, 256), (4, 3000, 256)], ids=["matrix", "experts"])
def test_of_a_tensor_that_nothing_changes_a_part_is_held_while_it_is_written(
    shape: tuple[int, ...], quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of a stack of experts has more numbers than a part."""
    save_tensors(tmp_path / "x", {"a": torch.randn(shape).bfloat16()}, metadata={})
    file = open_safetensors(tmp_path / "x")
    number = 1 << 15
    monkeypatch.setattr("lorakeet.export.gguf_model.parts", partial(parts, numbers=number))
    item = _Item("a", shape, quant, lambda: Fp32Rows(file.rows("a")))
    with (tmp_path / "out").open("wb") as out, held_bytes() as most:
        _Stored(item).tofile(out)
    assert (tmp_path / "out").stat().st_size == _Stored(item).nbytes
    assert 4 * number <= most() <= PART_BYTES // PART * number < 2 * 12_000 * 256


def test_a_width_that_blocks_do_not_divide_is_said_and_kept_wider(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base", intermediate_size=40)
    written = write_gguf(folder, None, tmp_path / "model.gguf", tokenizer=load_tokenizer(folder), quant="q8_0")
    assert written.types["F16"] == 2 and any("2 matrices have a width" in note for note in written.notes)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tiny_llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="never overwritten"):
        write_gguf(tiny_llama_folder, None, out, tokenizer=load_tokenizer(tiny_llama_folder))

    def stop(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(
            tiny_llama_folder, None, tmp_path / "b.gguf", tokenizer=load_tokenizer(tiny_llama_folder), on_progress=stop
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"] and out.read_text() == "mine"
    with pytest.raises(DataError, match="is not a GGUF file"):
        GgufFile(out)


def test_the_file_is_on_the_disk_before_it_gets_its_name(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.gguf"
    synced: list[tuple[int, int, bool]] = []

    def note(number: int) -> None:
        found = os.fstat(number)
        synced.append((found.st_ino, found.st_size, out.exists()))

    monkeypatch.setattr("os.fsync", note)
    write_gguf(tiny_llama_folder, None, out, tokenizer=load_tokenizer(tiny_llama_folder))
    assert synced == [(out.stat().st_ino, out.stat().st_size, False)]


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base", family="gemma2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapter = random_adapter(model, "embed_tokens")  # changes the embedding but not the head that shares it
    with pytest.raises(ConfigError, match=r"lm_head\.weight has no name in llama\.cpp's gemma2"):
        write_gguf(folder, adapter, tmp_path / "model.gguf", tokenizer=load_tokenizer(folder))
