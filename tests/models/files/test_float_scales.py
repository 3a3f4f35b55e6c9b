"""Folders in FP8, int8, int4 and MXFP4: the model computes what its dequantised weights do, is planned, trained and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.merging.dequantise import open_dequantised
from lorakeet.models.files.float_scales import scaled_block
from lorakeet.models.files.packing import packing_of
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.quant.fp8 import Fp8Base
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.pack_quantized import PackQuantizedBase
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack
from tiny import family_columns
from tiny.float_folders import by_hand, fp8_folder, int8_folder, mxfp4_folder, words_folder
from tiny.models import save_tiny_llama

IDS = [5, 17, 3, 101, 44, 9, 250, 31]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense") / "model")


def loaded(folder: Path) -> TextModel:
    return load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda line: None)


def live(text: TextModel) -> torch.Tensor:
    row = Example(np.array(IDS), np.arange(len(IDS)) > 0, "0", None, False)
    with torch.no_grad():
        return text.head(text.hidden(pack_examples([row])))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, :-1]


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_dequantised(folder)
    return {name: checkpoint.read(name) for name in checkpoint.home}


def in_transformers(folder: Path) -> Any:
    """transformers' own model with the weights of `dequantised`."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    lost = model.load_state_dict(dequantised(folder), strict=False)
    assert not lost.unexpected_keys and set(lost.missing_keys) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("block", [(16, 16), (1, 16), None])
def test_fp8_is_read_packed_and_computes_what_transformers_dequantises(llama: Path, block: Any, tmp_path: Path) -> None:
    folder = fp8_folder(llama, tmp_path / "fp8", block=block)
    text = loaded(folder)
    bases = [module for module in text.model.modules() if isinstance(module, PackedBase)]
    assert len(bases) == 14 and all(isinstance(base, Fp8Base) and base.packed.dtype == torch.uint8 for base in bases)
    settings = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    torch.testing.assert_close(live(text), logits(theirs.eval()), atol=1e-5, rtol=1e-5)


def test_compressed_tensors_are_read_in_fp8_and_int8(llama: Path, tmp_path: Path) -> None:
    floating = fp8_folder(llama, tmp_path / "fp8", method="compressed-tensors")
    whole = int8_folder(llama, tmp_path / "int8")
    for folder, kind in ((floating, Fp8Base), (whole, Int8Base)):
        text = loaded(folder)
        bases = [module for module in text.model.modules() if isinstance(module, PackedBase)]
        assert len(bases) == 14 and all(isinstance(base, kind) for base in bases)
        torch.testing.assert_close(live(text), logits(in_transformers(folder)), atol=1e-5, rtol=1e-5)
    stored = load_file(whole / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(dequantised(whole)[name], stored[name].float() * stored[f"{name}_scale"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_four_bits_are_read_packed_planned_and_dequantised(llama: Path, symmetric: bool, tmp_path: Path) -> None:
    folder = words_folder(llama, tmp_path / "int4", symmetric=symmetric)
    text = loaded(folder)
    bases = {path: module for path, module in text.model.named_modules() if isinstance(module, PackedBase)}
    assert len(bases) == 14 and all(isinstance(base, PackQuantizedBase) for base in bases.values())
    torch.testing.assert_close(live(text), logits(in_transformers(folder)), atol=1e-5, rtol=1e-5)
    stored, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    dense = load_file(llama / "model.safetensors")[name]
    steps = stored[f"{name}_scale"].float().repeat_interleave(16, dim=1)
    assert ((dequantised(folder)[name] - dense).abs() / steps).max() < 1.1, "the matrix that was packed, to a step"
    config = read_config(folder)
    for files in (folder, None):
        packing = packing_of(skeleton(config), config, QuantSpec(), files)
        for path, base in bases.items():
            assert {**base.settings, "shape": base.shape} == packing[path.removesuffix(".base")]


def test_experts_in_words_stay_packed_as_transformers_joins_them(tmp_path: Path) -> None:
    family_columns.saved("qwen3_moe", tmp_path)
    folder = words_folder(tmp_path / "model", tmp_path / "int4")
    text = loaded(folder)
    assert sum(isinstance(module, PackQuantizedBase) for module in text.model.modules()) == 16  # q, k, v, o of four blocks
    up = dequantised(folder)["model.layers.0.mlp.experts.1.up_proj.weight"]
    joined = text.model.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(joined, PackedStack) and torch.equal(joined[1][len(up) :], up)


def test_words_that_are_not_whole_are_named(llama: Path, tmp_path: Path) -> None:
    folder = words_folder(llama, tmp_path / "int4")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != f"{name}_shape"}, folder / "model.safetensors")
    with pytest.raises(DataError, match=f"{name}_shape is missing"):
        loaded(folder)
    save_file({**tensors, f"{name}_scale": torch.ones(3, 2)}, folder / "model.safetensors")
    with pytest.raises(DataError, match=rf"'{name}': weight_scale is \(3, 2\) for a weight of 32×32"):
        loaded(folder)


def test_words_of_another_dtype_are_named(llama: Path, tmp_path: Path) -> None:
    folder = words_folder(llama, tmp_path / "int4")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, f"{name}_packed": tensors[f"{name}_packed"].long()}, folder / "model.safetensors")
    with pytest.raises(DataError, match=rf"model.safetensors: '{name}': weight_packed is torch.int64; expected .*Fetch"):
        loaded(folder)


