"""`models.origin`: how a model on disk is quantised, and what its own record calls the model that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakeet.errors import DataError
from lorakeet.models.files.origin import base_form, origin_of, packed_folder, packed_readme, readme_metadata, stored_as
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from tiny.gguf_file import write_tiny_gguf


def folder_with(folder: Path, card: str, config: str = "{}") -> ModelSpec:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "README.md").write_text(card)
    return ModelSpec(path=str(folder))


@pytest.mark.parametrize(
    ("front", "origin"),
    [
        ("base_model: meta/one", "meta/one"),
        ("base_model: [meta/one]\nbase_model_relation: quantized", "meta/one"),
        ("base_model: [meta/one, meta/two]", ""),
        ("base_model: meta/one\nbase_model_relation: finetune", ""),
        ("base_model: 7", ""),
        ("license: mit", ""),
        ("base_model: [", ""),
    ],
)
def test_the_model_card_of_a_folder_names_its_origin(front: str, origin: str, tmp_path: Path) -> None:
    assert origin_of(folder_with(tmp_path / "model", f"---\n{front}\n---\n# Title\n")) == origin


def test_without_a_model_card_or_a_folder_nothing_is_known(tmp_path: Path) -> None:
    assert origin_of(folder_with(tmp_path / "model", "# Title\n")) == ""
    assert origin_of(ModelSpec(path=str(tmp_path / "gone"))) == "" == stored_as(ModelSpec(path=str(tmp_path / "gone")))
    assert origin_of(ModelSpec(path="no-one/at-all")) == "" and readme_metadata(tmp_path) == {}


def test_what_quantize_writes_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    for model in (str(tmp_path / "dense"), "meta/one", "package:some"):
        spec = folder_with(tmp_path / model.replace("/", "_"), packed_readme(model, "nf4"))
        assert origin_of(spec) == model


def test_how_a_folder_is_quantised(tmp_path: Path) -> None:
    for number, (config, method) in enumerate(
        (
            ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "nf4"),
            ({"quantization_config": {"quant_method": "lorakeet_int8"}}, "int8"),
            ({}, ""),
        )
    ):
        spec = folder_with(tmp_path / str(number), "", json.dumps(config))
        assert stored_as(spec) == method == packed_folder(Path(spec.path))
    (tmp_path / "3" / "quantize_config.json").write_text("{}")
    assert stored_as(ModelSpec(path=str(tmp_path / "3"))) == "gptq", "as GPTQ folders of before 2024 say it"
    (tmp_path / "3" / "config.json").write_text("[")
    with pytest.raises(DataError, match=r"config\.json"):
        stored_as(ModelSpec(path=str(tmp_path / "3")))


def test_a_gguf_file_is_quantised_where_its_matrices_are(tmp_path: Path) -> None:
    import gguf

    write_tiny_gguf(tmp_path / "packed.gguf", "Q8_0")
    write_tiny_gguf(tmp_path / "plain.gguf")
    assert [stored_as(ModelSpec(path=str(tmp_path / f"{name}.gguf"))) for name in ("packed", "plain")] == ["gguf", ""]
    assert origin_of(ModelSpec(path=str(tmp_path / "packed.gguf"))) == ""
    for name, value, origin in (
        ("general.source.huggingface.repository", "meta/one", "meta/one"),
        ("general.source.repo_url", "https://huggingface.co/meta/one/", "meta/one"),
        ("general.source.url", "https://example.org/one", ""),
        ("general.base_model.0.repo_url", "https://huggingface.co/meta/one", ""),  # which it was tuned from
    ):
        writer = gguf.GGUFWriter(str(tmp_path / "told.gguf"), "llama")
        writer.add_string(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert origin_of(ModelSpec(path=str(tmp_path / "told.gguf"))) == origin, name


def test_what_a_run_really_trains_on_is_said(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "packed.gguf", "Q8_0")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (folder / "README.md").write_text(packed_readme("org/model", "GPTQ"))
    given = {
        "packed.gguf": "a .gguf file of quantised weights",
        "folder": "quantised on disk: gptq, made from org/model",
        "gone": "",
    }
    assert {name: base_form(ModelSpec(path=str(tmp_path / name))) for name in given} == given
    packed = ModelSpec(path="org/model", revision="main", quantize=QuantSpec(method="nf4"))
    assert base_form(packed) == "revision main, its linear layers in nf4 while it trained"
