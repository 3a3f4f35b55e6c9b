"""`lorakeet quantize`: what it writes is what is packed while loading, and transformers with bitsandbytes computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.models.files.quantized import linear_layers
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.options import QuantizeOptions
from lorakeet.workflows.quantize import LAYOUTS, _part, bytes_of_packing, quantize
from tiny.held import HeldBytes
from tiny.models import save_tiny_llama
from tiny.runs import quiet

# Widths in multiples of 64: with others bitsandbytes 0.50's AVX-512 kernel reads wrong scales.
SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2_moe": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "gpt2": {"n_embd": 64, "n_positions": 256},
}


def eager(path: Path, **settings: Any) -> TextModel:
    spec = ModelSpec(path=str(path), dtype="float32", products="float32", attention="eager", **settings)
    return load_text_model(spec, say=lambda line: None)


@pytest.mark.parametrize(("family", "head"), [*((family, "keep") for family in SIZES), ("llama", "quantize")])
def test_transformers_with_bitsandbytes_computes_the_same(family: str, head: Any, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source", family=family, **SIZES[family], tie_word_embeddings=head == "keep")
    result = quantize(QuantizeOptions(str(source), method="nf4", out=tmp_path / "out", head=head), console=quiet())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    ours = eager(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    theirs.train()  # in eval mode its CPU path rounds everything to bf16; these models have no dropout
    with torch.no_grad():
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        mine, other = ours.model(**arguments).logits, theirs(**arguments).logits
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    from bitsandbytes.nn import Linear4bit

    assert sum(isinstance(module, Linear4bit) for module in theirs.modules()) == len(result.error)
    assert 0.05 < result.worst[1] < 0.15


def test_a_folder_that_transformers_wrote_is_read(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source", **SIZES["llama"])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    theirs.save_pretrained(tmp_path / "out")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "out")
    assert same_buffers(eager(tmp_path / "out"), eager(source, quantize=QuantSpec(method="nf4"))) == 14


def same_buffers(one: TextModel, other: TextModel) -> int:
    """How many packed weights the two have, which must be equal to the last bit."""
    mine, theirs = ([m for m in text.model.modules() if isinstance(m, PackedBase)] for text in (one, other))
    for base, twin in zip(mine, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(base.buffers(), twin.buffers(), strict=True))
    return len(mine)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_folder_holds_what_loading_packs(method: Any, tiny_llama_folder: Path, tmp_path: Path) -> None:
    result = quantize(QuantizeOptions(str(tiny_llama_folder), method=method, out=tmp_path / "out"), console=quiet())
    stored = eager(tmp_path / "out")
    packed = eager(tiny_llama_folder, quantize=QuantSpec(method=method))
    assert same_buffers(stored, packed) == len(result.error) == 14
    assert list(linear_layers(stored.model)) == ["lm_head"]
    assert result.to_mapping()["packed"] == 14


def test_int8_is_said_to_be_our_own_and_transformers_refuses_it(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_llama_folder), "--method", "int8", "--out", str(tmp_path / "out")]) == 0
    assert "no other program reads" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_as_json(tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny_llama_folder), "--method", "nf4", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "nf4" and found["worst_relative_error"]["error"] < 0.15


def test_what_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="never overwritten"):
        quantize(QuantizeOptions(str(tiny_llama_folder), method="nf4", out=tmp_path / "there"), console=quiet())
    with pytest.raises(ConfigError, match=r"model\.quantize\.head"):
        quantize(QuantizeOptions(str(tiny_llama_folder), method="nf4", out=tmp_path / "out", head="quantize"), console=quiet())
    quantize(QuantizeOptions(str(tiny_llama_folder), method="int8", out=tmp_path / "packed"), console=quiet())
    with pytest.raises(ConfigError, match="quantised weights"):
        quantize(QuantizeOptions(str(tmp_path / "packed"), method="nf4", out=tmp_path / "twice"), console=quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "there"]


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_a_weight_holds_what_is_planned(method: str, dtype: torch.dtype, transposed: bool, tmp_path: Path) -> None:
    """Never more; the weight as it was read is counted with what packing makes."""
    weight = torch.randn(1024, 2304).to(dtype)
    save_file({"w": weight}, tmp_path / "one.safetensors")
    layer = Conv1D(2304, 1024) if transposed else nn.Linear(2304, 1024, bias=False)
    part = _part("w", open_safetensors(tmp_path / "one.safetensors"), layer, LAYOUTS[method], {})
    with HeldBytes() as held:
        part.make()
    most = held.peak + weight.nbytes  # which torch does not make
    assert most <= bytes_of_packing(weight.numel(), dtype) <= 2.5 * most
