"""What a base and a written model hold, by content: another place is the same, another number is not."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.certified import base_identity, model_identity


def test_a_base_is_known_by_its_content(tiny_llama_folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_llama_folder, tmp_path / "moved"))
    found = base_identity(ModelSpec(path=str(moved)))
    assert found == base_identity(ModelSpec(path=str(tiny_llama_folder))) and found["base quantisation"] == "none"
    packed = base_identity(ModelSpec(path=str(moved), quantize=QuantSpec(method="nf4")))
    assert packed == {**found, "base quantisation": "nf4"}
    weights = next(moved.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert base_identity(ModelSpec(path=str(moved)))["base weights"] != found["base weights"]
    weights.unlink()
    assert base_identity(ModelSpec(path=str(moved))) == base_identity(ModelSpec(path=str(tmp_path / "gone"))) == {}


def test_each_file_for_ollama_is_known(tmp_path: Path) -> None:
    for name in ("model.gguf", "adapter.gguf", "Modelfile", "README.md"):
        (tmp_path / name).write_text(name)
    before = model_identity(tmp_path)
    assert set(before) == {"model model.gguf", "model adapter.gguf", "model Modelfile"}
    (tmp_path / "Modelfile").write_text("FROM another")
    assert {name for name, value in model_identity(tmp_path).items() if value != before[name]} == {"model Modelfile"}
