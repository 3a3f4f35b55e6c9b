"""Safetensors files: ours are what the library writes and reads, and hostile ones are named before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakeet.core.tiled_product import as_matrix
from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import (
    open_safetensors,
    read_index,
    save_tensors,
    save_text,
    stored_bytes,
    stream_safetensors,
)

TENSORS = {
    "b": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(2, 2),
    "scalar": torch.tensor(3.5, dtype=torch.float16),
    "none": torch.empty(0, 4),
    "ids": torch.arange(5),
    "flags": torch.tensor([True, False, True]),
    "turned": torch.randn(4, 3).t(),
    "stack": torch.randn(2, 3, 4),
}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def test_the_library_reads_ours_and_we_read_the_librarys(tmp_path: Path) -> None:
    save_tensors(tmp_path / "ours", TENSORS, metadata={"format": "pt", "note": "é"})
    assert same(load_file(tmp_path / "ours"), TENSORS)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    file = open_safetensors(tmp_path / "theirs")
    assert same({name: file.read(name) for name in file.tensors}, TENSORS) and file.metadata == {"format": "pt"}
    assert open_safetensors(tmp_path / "ours").metadata == {"format": "pt", "note": "é"}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ours", "theirs"]


def test_rows_are_read_in_parts(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS, metadata={})
    file = open_safetensors(tmp_path / "x")
    for name, tensor in TENSORS.items():
        rows = file.rows(name)
        assert tuple(rows.shape) == tuple(tensor.shape) and rows.dtype == tensor.dtype
        if tensor.dim() == 3:
            matrix, wanted = as_matrix(rows), tensor.flatten(0, 1)
            assert tuple(matrix.shape) == wanted.shape and torch.equal(matrix[1:4], wanted[1:4]), "a part of one of a stack"
        if tensor.dim() == 2:
            assert not isinstance(rows, torch.Tensor), "not read before it is asked for"
            for part in (slice(None), slice(0, 1), slice(1, 99), slice(2, 2)):
                assert torch.equal(rows[part], tensor[part])
    with (tmp_path / "x").open("r+b") as cut:
        cut.truncate(file.tensors["b"].begin + 2)
    with pytest.raises(DataError, match="became shorter while it was read"):
        file.rows("b")[1:]


def test_size_is_known_before_and_tensors_are_aligned(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS, metadata={})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    assert stored_bytes(shapes, {}) == (tmp_path / "x").stat().st_size
    for stored in open_safetensors(tmp_path / "x").tensors.values():
        assert stored.begin % stored.dtype.itemsize == 0


def test_a_tensor_other_than_announced_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced as"):
        stream_safetensors(tmp_path / "x", {"a": (torch.float32, (2,))}, fetch=lambda _: torch.zeros(3), metadata={})

    class Fails(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise OSError(28, "No space left on device")

    save_tensors(tmp_path / "kept", {"a": torch.ones(1)}, metadata={})
    with pytest.raises(OSError, match="No space"):
        save_tensors(tmp_path / "kept", Fails(a=torch.zeros(1)), metadata={})
    assert load_file(tmp_path / "kept")["a"].item() == 1
    assert not list(tmp_path.glob(".*"))


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    save_text(tmp_path / "t", "one\n")
    save_text(tmp_path / "t", "zwei é\n")
    assert (tmp_path / "t").read_bytes() == "zwei é\n".encode() and len(list(tmp_path.iterdir())) == 1


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "declares a header of 0 bytes"),
    "huge header": (raw({"a": entry()}, length=2**63), "declares a header of 9,223,372,036,854,775,808 bytes"),
    "short header": (raw({"a": entry()}, length=10_000), "declares a header of 10,000 bytes"),
    "not json": (raw(b"{..."), "its header is not JSON"),
    "deep json": (raw(b"[" * 100_000), "its header is not JSON"),
    "not utf-8": (raw(b'{"\xff":1}'), "its header is not JSON"),
    "list": (raw([]), "its header holds a JSON list; expected a table of tensors"),
    "cut data": (raw({"a": entry()}, b"1234"), "was cut off"),
    "extra data": (raw({"a": entry()}, b"x" * 12), "bytes that belong to no tensor"),
    "too long a range": (raw({"a": entry(data_offsets=[0, 80])}, b"x" * 8), "has 80 bytes; shape .* needs 8"),
    "backwards": (raw({"a": entry(data_offsets=[8, 0])}, b"x" * 8), "has -8 bytes"),
    "negative": (raw({"a": entry(data_offsets=[-8, 0])}, b"x" * 8), "whole numbers of 0 or more"),
    "negative shape": (raw({"a": entry(shape=[-2, -1])}, b"x" * 8), "whole numbers of 0 or more"),
    "fraction": (raw({"a": entry(shape=[2.0])}, b"x" * 8), "whole numbers of 0 or more"),
    "huge shape": (raw({"a": entry(shape=[2**62, 2**62])}, b"x" * 8), "has 8 bytes"),
    "a number of 6,000 digits": (
        raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,8]}}', b"x" * 8),
        "6,?000 digits",  # by Python's own limit, where it has one
    ),
    "a product of 8,000 digits": (raw({"a": entry(shape=[10**3999] * 2)}, b"x" * 8), "numbers of up to 4,000 digits; expected"),
    "many dimensions": (raw({"a": entry(shape=[1] * 65)}, b"x" * 4), "has 65 dimensions .* expected at most 64"),
    "dtype": (raw({"a": entry(dtype="F128")}, b"x" * 8), "has the dtype 'F128'"),
    "dtype list": (raw({"a": entry(dtype=["F32"])}, b"x" * 8), "has the dtype"),
    "no dtype": (raw({"a": {"shape": [2]}}, b"x" * 8), "without exactly dtype, shape and data_offsets"),
    "overlap": (raw({"a": entry(), "b": entry(data_offsets=[4, 12])}, b"x" * 12), "'b' overlaps another tensor"),
    "hole": (raw({"a": entry(data_offsets=[4, 12])}, b"x" * 12), "'a' leaves bytes before it"),
    "metadata": (raw({"__metadata__": {"a": 1}, "a": entry()}, b"x" * 8), "__metadata__ is not a table of texts"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07", "declares a header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_named(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        open_safetensors(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.safetensors cannot be read: No such file"):
        open_safetensors(tmp_path / "none.safetensors")


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4))
def test_no_damage_does_anything_but_raise_data_error(
    cut: int, flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("damage") / "x.safetensors"
    save_tensors(file, TENSORS, metadata={"format": "pt"})
    data = bytearray(file.read_bytes())
    for place, value in flips:
        data[place % len(data)] = value
    file.write_bytes(data[: len(data) - cut])
    try:
        opened = open_safetensors(file)
    except DataError:
        return
    assert all(opened.read(name).shape == stored.shape for name, stored in opened.tensors.items())


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/x.safetensors", "sub/x", "..", "", "a\0b"])
def test_an_index_names_files_beside_it_only(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert read_index(index) == {"a": "x.safetensors"}
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": name}}))
    with pytest.raises(DataError, match=f"index.json names files outside of its folder: {name}\\. .*expected names of files"):
        read_index(index)


def test_an_index_without_a_map_of_names_is_refused(tmp_path: Path) -> None:
    for content in ({}, {"weight_map": []}, {"weight_map": {"a": 3}}):
        (tmp_path / "i.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"i\.json has no weight_map"):
            read_index(tmp_path / "i.json")
