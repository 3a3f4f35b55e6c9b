"""`models.gguf_sound`: a .gguf base whose header and tensors do not go together is refused before anything is built of it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakeet.errors import DataError
from lorakeet.models.files.gguf_validate import config_of_gguf, require_gguf
from lorakeet.models.files.origin import stored_as
from lorakeet.models.files.source import find_source
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import config_of
from lorakeet.quant.spec import QuantSpec
from tiny.gguf_file import write_tiny_gguf

U32 = struct.Struct("<I")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")
    return tmp_path / "tiny.gguf"


def set_number(path: Path, key: str, value: int) -> None:
    """Writes another number under a key of type u32."""
    data = bytearray(path.read_bytes())
    place = data.index(key.encode()) + len(key)
    assert U32.unpack_from(data, place)[0] == 4
    U32.pack_into(data, place + 4, value)
    path.write_bytes(data)


def rename(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new) and old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def ways(path: Path) -> list[Callable[[], object]]:
    """Everything that reads a .gguf base."""
    spec, kept = ModelSpec(path=str(path)), ModelSpec(path=str(path), quantize=QuantSpec(method="gguf"))
    return [
        lambda: find_source(spec, lambda said: None),
        lambda: find_source(kept, lambda said: None),
        lambda: config_of(spec, lambda said: None),
    ]


def test_a_sound_file(file: Path) -> None:
    assert config_of_gguf(file).num_hidden_layers == 2
    assert stored_as(ModelSpec(path=str(file))) == "gguf"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**31, r"tensors of 2 blocks, but llama\.block_count is 2,147,483,648"),
        ("llama.block_count", 3, r"tensors of 2 blocks, but llama\.block_count is 3"),
        ("llama.block_count", 0, r"block_count is 0"),
        ("llama.embedding_length", 2**31, r"tensor '.*' is .*; the header describes a model with "),
        ("llama.feed_forward_length", 2**31, r"tensor 'blk\.0\.ffn_gate\.weight' is 48×32; .* with 2147483648×32"),
        ("llama.attention.head_count_kv", 2**30, r"tensor 'blk\.0\.attn_k\.weight' is"),
        ("llama.attention.head_count", 0, "cannot be read: "),
        ("llama.attention.head_count_kv", 0, r"tiny\.gguf: the configuration of a 'llama' model describes none that can be"),
    ],
)
def test_numbers_that_are_not_those_of_the_tensors(file: Path, key: str, value: int, message: str) -> None:
    set_number(file, key, value)
    for read in ways(file):
        with pytest.raises(DataError, match=message) as refused:
            read()
        assert "tiny.gguf" in str(refused.value) and "safetensors folder" in str(refused.value)


def test_a_missing_tensor_is_no_random_one(file: Path) -> None:
    rename(file, b"blk.1.attn_v.weight", b"blk.1.attn_w.weight")
    for read in ways(file):
        with pytest.raises(DataError, match=r"tensor 'blk\.1\.attn_v\.weight' is missing\. Fetch the file again"):
            read()


def test_no_architecture_and_an_unknown_one(file: Path) -> None:
    data = file.read_bytes()
    rename(file, b"general.architecture", b"general.archiTECTURE")
    with pytest.raises(DataError, match=r"has no general\.architecture.* Fetch the file again"):
        require_gguf(file)
    length = struct.pack("<Q", 5)
    file.write_bytes(data.replace(length + b"llama", length + b"lhama").replace(b"llama.block", b"lhama.block"))
    for read in ways(file):
        with pytest.raises(DataError, match=r"cannot be read: .*lhama.*safetensors folder"):
            read()


@pytest.mark.parametrize("cut", [3, 100, 1000, -1000, -1])
def test_a_truncated_base(file: Path, cut: int) -> None:
    file.write_bytes(file.read_bytes()[:cut])
    for read in ways(file):
        with pytest.raises(DataError, match=r"(?i)tiny\.gguf.*fetch (it|the file) again"):
            read()
    with pytest.raises(DataError, match=r"tiny\.gguf"):
        stored_as(ModelSpec(path=str(file)))


def test_tensors_on_each_other(file: Path) -> None:
    data = bytearray(file.read_bytes())
    name = b"blk.1.ffn_down.weight"
    place = data.index(name) + len(name) + struct.calcsize("<IQQI")
    data[place : place + 8] = bytes(8)
    file.write_bytes(data)
    for read in ways(file):
        with pytest.raises(DataError, match=r"begins inside .*Fetch the file again"):
            read()