@pytest.mark.parametrize(
    ("targets", "required"),
    [
        ([["Linear"]], True),
        ([["re:.*q_proj$"], ["Linear"]], True),
        ([["Linear"], ["re:.*q_proj$"]], False),
        ([["model.layers.0.self_attn.q_proj"], ["re:.*q_proj$"]], True),
        ([["re:.*k_proj$"], ["Linear"]], False),
    ],
)
def test_zero_points_are_required_where_the_group_is_asymmetric(
    llama: Path, targets: list[list[str]], required: bool, tmp_path: Path
) -> None:
    folder = words_folder(llama, tmp_path / "int4", symmetric=False)
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    weights = stored["config_groups"]["group_0"]["weights"]
    stored["config_groups"] = {
        f"group_{number}": {"targets": names, "weights": {**weights, "symmetric": number > 0}}
        for number, names in enumerate(targets)
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != f"{name}_zero_point"}, folder / "model.safetensors")
    if not required:
        loaded(folder)
        return
    with pytest.raises(DataError, match=rf"model.safetensors: {name}_zero_point is missing, and .* symmetric: false. Fetch the"):
        loaded(folder)


def test_a_target_that_is_no_pattern_is_named(llama: Path, tmp_path: Path) -> None:
    folder = words_folder(llama, tmp_path / "int4")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"Linear"', '"re:("'))
    with pytest.raises(ConfigError, match=r"target 're:\(' in quantization_config, which is no pattern"):
        loaded(folder)


def test_matrices_of_experts_are_dequantised_as_transformers_joins_them(tmp_path: Path) -> None:
    family_columns.saved("qwen3_moe", tmp_path)
    folder = fp8_folder(tmp_path / "model", tmp_path / "fp8")
    text = loaded(folder)
    assert sum(isinstance(module, Fp8Base) for module in text.model.modules()) == 16  # q, k, v, o of four blocks
    found = dequantised(folder)
    mlp = text.model.model.layers[0].mlp
    gate = found["model.layers.0.mlp.experts.1.gate_proj.weight"]
    assert torch.equal(mlp.experts.gate_up_proj[1][: len(gate)], gate)


