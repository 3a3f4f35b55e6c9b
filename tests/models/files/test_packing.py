"""How layers will be packed, against how they are once the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.models.files.packing import packing_of
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from tiny.gguf_file import write_tiny_gguf


def in_memory(spec: ModelSpec) -> dict[str, dict[str, object]]:
    text = load_text_model(spec)
    layers = {path: module.base.settings for path, module in text.model.named_modules() if isinstance(module, PackedLinear)}
    return {path: {**settings, "shape": tuple(settings["shape"])} for path, settings in layers.items()}


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_as_requested(tiny_llama_folder: Path, method: str) -> None:
    spec, config = QuantSpec(method=method), read_config(tiny_llama_folder)  # type: ignore[arg-type]
    found = packing_of(skeleton(config), config, spec, tiny_llama_folder)
    loaded = in_memory(ModelSpec(path=str(tiny_llama_folder), dtype="float32", quantize=spec))
    assert found.keys() == loaded.keys() and len(found) == 14
    for path, settings in loaded.items():
        assert settings.items() <= dict(found[path]).items()
    assert packing_of(skeleton(config), config, QuantSpec(), tiny_llama_folder) == {}


def test_as_a_gguf_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    spec = QuantSpec(method="gguf")
    file = tmp_path / "tiny.gguf"
    write_tiny_gguf(file, "Q4_0")
    text = load_text_model(ModelSpec(path=str(file), dtype="float32", quantize=spec))
    loaded = in_memory(ModelSpec(path=str(file), dtype="float32", quantize=spec))
    config = read_config(text.source)
    from_folder = packing_of(skeleton(config), config, spec, text.source)
    del config.quantization_config
    from_file = packing_of(skeleton(config), config, spec, file)
    assert from_folder == loaded and from_file == loaded and loaded
    with pytest.raises(ConfigError, match=r"names no \.gguf file"):
        packing_of(skeleton(config), config, spec)


def test_as_config_json_says_where_there_are_no_files(tiny_llama_folder: Path) -> None:
    config = read_config(tiny_llama_folder)
    config.quantization_config = {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "dynamic": {r"-:.*down_proj": {}},
    }  # fmt: skip
    found = packing_of(skeleton(config), config, QuantSpec())
    assert len(found) == 12 and not any("down_proj" in path for path in found)
    first = found["model.layers.0.self_attn.q_proj"]
    assert first["bits"] == 4 and first["groups"] == 2 and first["sym"] is False
