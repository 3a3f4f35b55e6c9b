"""A .gguf file becomes a dense folder once, whole or not at all, with the same function, in the cache folder of its content."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.formats.files.gguf_header import check_gguf
from lorakeet.kernels.cache import cache_folder
from lorakeet.models.files import gguf_copy, gguf_dense
from lorakeet.models.files.gguf_copy import content_digest, known_digest
from lorakeet.models.files.gguf_dense import bytes_of_unpacking, dense_copy
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from tiny.gguf_family import write_family_gguf
from tiny.gguf_file import write_tiny_gguf
from tiny.models import tiny_tokenizer

CHANGES = {"gpt2": {"tie_word_embeddings": False, "n_positions": 1024}}  # places that no key of the header tells transformers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_tiny_gguf(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_the_model_is_the_one_in_the_file(made: tuple[Path, Any], cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, model = made
    said: list[str] = []
    text = load_text_model(ModelSpec(path=str(path), dtype="float32", device="cpu"), say=said.append)
    ids = torch.arange(4, 30)[None]
    assert torch.allclose(
        text.model(ids).logits if text.attention != "varlen" else _plain(text, ids), model(ids).logits, atol=1e-4
    )
    words = "The doctor gave me this, héllo"
    assert text.tokenizer(words)["input_ids"] == tiny_tokenizer()(words)["input_ids"]
    assert text.tokenizer.eos_token == "<|im_end|>"
    assert text.tokenizer.chat_template
    assert text.name == str(path)
    assert text.source.parent == cache
    assert [line for line in said if "Unpacking tiny.gguf once into" in line] == said[:1]
    assert capfd.readouterr() == ("", "")


def _plain(text: Any, ids: torch.Tensor) -> torch.Tensor:
    text.model.set_attn_implementation("sdpa")
    return text.model(ids).logits


@pytest.mark.parametrize("kind", [None, "Q4_0", "Q6_K"])
def test_the_copy_is_what_transformers_makes_of_the_file(kind: str | None, tmp_path: Path, cache: Path) -> None:
    """To the bit, with the same settings, though one tensor is in memory at a time."""
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, kind, **({"hidden_size": 256, "intermediate_size": 256} if kind == "Q6_K" else {}))
    _check_copy(dense_copy(path, lambda line: None), path, tmp_path / "theirs")


@pytest.mark.parametrize("family", ["gpt2", "bloom", "qwen2"])
def test_a_family_of_another_kind_is_unpacked_to_its_numbers(family: str, tmp_path: Path, cache: Path) -> None:
    """GPT-2's head and BLOOM's queries, keys and values are put together by transformers; Qwen2 has biases."""
    path = tmp_path / "model.gguf"
    model = write_family_gguf(path, family, **CHANGES.get(family, {}))
    copy = dense_copy(path, lambda line: None)
    _check_copy(copy, path, tmp_path / "theirs")
    held, wanted = load_file(copy / "model.safetensors"), dict(model.named_parameters())
    assert set(held) == set(wanted) and all(torch.equal(held[name], wanted[name]) for name in wanted)
    header = check_gguf(path)
    whole = 2 * 700 * header.parts + 8 * sum(math.prod(slot.shape) for slot in header.tensors.values())
    assert (bytes_of_unpacking(header) == whole) == (family != "qwen2"), "what transformers unpacks is in memory as a whole"


def _check_copy(ours: Path, path: Path, theirs: Path) -> None:
    gguf_dense._through_transformers(path, theirs)
    one, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
    assert {entry.name for entry in ours.iterdir()} == {entry.name for entry in theirs.iterdir()}


@pytest.mark.slow
def test_what_unpacking_takes_hangs_on_the_largest_tensor_alone(tmp_path: Path, cache: Path) -> None:
    """Counted in numpy's and torch's memory; of twice as many blocks the same, beside a few names."""
    held, planned = [], []
    for blocks in (2, 4):
        path = tmp_path / f"of{blocks}.gguf"
        write_tiny_gguf(path, "Q4_0", hidden_size=256, intermediate_size=1024, num_hidden_layers=blocks)
        planned.append(bytes_of_unpacking(check_gguf(path)))
        tracemalloc.start()
        dense_copy(path, lambda line: None)
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    largest = 4 * 256 * 1024
    assert planned[1] - planned[0] < 2 * 100 * 1400 < planned[0] and planned[0] > 4 * largest
    assert held[1] - held[0] < 2 * largest, "two more blocks are eight times as much"


def test_stacked_experts_count_as_a_whole_model(made: tuple[Path, Any]) -> None:
    header = check_gguf(made[0])
    name, slot = next(iter(header.tensors.items()))
    stacked = replace(header, tensors={**header.tensors, name: replace(slot, shape=(1, *slot.shape))})
    numbers = sum(math.prod(one.shape) for one in header.tensors.values())
    assert bytes_of_unpacking(stacked) == 2 * 700 * header.parts + 8 * numbers
    assert bytes_of_unpacking(stacked, packed=True) == bytes_of_unpacking(header)


def test_it_is_made_once_by_content(made: tuple[Path, Any], cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = dense_copy(made[0], said.append)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    twin = tmp_path / "tiny.gguf"
    shutil.copyfile(made[0], twin)
    assert dense_copy(made[0], said.append) == dense_copy(twin, said.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(said) == 1
    assert "quantization_config" not in json.loads((first / "config.json").read_text())
    (cache / "digests.json").write_text("{broken")
    assert dense_copy(made[0], said.append) == first
    assert sorted(entry.name for entry in cache.iterdir()) == sorted([first.name, "digests.json"])


def test_a_cut_off_file_leaves_nothing(made: tuple[Path, Any], cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(made[0].read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"broken.gguf: .*cut off. Fetch the file again"):
        dense_copy(broken, print)
    assert [entry.name for entry in cache.iterdir()] == ["digests.json"]


def test_a_file_that_is_no_gguf(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something")
    with pytest.raises(DataError, match=r"x.gguf is not a GGUF file: it begins with b'PK"):
        dense_copy(tmp_path / "x.gguf", print)


def test_a_full_disk_is_said_before_anything_is_written(
    made: tuple[Path, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(EnvironmentProblem, match="set LORAKEET_CACHE to a folder on a larger disk"):
        dense_copy(made[0], print)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_the_copy_is_said_and_nothing_is_left(
    made: tuple[Path, Any], cache: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("lorakeet.models.files.gguf_dense.stream_safetensors", refuse)
    with pytest.raises(EnvironmentProblem, match=rf"cannot be written: {os.strerror(code)}.*LORAKEET_CACHE"):
        dense_copy(made[0], print)
    assert [path.name for path in cache.iterdir()] == ["digests.json"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF and more")
    return path


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path) -> None:
    monkeypatch.delenv("LORAKEET_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "lorakeet"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        content_digest(file)


def test_a_digest_is_computed_once_and_known_until_the_file_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    assert known_digest(file) == "" and not (tmp_path / "cache").exists(), "asking writes nothing"
    found = content_digest(file)
    assert known_digest(file) == found
    monkeypatch.setattr(gguf_copy, "sha256_of", lambda path: "computed again")
    assert content_digest(file) == found
    os.utime(file, ns=(1, 1))
    assert known_digest(file) == "" and content_digest(file) == "computed again" == known_digest(file)
