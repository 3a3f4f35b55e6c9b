"""GGUF adapters: llama.cpp computes with them what base and adapter compute, and its own converter's file is read right."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats import gguf
from lorakeet.formats.compare import compare_adapters
from lorakeet.formats.components import table
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.files.base_model import BaseModel, open_base
from tiny.adapters import random_adapter, random_pair
from tiny.dense import fold_into
from tiny.gguf_file import write_tiny_gguf
from tiny.llama_cpp import llama_cpp_logits
from tiny.models import tiny_model
from tiny.portable import llama_config, text_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = [1, 5, 9, 33, 60, 7, 90, 12]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]


def base_of(model: Any) -> BaseModel:
    return BaseModel(Path("tiny"), {"": model.config.to_dict()})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama as .gguf, and the model that it holds."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    return path, write_tiny_gguf(path)


@pytest.mark.parametrize("mixed", [False, True], ids=["one alpha", "mixed ranks and alphas"])
def test_llama_cpp_computes_what_base_and_adapter_compute(mixed: bool, stored: tuple[Path, Any], tmp_path: Path) -> None:
    file, model = stored
    adapter = text_adapter(mixed=mixed)
    gguf.write(adapter, tmp_path / "a.gguf", base=base_of(model))
    before, after = llama_cpp_logits(file, IDS), llama_cpp_logits(file, IDS, tmp_path / "a.gguf")
    folded = tiny_model("llama", vocab_size=model.config.vocab_size, tie_word_embeddings=True)
    folded.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = fold_into(folded, adapter)(torch.tensor([IDS])).logits[0, -1]
    assert (after - before).abs().max() > 0.1
    assert (after - expected).abs().max() <= 2e-5


def test_rows_of_a_instead_of_b_would_be_another_function(stored: tuple[Path, Any], tmp_path: Path) -> None:
    file, model = stored
    adapter = random_adapter(model, "q_proj", "k_proj")
    gguf.write(adapter, tmp_path / "right.gguf", base=base_of(model))
    heads = {"q_proj": 4, "k_proj": 2}
    wrong = {}
    for path, pair in adapter.pairs.items():
        count = heads[path.rpartition(".")[2]]
        A = gguf.permute(pair.A.t(), count).t().contiguous()
        wrong[path] = dataclasses.replace(pair, A=A, B=gguf.unpermute(pair.B, count).contiguous())
    gguf.write(Adapter(wrong), tmp_path / "wrong.gguf", base=base_of(model))
    right = llama_cpp_logits(file, IDS, tmp_path / "right.gguf")
    assert (right - llama_cpp_logits(file, IDS, tmp_path / "wrong.gguf")).abs().max() > 1e-2


def test_reads_what_llama_cpps_converter_wrote(tmp_path: Path) -> None:
    adapter = read_adapter(GOLDEN / "gguf.gguf", base=open_base(llama_config(tmp_path)))
    expected = load_file(GOLDEN / "gguf.delta.safetensors")
    assert adapter.pairs.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(adapter.pairs[path].delta(), delta, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"architecture 'llama' and does not say how many blocks and heads .* --base"):
        read_adapter(GOLDEN / "gguf.gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_there_and_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    adapter = random_adapter(model)
    gguf.write(adapter, tmp_path / "a.gguf", base=base_of(model))
    back = gguf.read(tmp_path / "a.gguf")
    assert compare_adapters(adapter, back).equal
    assert {pair.kind for pair in back.pairs.values()} == {pair.kind for pair in adapter.pairs.values()}
    assert compare_adapters(adapter, gguf.read(tmp_path / "a.gguf", base=base_of(model))).equal


@pytest.mark.parametrize("model_type", table("gguf")["architectures"])
def test_every_listed_architecture_has_names(model_type: str) -> None:
    layout = gguf.GgufLayout(model_type, 2, 4, 2)
    names = layout.names()
    assert len(names) >= 5 and len(set(names.values())) == len(names)
    assert any(name.startswith("blk.1.") for name in names)


def test_what_cannot_be_held_is_named_with_a_way_that_works(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    base, out = base_of(model), tmp_path / "a.gguf"
    plain = random_adapter(model, "q_proj")
    cases: list[tuple[Adapter, BaseModel | None, str]] = [
        (random_adapter(model, "q_proj", dora=True), base, r"cannot hold DoRA's magnitudes: model\.layers\.0.*merge.*--rank N"),
        (random_adapter(model, "q_proj", "embed_tokens"), base, r"kind embedding: model\.embed_tokens"),
        (dataclasses.replace(plain, extras={"lm_head.weight": torch.ones(2, 2)}), base, r"modules_to_save\): lm_head\.weight"),
        (plain, None, "--base"),
        (random_adapter(model, "lm_head"), base, "lm_head shares its weight"),
        (Adapter({"model.layers.0.self_attn.q_prj": random_pair("linear", torch.ones(32, 32))}), base, "Did you mean .*q_proj"),
        (plain, BaseModel(Path("x"), {"": {"model_type": "lama"}}), r"model type 'lama'.*Did you mean 'llama'"),
        (plain, BaseModel(Path("x"), {"": {"model_type": "llama"}}), r"are \(None, None, None\); expected whole numbers"),
        (Adapter({"model.layers.0.self_attn.q_proj": random_pair("linear", torch.ones(12, 32))}), base, "do not share evenly"),
    ]
    for adapter, told, message in cases:
        with pytest.raises(ConfigError, match=message):
            gguf.write(adapter, out, base=told)
        assert not out.exists()


def test_damaged_and_foreign_files_are_refused(stored: tuple[Path, Any], tmp_path: Path) -> None:
    file, model = stored
    good = tmp_path / "good.gguf"
    gguf.write(random_adapter(model, "q_proj"), good, base=base_of(model))
    data = good.read_bytes()
    bad = tmp_path / "bad.gguf"
    for cut in (6, 40, len(data) // 3, len(data) - 50):
        bad.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"(?i)bad\.gguf.*fetch (it|the file) again"):
            gguf.read(bad)
    bad.write_bytes(data[:16] + (2**60).to_bytes(8, "little") + data[24:])
    with pytest.raises(DataError, match="is not a whole GGUF file"):
        gguf.read(bad)
    bad.write_bytes(b"GGML" + data[4:])
    with pytest.raises(DataError, match="begins with b'GGML'"):
        gguf.read(bad)
    with pytest.raises(DataError, match=r"is a GGUF file of type 'model'|of type ''"):
        gguf.read(file)
    with pytest.raises(DataError, match=r"architecture 'llama'; the base is 'qwen2'"):
        gguf.read(good, base=base_of(tiny_model("qwen2")))


@pytest.mark.parametrize("value", [b"\0\0\xc0\x7f", b"\0\0\x80\x7f"], ids=["nan", "inf"])
def test_an_alpha_that_is_no_number_is_named(value: bytes, tmp_path: Path) -> None:
    model = tiny_model("llama")
    gguf.write(random_adapter(model, "q_proj", alpha=12.0), tmp_path / "a.gguf", base=base_of(model))
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    place = data.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 4
    data[place : place + 4] = value
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(DataError, match=r"the key adapter\.lora\.alpha is (nan|inf); expected a finite number"):
        gguf.read(tmp_path / "a.gguf")


def test_tensors_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    gguf.write(random_adapter(model, "q_proj"), tmp_path / "a.gguf", base=base_of(model))
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    for name in (f"blk.{block}.attn_q.weight.lora_{side}".encode() for block in (0, 1) for side in "ab"):
        offset = data.index(name) + len(name) + struct.calcsize("<IQQI")
        data[offset : offset + 8] = bytes(8)
    header = data.index(b"blk.1.attn_q.weight.lora_b") + 64
    (tmp_path / "a.gguf").write_bytes(data[: header + 1024])
    with pytest.raises(DataError, match=r"tensor 'blk.* begins inside 'blk"):
        gguf.read(tmp_path / "a.gguf")
