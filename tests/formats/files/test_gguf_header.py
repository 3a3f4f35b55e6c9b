"""`formats.gguf_header`: nothing that a header announces is believed before the file bears it out."""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.formats import gguf
from lorakeet.formats.files.gguf_header import check_gguf

WIDE = 2**40


def raw_gguf(value: bytes, *, tensors: int = 0, keys: int = 1) -> bytes:
    """A GGUF file of one key "k" whose type and value are `value`."""
    return b"GGUF" + struct.pack("<IQQQ", 3, tensors, keys, 1) + b"k" + value


def with_tensors(*tensors: tuple[str, tuple[int, ...], int, int], data: int = 4096, keys: bytes = b"", count: int = 0) -> bytes:
    """A GGUF file of tensors (name, dimensions with the width first, type, offset) and `data` zero bytes after the header."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + keys
    for name, dimensions, kind, offset in tensors:
        header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dimensions))
        header += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)
    return header + bytes(-len(header) % 32) + bytes(data)


def alignment(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<I", kind) + value


ANNOUNCED: dict[str, tuple[bytes, str]] = {
    "array of numbers": (raw_gguf(struct.pack("<IIQ", 9, 0, 2**33)), "announces 8,589,934,592 array elements, for which 0 bytes"),
    "array of texts": (raw_gguf(struct.pack("<IIQ", 9, 8, 2**33)), "announces 8,589,934,592 array elements"),
    "text": (raw_gguf(struct.pack("<IQ", 8, 2**40) + b"abc"), "announces 1,099,511,627,776 bytes, of which the file has 3"),
    "keys": (raw_gguf(b"", keys=2**50), "announces 1,125,899,906,842,624 keys"),
    "tensors": (raw_gguf(struct.pack("<IB", 0, 7), tensors=2**50), "announces 1,125,899,906,842,624 tensors"),
    "dimensions": (
        raw_gguf(struct.pack("<IBQ", 0, 7, 1) + b"t" + struct.pack("<I", 2**31) + b"x" * 40, tensors=1),
        "bytes, of which .* at tensor 't'",
    ),
    "five dimensions": (with_tensors(("t", (1, 1, 1, 1, 1), 0, 0)), "a tensor with 5 dimensions .* at tensor 't'"),
    "long name": (with_tensors(("t" * 300, (1,), 0, 0)), "a name of 300 bytes"),
    "deep arrays": (raw_gguf(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000), "arrays nested more than four deep"),
    "unknown value": (raw_gguf(struct.pack("<I", 99) + b"x" * 99), "a value of type 99"),
    "version": (b"GGUF" + struct.pack("<IQQ", 7, 0, 0), "its version is 7; readable are 2 and 3"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 2**50), "announces 1,125,899,906,842,624 keys"),
    "a key twice": (raw_gguf(struct.pack("<IBQ", 0, 7, 1) + b"k" + struct.pack("<IB", 0, 7), keys=2), "'k' .* twice"),
    "alignment 0": (with_tensors(keys=alignment(4, bytes(4)), count=1), "general.alignment is 0; expected a power of two"),
    "alignment 48": (with_tensors(keys=alignment(4, struct.pack("<I", 48)), count=1), "general.alignment is 48"),
    "alignment as a text": (with_tensors(keys=alignment(8, struct.pack("<Q", 2) + b"32"), count=1), "general.alignment is '32'"),
}  # fmt: skip

UNSOUND: dict[str, tuple[bytes, str]] = {
    "behind the end": (with_tensors(("a", (32,), 0, 8192)), "'a' ends at byte 8,384, behind the end of the file at 4,160"),
    "cut off": (with_tensors(("a", (512,), 0, 0), ("b", (512,), 0, 2048), ("c", (512,), 0, 4096), data=2048),
                "'b' ends at byte 4,224, behind .*, and so do 1 others. It was probably cut off"),
    "overlap": (with_tensors(("a", (32,), 0, 0), ("b", (32,), 0, 64)), "tensor 'b' begins inside 'a', at byte"),
    "one place for two": (with_tensors(("a", (32,), 0, 0), ("b", (32,), 0, 0)), "begins inside"),
    "twice": (with_tensors(("a", (8,), 0, 0), ("a", (8,), 0, 32)), "two tensors are called 'a'"),
    "huge": (with_tensors(("a", (WIDE, WIDE), 0, 0)), "'a' has the shape .*fewer than 2\\^63"),
    "large": (with_tensors(("a", (WIDE, 2**20), 0, 0)), "'a' ends at byte 4,611,686,018,427,388,000, behind"),
    "nothing": (with_tensors(("a", (0, 8), 0, 0)), r"'a' has the shape \(8, 0\)"),
    "unknown type": (with_tensors(("a", (32,), 77, 0)), "'a' has the type 77, which is not known; readable are F32"),
    "half a block": (with_tensors(("a", (48, 2), 2, 0)), "'a' has rows of 48 numbers, .* no whole number of Q4_0 blocks of 32"),
    "odd place": (with_tensors(("a", (32,), 0, 7)), "'a' begins at 7, which is no multiple of the alignment 32"),
}  # fmt: skip


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf.GGUFReader", lambda path: pytest.fail("the package was called"))


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("case", ANNOUNCED)
def test_what_is_announced_is_checked_before_the_package_reads_it(case: str, tmp_path: Path) -> None:
    data, message = ANNOUNCED[case]
    (tmp_path / "bad.gguf").write_bytes(data)
    for read in (check_gguf, gguf.read):
        with pytest.raises(DataError, match=r"bad\.gguf is not a whole GGUF file \(.*\)\. .*fetch it again") as refused:
            read(tmp_path / "bad.gguf")
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(DataError, match=message):
        check_gguf(tmp_path / "bad.gguf")


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("case", UNSOUND)
def test_every_tensor_lies_in_the_file_alone(case: str, tmp_path: Path) -> None:
    data, message = UNSOUND[case]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(DataError, match=rf"bad\.gguf: .*{message}") as refused:
        check_gguf(tmp_path / "bad.gguf")
    assert str(refused.value).endswith("Fetch the file again, or use the model's safetensors folder.")


def test_an_adapter_has_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(raw_gguf(struct.pack("<IIQ", 9, 0, 200_000) + bytes(200_000)))
    with pytest.raises(DataError, match=r"more than 200,000 are not read\. Use safetensors"):
        gguf.read(tmp_path / "a.gguf")
    assert check_gguf(tmp_path / "a.gguf").tensors == {}


def test_what_a_sound_file_holds(tmp_path: Path) -> None:
    writer = package.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    writer.add_chat_template("x" * 5000)
    writer.add_tensor("wide", np.ones((2, 32), np.float32))
    writer.add_tensor("packed", package.quants.quantize(np.ones((4, 64), np.float32), package.GGMLQuantizationType.Q8_0),
                      raw_dtype=package.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = check_gguf(tmp_path / "a.gguf")
    assert header.values["general.architecture"] == "llama" and header.values["llama.block_count"] == 3
    assert "tokenizer.ggml.tokens" not in header.values and len(str(header.values["tokenizer.chat_template"])) < 1100
    reader: Any = package.GGUFReader(tmp_path / "a.gguf")
    theirs = {tensor.name: (tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes)) for tensor in reader.tensors}
    assert {name: (slot.kind, slot.begin, slot.end - slot.begin) for name, slot in header.tensors.items()} == theirs
    assert header.tensors["packed"].shape == (4, 64)


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(with_tensors(("a", (8,), 0, 0)))
    assert list(check_gguf(path).tensors) == ["a"]
    path.write_bytes(with_tensors(("b", (8,), 0, 0)))
    os.utime(path, ns=(1, 1))
    assert list(check_gguf(path).tensors) == ["b"]


def test_no_file_and_no_header(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.gguf cannot be read: No such file"):
        check_gguf(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.gguf is not a GGUF file: it begins with b''"):
        check_gguf(tmp_path / "empty.gguf")


@pytest.mark.parametrize("case", {**ANNOUNCED, **UNSOUND})
def test_a_refusal_takes_no_memory(case: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes({**ANNOUNCED, **UNSOUND}[case][0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError):
        check_gguf(tmp_path / "bad.gguf")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
