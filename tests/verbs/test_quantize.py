"""`lorakeet quantize`: what it writes is what is packed while loading, and transformers with bitsandbytes computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, DataError
from lorakeet.models.files.quantized import linear_layers
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.verbs.options import QuantizeOptions
from lorakeet.verbs.quantize import quantize, write_gptq
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, run, write_rows

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


def loaded(folder: Path) -> TextModel:
    spec = ModelSpec(path=str(folder), dtype="float32", products="float32", attention="eager")
    return load_text_model(spec, say=lambda line: None)


def bases_of(text: TextModel) -> dict[str, GptqBase]:
    return {path: module for path, module in text.model.named_modules() if isinstance(module, GptqBase)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(60))


@pytest.fixture(scope="module")
def made(tiny_llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made through the command line: 4 bits in groups of 16, symmetric."""
    out = tmp_path_factory.mktemp("gptq") / "made"
    words = ["quantize", str(tiny_llama_folder), "--method", "gptq", "--group-size", "16", "--calibration", str(data)]
    assert main([*words, "--out", str(out)]) == 0
    return out


def test_the_folder_has_the_standard_layout(made: Path, tiny_llama_folder: Path) -> None:
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True, "checkpoint_format": "gptq",
    }  # fmt: skip
    tensors, before = load_file(made / "model.safetensors"), load_file(tiny_llama_folder / "model.safetensors")
    down = "model.layers.1.mlp.down_proj"
    shapes = {part: (tensors[f"{down}.{part}"].dtype, tuple(tensors[f"{down}.{part}"].shape)) for part in ("qweight", "qzeros")}
    assert shapes == {"qweight": (torch.int32, (6, 32)), "qzeros": (torch.int32, (3, 4))}
    assert tensors[f"{down}.scales"].dtype == torch.float16 and tensors[f"{down}.g_idx"].tolist() == [c // 16 for c in range(48)]
    assert bool((tensors[f"{down}.qzeros"] == 0x77777777).all()), "zero point 8, kept as 7"
    kept = set(before) & set(tensors)
    assert all(torch.equal(before[name], tensors[name]) for name in kept)
    assert len(set(before) - kept) == 14 and all(name.endswith("proj.weight") for name in set(before) - kept)


def test_a_budget_changes_nothing_of_it_and_is_reported(
    made: Path, tiny_llama_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(tiny_llama_folder), "--method", "gptq", "--group-size", "16", "--calibration", str(data)]
    assert main([*words, "--out", str(out), "--memory", "12GiB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "planned of 12GiB for quantising" in said and "in use at most, of 12GiB allowed" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in made.iterdir()}


@pytest.mark.parametrize(
    "layout",
    [
        GptqLayout(2, 16, True, True),
        GptqLayout(3, -1, False, False, "gptq_v2"),
        GptqLayout(8, 16, True, False, "gptq_v2"),
        GptqLayout(4, 16, False, False, "gptq"),
    ],
    ids=str,
)
def test_every_layout_is_read_back(layout: GptqLayout, data: Path, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source", intermediate_size=64, num_key_value_heads=4)
    options = QuantizeOptions(str(source), "gptq", tmp_path / "out", calibration=str(data), calibration_rows=40)
    _, errors = write_gptq(options, layout, quiet())
    dense, text = loaded(source), loaded(tmp_path / "out")
    bases = bases_of(text)
    assert len(bases) == len(errors) == 14 and {base.bits for base in bases.values()} == {layout.bits}
    allowed = {2: 0.9, 3: 0.5, 4: 0.2, 8: 0.02}[layout.bits]
    for path, base in bases.items():
        weight = dense.model.get_submodule(path.removesuffix(".base")).weight
        assert 0 < float((base.dense() - weight).norm() / weight.norm()) < allowed
        assert bool((base.g_idx.sort().values == base.g_idx).all()) or layout.desc_act


@pytest.mark.slow
def test_training_reaches_every_adapter_tensor(made: Path, data: Path, tmp_path: Path) -> None:
    run(made, data, tmp_path / "run", {"train.steps": "4", "train.evaluate_every": "2"})
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(bool(tensor.any()) for tensor in tensors.values())
    assert json.loads((tmp_path / "run" / "certificate.json").read_text())["passed"]


def test_damaged_folders_are_refused_with_every_tensor(made: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(made, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = torch.zeros(5, 48, dtype=torch.float16)
    del tensors["model.layers.1.self_attn.q_proj.qzeros"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError) as caught:
        loaded(broken)
    assert "up_proj.scales' is float16 (5, 48)" in str(caught.value) and "q_proj.qzeros' is missing" in str(caught.value)


def test_the_settings_may_lie_in_a_file_of_their_own(made: Path, tmp_path: Path) -> None:
    older = shutil.copytree(made, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    settings = config.pop("quantization_config")
    (older / "config.json").write_text(json.dumps(config))
    (older / "quantize_config.json").write_text(json.dumps({key: settings[key] for key in ("bits", "group_size", "sym")}))
    ours, theirs = bases_of(loaded(older)), bases_of(loaded(made))
    assert len(ours) == 14 and all(torch.equal(base.dense(), theirs[path].dense()) for path, base in ours.items())


def test_wrong_settings_are_all_said_and_nothing_is_written(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError) as caught:
        quantize(
            QuantizeOptions(str(tiny_llama_folder), method="gptq", out=out, bits=5, group_size=0, head="quantize"),
            console=quiet(),
        )
    for words in ("--bits is 5", "--group-size is 0", "--head is quantize", "--calibration is missing"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"down_proj\): 48 inputs, no multiple of the group size 32"):
        quantize(
            QuantizeOptions(str(tiny_llama_folder), method="gptq", out=out, group_size=32, calibration=str(data)), console=quiet()
        )
    with pytest.raises(DataError, match="the widest layer has 48 inputs"):
        few = {"calibration": str(data), "calibration_rows": 1, "calibration_tokens": 20}
        quantize(QuantizeOptions(str(tiny_llama_folder), method="gptq", out=out, group_size=16, **few), console=quiet())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_is_not_packed_again(made: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds quantised weights \(gptq\)"):
        quantize(
            QuantizeOptions(str(made), method="gptq", out=tmp_path / "out", group_size=16, calibration=str(data)), console=quiet()
        )