def test_what_predicts_several_tokens_is_ignored_as_transformers_does(tmp_path: Path) -> None:
    family_columns.saved("qwen3_5_text", tmp_path)
    folder = fp8_folder(tmp_path / "model", tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    more = {"mtp.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}
    more["mtp.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file({**tensors, **more}, folder / "model.safetensors")
    assert any(isinstance(module, Fp8Base) for module in loaded(folder).model.modules())
    assert not any(name.startswith("mtp.") for name in dequantised(folder))


def test_experts_in_mxfp4_are_the_published_numbers(tmp_path: Path) -> None:
    family_columns.saved("gpt_oss", tmp_path)
    folder = mxfp4_folder(tmp_path / "model", tmp_path / "mxfp4")
    said: list[str] = []
    text = load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=said.append)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    wanted = by_hand(stored[f"{name}_blocks"], stored[f"{name}_scales"]).transpose(1, 2)
    stack = text.model.model.layers[0].mlp.experts.down_proj
    assert isinstance(stack, PackedStack) and stack.bytes == wanted.numel() // 2 + wanted.numel() // 32
    assert all(torch.equal(stack[number], matrix) for number, matrix in enumerate(wanted))
    assert any(line.startswith("8 stacks of experts are mxfp4: ") for line in said), said
    torch.testing.assert_close(live(text), logits(in_transformers(folder)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("there", [True, False])
def test_how_layers_are_packed_is_known_from_headers_or_from_the_settings(llama: Path, there: bool, tmp_path: Path) -> None:
    folder = fp8_folder(llama, tmp_path / "fp8")
    config = read_config(folder)
    packing = packing_of(skeleton(config), config, QuantSpec(), folder if there else None)
    assert len(packing) == 14
    assert packing["model.layers.0.self_attn.q_proj"] == {"method": "fp8", "block": [16, 32], "shape": (32, 32)}


def test_a_model_with_a_tower_is_planned_as_its_files_are(tmp_path: Path) -> None:
    family_columns.saved("mistral3", tmp_path)
    folder = int8_folder(tmp_path / "model", tmp_path / "int8")
    config = read_config(folder)
    assert {one["method"] for one in packing_of(skeleton(config), config, QuantSpec(), folder).values()} == {"int8"}
    assert sum(isinstance(module, Int8Base) for module in loaded(folder).model.modules()) > 8


def test_what_is_not_whole_is_named(llama: Path, tmp_path: Path) -> None:
    folder = fp8_folder(llama, tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    first, second = "model.layers.0.self_attn.q_proj.weight_scale_inv", "model.layers.1.mlp.up_proj.weight_scale_inv"
    del tensors[first]
    tensors[second] = torch.ones(7, 7)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=rf"(?s)'{first}' is missing.*'{second}' is \(7, 7\) for a weight of"):
        loaded(folder)


def test_a_format_that_is_not_read_is_named(llama: Path, tmp_path: Path) -> None:
    folder = int8_folder(llama, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "nvfp4-pack-quantized"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="format nvfp4-pack-quantized; float-quantized, int-quantized, naive-quantized, pack-"):
        loaded(folder)
    assert open_safetensors(folder / "model.safetensors").tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transform_config": {"config_groups": {}, "R1": 1}}, "transform_config"),
        ({"config_groups": {"group_0": {"weights": {"symmetric": False}}}}, "symmetric: false"),
    ],
)
def test_settings_that_change_the_numbers_are_refused(llama: Path, changes: Any, words: str, tmp_path: Path) -> None:
    folder = int8_folder(llama, tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"in compressed-tensors with {words}, which is not read"):
        loaded(folder)


def test_another_float8_is_refused_and_scales_of_a_cache_are_left_out(llama: Path, tmp_path: Path) -> None:
    folder = fp8_folder(llama, tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, "model.layers.0.self_attn.k_scale": torch.ones(1)}, folder / "model.safetensors")
    assert "model.layers.0.self_attn.k_scale" not in dequantised(folder)
    save_file({**tensors, name: tensors[name].float().to(torch.float8_e5m2)}, folder / "model.safetensors")
    with pytest.raises(DataError, match=f"'{name}' is torch.float8_e5m2"):
        loaded(folder)


def test_blocks_may_be_written_as_a_text() -> None:
    stored = {"config_groups": {"group_0": {"weights": {"block_structure": "32x64"}}}}
    assert scaled_block((64, 128), (2, 2), stored) == (32, 64)


def test_values_that_are_no_numbers_are_named(llama: Path, tmp_path: Path) -> None:
    folder = fp8_folder(llama, tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[0, 0] = 0x7F  # E4M3's NaN
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=f"{name} has 1 values of"):
        loaded(folder)
