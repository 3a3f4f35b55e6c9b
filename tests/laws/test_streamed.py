"""A streamed run is the resident one: every loss, gradient norm and adapter byte over 20 steps, on every kind of base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli.main import main
from lorakeet.core.spec import LoraSpec
from tiny.gguf_file import write_tiny_gguf
from tiny.models import save_tiny_llama
from tiny.runs import reviews, write_rows
from tiny.streams import loaded, trained

STEPS = 20


def both(folder: Path, tmp_path: Path, *, steps: int, base: dict[str, Any], lora: dict[str, Any], **streaming: Any) -> None:
    """Trains resident and streamed, and compares."""
    spec = LoraSpec(**{"rank": 4, "alpha": 12.0, **lora})
    resident = trained(loaded(folder, **base), tmp_path / "resident", steps=steps, lora=spec)
    text = loaded(folder, tmp_path / "store", **base)
    assert text.streamed is not None and all(p.is_meta for p in text.streamed.blocks[0].original.parameters())
    streamed = trained(text, tmp_path / "streamed", steps=steps, lora=spec, **streaming)
    assert len(set(resident[0])) > steps
    assert streamed == resident


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_every_base_and_variant_and_dtype(method: str, dtype: str, variant: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    steps = STEPS if variant == "lora" else 5
    streaming = {"scratch": tmp_path} if variant == "dora" else {"together": 2} if dtype == "bfloat16" else {}
    both(folder, tmp_path, steps=steps, base={"method": method, "dtype": dtype}, lora={"variant": variant}, **streaming)


def test_products_in_int8(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    both(folder, tmp_path, steps=5, base={"method": "int8", "int8_products": True, "dtype": "bfloat16"}, lora={}, together=2)


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_however_many_blocks_stay_and_however_much_is_unpacked_at_once(
    slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=5, hidden_size=64, intermediate_size=512)
    base = {"method": "nf4", "slots": slots}
    monkeypatch.setattr("lorakeet.quant.packed.PART_BYTES", 256 * 64 * 4)  # half of the rows of gate and up
    both(folder, tmp_path, steps=5, base=base, lora={}, together=2)


@pytest.mark.parametrize("kind", ["Q4_1"])
def test_a_gguf_base(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", kind)
    both(tmp_path / "tiny.gguf", tmp_path, steps=STEPS, base={"method": "gguf"}, lora={})


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2_moe", "phi3", "mistral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    changes = {"attn_pdrop": 0.1, "tie_word_embeddings": True} if family == "gpt2" else {}
    folder = save_tiny_llama(tmp_path / "model", family=family, **changes)
    both(folder, tmp_path, steps=4, base={}, lora={}, together=3)


@pytest.mark.parametrize(
    "lora",
    [
        {"dropout": 0.2},
        {"start": "pissa"},
        {"layers": "top:1"},
        {"target_modules": ("q_proj", "lm_head", "embed_tokens")},
        {"target_modules": ("lm_head",)},
        {"extra_modules": ("lm_head", "input_layernorm")},
        {"new_tokens": ("<new>",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_whatever_is_trained(lora: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    if tied and "lm_head" in lora.get("extra_modules", ()):
        lora = {**lora, "extra_modules": ("input_layernorm",)}
    folder = save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied, num_hidden_layers=3)
    both(folder, tmp_path, steps=4, base={}, lora=lora, together=2)


def test_a_gptq_base(tmp_path: Path) -> None:
    folder, rows = save_tiny_llama(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", reviews(40))
    words = ["quantize", str(folder), "--method", "gptq", "--group-size", "16", "--calibration", str(rows)]
    assert main([*words, "--out", str(tmp_path / "gptq")]) == 0
    both(tmp_path / "gptq", tmp_path, steps=STEPS, base={}, lora={})
