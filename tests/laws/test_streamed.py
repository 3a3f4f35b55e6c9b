"""A streamed run is the resident one: every loss, gradient norm and adapter byte of every step, on every kind of base."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lorakeet.core.spec import LoraSpec
from lorakeet.memory.spill import Spill
from lorakeet.quant.gguf import BLOCK_TYPES, GgufBase
from tiny.families import usual
from tiny.float_folders import fp8_folder
from tiny.gguf_file import write_tiny_gguf
from tiny.gptq_folder import BITS, SIZES, save_mixed_gptq
from tiny.models import save_tiny_llama
from tiny.streams import loaded, trained

STEPS = 20  # of a run in fp32 and one in bf16; the others take FEW: the last one has changed A, B and moments
FEW = 3
GGUF_TYPES = (*BLOCK_TYPES, "F16", "BF16")


def both(
    folder: Path, tmp_path: Path, *, steps: int, base: dict[str, Any], lora: dict[str, Any], resident: Any = None,
    **streaming: Any,
) -> None:  # fmt: skip
    """Trains resident, unless that was done before, and streamed, and compares."""
    spec = LoraSpec(**{"rank": 4, "alpha": 12.0, **lora})
    resident = resident or trained(loaded(folder, **base), tmp_path / "resident", steps=steps, lora=spec)
    text = loaded(folder, tmp_path / "store", **base)
    assert text.streamed is not None and all(p.is_meta for p in text.streamed.blocks[0].original.parameters())
    streamed = trained(text, tmp_path / "streamed", steps=steps, lora=spec, **streaming)
    assert len(set(resident[0])) > steps
    assert streamed == resident


DTYPES, ADAPTERS = ("float32", "bfloat16"), ("lora", "dora")
PAIRS = [  # each base with each dtype and each adapter, and each dtype with each adapter
    ("none", "float32", "lora"), ("none", "bfloat16", "dora"), ("nf4", "float32", "dora"), ("nf4", "bfloat16", "lora"),
    ("int8", "float32", "lora"), ("int8", "bfloat16", "dora"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype", "variant"), usual(PAIRS, product(("none", "nf4", "int8"), DTYPES, ADAPTERS)))
def test_every_base_and_variant_and_dtype(method: str, dtype: str, variant: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    steps = STEPS if variant == "lora" and (method, dtype) in (("none", "float32"), ("nf4", "bfloat16")) else FEW
    streaming = {"spill": Spill(tmp_path)} if variant == "dora" else {"together": 2} if dtype == "bfloat16" else {}
    both(folder, tmp_path, steps=steps, base={"method": method, "dtype": dtype}, lora={"variant": variant}, **streaming)


ATTENTION, DOWN = ("q_proj", "v_proj"), ("down_proj",)


@pytest.mark.parametrize(
    ("targets", "family"), usual([(ATTENTION, "llama"), (DOWN, "gemma2")], product((ATTENTION, DOWN), ("llama", "gemma2")))
)
def test_blocks_whose_mlp_carries_no_pairs(targets: tuple[str, ...], family: str, tmp_path: Path) -> None:
    """In bf16 and of widths that the native code takes: a streamed forward pass has no gradients, and goes the same way."""
    shape = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    folder = save_tiny_llama(tmp_path / "model", family=family, num_hidden_layers=3, **shape)
    both(folder, tmp_path, steps=FEW, base={"dtype": "bfloat16"}, lora={"target_modules": targets}, together=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_in_fp8(dtype: str, tmp_path: Path) -> None:
    folder = fp8_folder(save_tiny_llama(tmp_path / "model", num_hidden_layers=3), tmp_path / "fp8")
    both(folder, tmp_path, steps=FEW, base={"dtype": dtype}, lora={})


@pytest.mark.slow
def test_products_in_int8(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    both(folder, tmp_path, steps=FEW, base={"method": "int8", "int8_products": True, "dtype": "bfloat16"}, lora={}, together=2)


IN_PARTS = ("lorakeet.quant.packed.PART_BYTES", 256 * 64 * 4)  # half of the rows of gate and up of five_blocks


@pytest.fixture(scope="module")
def five_blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model, and its resident run."""
    place = tmp_path_factory.mktemp("five")
    folder = save_tiny_llama(place / "model", num_hidden_layers=5, hidden_size=64, intermediate_size=512)
    spec = LoraSpec(rank=4, alpha=12.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*IN_PARTS)
        return folder, trained(loaded(folder, method="nf4"), place / "resident", steps=FEW, lora=spec)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_however_many_blocks_stay_and_however_much_is_unpacked_at_once(
    slots: int, five_blocks: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, resident = five_blocks
    monkeypatch.setattr(*IN_PARTS)
    both(folder, tmp_path, steps=FEW, base={"method": "nf4", "slots": slots}, lora={}, resident=resident, together=2)


@pytest.mark.slow
def test_nf4_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.quant.nf4.has_bitsandbytes", lambda device: False)
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    both(folder, tmp_path, steps=FEW, base={"method": "nf4"}, lora={}, together=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "variant"), usual([("float32", "dora"), ("bfloat16", "lora")], product(DTYPES, ADAPTERS))
)
def test_gguf_blocks_of_every_type(dtype: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file in which each matrix is of another type: what is streamed is laid out block by block, whatever stands in it."""
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_tiny_gguf(file, GGUF_TYPES, hidden_size=256, intermediate_size=256)
    held = {base.kind for base in loaded(file, method="gguf").model.modules() if isinstance(base, GgufBase)}
    assert held == set(BLOCK_TYPES) and len(GGUF_TYPES) < 14
    both(file, tmp_path, steps=FEW, base={"method": "gguf", "dtype": dtype}, lora={"variant": variant}, together=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2_moe", "phi3", "mistral"])
def test_other_families(family: str, tmp_path: Path) -> None:
    changes = {"attn_pdrop": 0.1, "tie_word_embeddings": True} if family == "gpt2" else {}
    folder = save_tiny_llama(tmp_path / "model", family=family, **changes)
    both(folder, tmp_path, steps=FEW, base={}, lora={}, together=3)


WITHIN_BLOCKS: list[dict[str, Any]] = [{"dropout": 0.2}, {"start": "pissa"}, {"layers": "top:1"}]
AT_THE_ENDS: list[dict[str, Any]] = [
    {"target_modules": ("q_proj", "lm_head", "embed_tokens")},
    {"target_modules": ("lm_head",)},
    {"extra_modules": ("lm_head", "input_layernorm")},
    {"new_tokens": ("<new>",)},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "lora"),
    usual(
        [*((False, lora) for lora in [*WITHIN_BLOCKS, *AT_THE_ENDS]), *((True, lora) for lora in AT_THE_ENDS)],
        product((False, True), [*WITHIN_BLOCKS, *AT_THE_ENDS]),
    ),
    ids=str,
)
def test_whatever_is_trained(lora: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    if tied and "lm_head" in lora.get("extra_modules", ()):
        lora = {**lora, "extra_modules": ("input_layernorm",)}
    folder = save_tiny_llama(tmp_path / "model", tie_word_embeddings=tied, num_hidden_layers=3)
    both(folder, tmp_path, steps=FEW, base={}, lora=lora, together=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_format", "dtype", "variant"),
    usual([("gptq", "float32", "lora"), ("gptq_v2", "bfloat16", "dora")], product(("gptq", "gptq_v2"), DTYPES, ADAPTERS)),
)
def test_gptq_of_every_size_in_one_model(zero_format: Any, dtype: str, variant: str, tmp_path: Path) -> None:
    settings = save_mixed_gptq(tmp_path / "gptq", zero_format)
    assert {(own["bits"], own["group_size"]) for own in settings.values()} == set(product(BITS, SIZES))
    assert len({(own["sym"], own["desc_act"]) for own in settings.values()}) == 4
    both(tmp_path / "gptq", tmp_path, steps=FEW, base={"dtype": dtype}, lora={"variant": variant}, together=2)
