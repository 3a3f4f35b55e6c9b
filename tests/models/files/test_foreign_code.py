"""What a folder names of its own is refused with file and key; the loaders are walked in tests/laws/test_foreign_code."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    dynamic_module_utils,
)

from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.models.files.foreign_code import build_native, no_foreign_code, read_native, require_native_parts
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.spec import QuantSpec


def test_what_an_installed_class_reads_is_read_by_it(tiny_llama_folder: Path) -> None:
    config = read_native(AutoConfig, tiny_llama_folder)
    config.auto_map = {"AutoModelForCausalLM": "evil.Thing"}
    assert type(build_native(AutoModelForCausalLM, config)).__module__.startswith("transformers.")
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == 0  # nor does transformers ask when another library calls it


def test_a_package_that_a_model_s_code_needs_is_named() -> None:
    """Its configuration is right, so nothing of it is to be corrected."""

    class Vision:
        @staticmethod
        def from_config(config: Any, **_: Any) -> Any:
            raise ImportError("TimmWrapperModel requires the timm library. Install it: pip install timm.")

    config = AutoConfig.for_model("gemma3n")
    with pytest.raises(EnvironmentProblem, match=r"^A 'gemma3n' model needs a package that is not installed: .*pip install timm"):
        build_native(Vision, config)
    if find_spec("timm") is None:
        with torch.device("meta"), pytest.raises(EnvironmentProblem, match="not installed: TimmWrapperModel requires the timm"):
            build_native(AutoModelForMultimodalLM, config)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": "e.T"}}'}, r"tokenizer_config.json: auto_map .*\"e.T\""),
        ({"tokenizer_config.json": "[1", "config.json": '{"auto_map": {"A": "e.T"}}'}, "config.json: auto_map"),
        ({"config.json": "[1]"}, "auto_map names code of its own. Code"),
    ],
)
def test_the_first_file_that_names_code_is_said(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words), no_foreign_code(tmp_path):
        raise ValueError("Please pass the argument `trust_remote_code=True`")
    with pytest.raises(ValueError, match="another"), no_foreign_code(tmp_path):
        raise ValueError("another")


def test_a_tokenizer_class_must_be_a_tokenizer(tmp_path: Path, tiny_llama_folder: Path) -> None:
    for file in tiny_llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "AutoModelForCausalLM"}')
    with pytest.raises(DataError, match="names AutoModelForCausalLM as the class of its tokenizer"):
        read_native(AutoTokenizer, tmp_path)


@pytest.mark.parametrize(
    ("index", "key"),
    [
        ({"_class_name": ["pipeline", "X"]}, "_class_name"),
        ({"vae": ["os", "system"]}, "vae"),
        ({"tokenizer": ["transformers", "AutoTokenizer"]}, "tokenizer"),
        ({"unet": ["diffusers", "AutoModel"]}, "unet"),
        ({"unet": ["diffusers"]}, "unet"),
        ({"unet": ["diffusers", 7]}, "unet"),
        ({"unet": [["diffusers"], "X"]}, "unet"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler"),  # beside a file scheduler/diffusers.py
    ],
)
def test_a_part_of_a_pipeline_is_of_a_named_class(tmp_path: Path, index: dict[str, Any], key: str) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "diffusers.py").touch()
    with pytest.raises(DataError, match=f"model_index.json: {key} names code of its own"):
        require_native_parts(tmp_path, index)
    require_native_parts(tmp_path, {key: index[key]} if key == "tokenizer" else {}, unused=[key])


def test_usual_pipelines_pass(tiny_sd_folder: Path) -> None:
    require_native_parts(tiny_sd_folder, json.loads((tiny_sd_folder / "model_index.json").read_text()))
    require_native_parts("some/hub-id", {"image_encoder": [None, None], "vae": ["diffusers", "AutoencoderKL"], "requires": True})


@pytest.mark.parametrize("quantize", [QuantSpec(), QuantSpec("nf4")])
def test_no_kernel_of_the_hub_takes_the_place_of_a_layer(tiny_llama_folder: Path, quantize: QuantSpec) -> None:
    spec = ModelSpec(path=str(tiny_llama_folder), device="cpu", quantize=quantize)
    assert not getattr(load_text_model(spec, say=lambda line: None).model, "use_kernels", False)
    assert not getattr(read_native(AutoModel, tiny_llama_folder), "use_kernels", False)
