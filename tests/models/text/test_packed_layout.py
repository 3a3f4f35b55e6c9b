"""Layouts of quantised models: each layer's packed weight by the path that the model has it at, and what has no layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.packed_layout import read_layout
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.verbs.options import QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.gguf_file import write_tiny_gguf
from tiny.models import save_tiny_llama
from tiny.runs import quiet


def silent(line: str) -> None:
    pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folders_layers_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    quantize(
        QuantizeOptions(str(save_tiny_llama(tmp_path / "model", family=family)), method="nf4", out=tmp_path / "nf4"),
        console=quiet(),
    )
    layout = read_layout(str(tmp_path / "nf4"), silent)
    assert (layout.method, layout.file, layout.folder) == ("nf4", None, tmp_path / "nf4")
    text = load_text_model(ModelSpec(path=str(tmp_path / "nf4")), say=silent)
    loaded = {path: module.base for path, module in text.model.named_modules() if isinstance(module, PackedLinear)}
    assert set(layout.layers) == set(layout.names) == set(loaded)
    for path, read in layout.layers.items():
        assert read().packed.equal(loaded[path].packed)  # type: ignore[operator, arg-type]


def test_a_gguf_files_layers_are_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")
    layout = read_layout(str(tmp_path / "tiny.gguf"), silent)
    assert (layout.method, layout.file) == ("gguf", tmp_path / "tiny.gguf")
    spec = ModelSpec(path=str(tmp_path / "tiny.gguf"), quantize=QuantSpec(method="gguf"))
    text = load_text_model(spec, say=silent)
    loaded = {path for path, module in text.model.named_modules() if isinstance(module, PackedLinear)}
    assert set(layout.layers) == loaded and len(loaded) == 12


def test_what_is_not_packed_has_no_layout(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not quantised; expected a model in gptq, nf4, gguf.*lorakeet quantize"):
        read_layout(str(tiny_llama_folder), silent)
    quantize(QuantizeOptions(str(tiny_llama_folder), method="int8", out=tmp_path / "int8"), console=quiet())
    with pytest.raises(ConfigError, match="is in int8; expected"):
        read_layout(str(tmp_path / "int8"), silent)
