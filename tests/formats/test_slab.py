"""A slab has what the file has, keeps it whatever happens to the file, and knows when it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakeet.errors import DataError
from lorakeet.formats.slab import open_outline, open_slab

TENSORS = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.zeros(0, 4)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_are_those_of_the_file(file: Path, mapped: bool) -> None:
    slab = open_slab(file, mapped=mapped)
    for name, tensor in TENSORS.items():
        assert torch.equal(slab.read(name), tensor) and slab.read(name).shape == tensor.shape
    assert slab.finite and slab.read("a").untyped_storage().data_ptr() > 0


@pytest.mark.parametrize("mapped", [False, True])
def test_other_dtypes_and_odd_places(tmp_path: Path, mapped: bool) -> None:
    mixed = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.tensor([1, 2], dtype=torch.int8)}
    save_file(mixed, tmp_path / "m.safetensors")
    slab = open_slab(tmp_path / "m.safetensors", mapped=mapped)
    assert not slab.finite, "each tensor has to be looked at"
    assert all(torch.equal(slab.read(name), tensor) for name, tensor in mixed.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_are_seen(file: Path, value: float) -> None:
    save_file({**TENSORS, "b": torch.tensor([1.0, value])}, file)
    assert not open_slab(file).finite and not open_slab(file, mapped=True).finite


def test_cutting_or_replacing_the_file_changes_nothing(file: Path) -> None:
    slab = open_slab(file)
    file.write_bytes(b"short")
    assert torch.equal(slab.read("a"), TENSORS["a"])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        open_slab(file)


def bytes_read() -> int:
    """What this process has asked the system to read so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system counts no reads")
def test_a_copy_reads_each_byte_once_and_a_map_reads_the_header_only(tmp_path: Path) -> None:
    """However many are held already."""
    numbers = 6 << 20  # bytes of numbers: more than a large page
    save_file({"a": torch.randn(numbers // 8), "b": torch.randn(numbers // 8)}, tmp_path / "x.safetensors")
    size = (tmp_path / "x.safetensors").stat().st_size
    open_slab(tmp_path / "x.safetensors")
    asking = [bytes_read(), bytes_read()]
    own = asking[1] - asking[0]  # what asking itself reads
    held, counts = [], dict[bool, set[int]]({False: set(), True: set()})
    for mapped in (False, True) * 4:
        before = bytes_read()
        held.append(open_slab(tmp_path / "x.safetensors", mapped=mapped))
        counts[mapped].add(bytes_read() - before - own)
    (copied,), (mapped_,) = counts[False], counts[True]
    assert mapped_ < 10_000 and numbers <= copied - mapped_ <= size
    assert all(torch.equal(slab.read("b"), held[0].read("b")) for slab in held)


def test_a_digest_is_of_the_numbers(file: Path, tmp_path: Path) -> None:
    first = open_slab(file).digest
    assert open_slab(file, mapped=True).digest == first
    save_file(TENSORS, tmp_path / "again.safetensors", metadata={"other": "words"})
    assert open_slab(tmp_path / "again.safetensors").digest == first
    save_file({**TENSORS, "b": TENSORS["b"] + 1}, file)
    assert open_slab(file).digest != first


def test_an_outline_has_shapes_and_no_numbers(file: Path) -> None:
    outline = open_outline(file)
    assert outline.read("a").is_meta and outline.read("a").shape == (3, 5) and outline.finite
