"""A slab has what the file has, keeps it whatever happens to the file, and knows when it is broken."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakeet.errors import DataError
from lorakeet.formats.files import loaded_file, safetensors_file
from lorakeet.formats.files.loaded_file import load_safetensors, open_header

TENSORS = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.zeros(0, 4)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_are_those_of_the_file(file: Path, mapped: bool) -> None:
    loaded_file = load_safetensors(file, mapped=mapped)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded_file.read(name), tensor) and loaded_file.read(name).shape == tensor.shape
    first, again = loaded_file.read("a"), loaded_file.read("a")
    assert loaded_file.finite and first.data_ptr() == again.data_ptr(), "tensors are views, not copies"


@pytest.mark.parametrize("mapped", [False, True])
def test_other_dtypes_and_odd_places(tmp_path: Path, mapped: bool) -> None:
    mixed = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.tensor([1, 2], dtype=torch.int8)}
    save_file(mixed, tmp_path / "m.safetensors")
    loaded_file = load_safetensors(tmp_path / "m.safetensors", mapped=mapped)
    assert not loaded_file.finite, "each tensor has to be looked at"
    assert all(torch.equal(loaded_file.read(name), tensor) for name, tensor in mixed.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_are_seen(file: Path, value: float) -> None:
    save_file({**TENSORS, "b": torch.tensor([1.0, value])}, file)
    assert not load_safetensors(file).finite and not load_safetensors(file, mapped=True).finite


def test_cutting_or_replacing_the_file_changes_nothing(file: Path) -> None:
    loaded_file = load_safetensors(file)
    file.write_bytes(b"short")
    assert torch.equal(loaded_file.read("a"), TENSORS["a"])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_safetensors(file)


def test_rows_are_those_of_the_slab_and_of_an_outline_have_no_numbers(file: Path) -> None:
    loaded_file, outline = load_safetensors(file), open_header(file)
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, file)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded_file.rows(name)[:], tensor) and outline.rows(name)[:].is_meta


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
    load_safetensors(tmp_path / "x.safetensors")
    asking = [bytes_read(), bytes_read()]
    own = asking[1] - asking[0]  # what asking itself reads
    held, counts = [], dict[bool, set[int]]({False: set(), True: set()})
    for mapped in (False, True) * 4:
        before = bytes_read()
        held.append(load_safetensors(tmp_path / "x.safetensors", mapped=mapped))
        counts[mapped].add(bytes_read() - before - own)
    copied, mapped_ = max(counts[False]), max(counts[True])
    assert all(max(found) - min(found) < 20 for found in counts.values()), "but for the digits of the counts themselves"
    assert mapped_ < 10_000 and numbers <= copied - mapped_ <= size
    assert all(torch.equal(loaded_file.read("b"), held[0].read("b")) for loaded_file in held)


def test_a_digest_is_of_the_numbers(file: Path, tmp_path: Path) -> None:
    first = load_safetensors(file).digest
    assert load_safetensors(file, mapped=True).digest == first
    save_file(TENSORS, tmp_path / "again.safetensors", metadata={"other": "words"})
    assert load_safetensors(tmp_path / "again.safetensors").digest == first
    save_file({**TENSORS, "b": TENSORS["b"] + 1}, file)
    assert load_safetensors(file).digest != first


def test_an_outline_has_shapes_and_no_numbers(file: Path) -> None:
    outline = open_header(file)
    assert outline.read("a").is_meta and outline.read("a").shape == (3, 5) and outline.finite


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose headers were parsed and checked since now, when nothing is remembered."""
    found: list[Path] = []

    def check(path: Path, raw: bytes, size: int) -> safetensors_file.Header:
        found.append(path)
        return safetensors_file.check_header(path, raw, size)

    monkeypatch.setattr(loaded_file, "check_header", check)
    loaded_file._HEADERS.clear()
    loaded_file._NAMED.clear()
    return found


def test_another_byte_of_the_header_or_of_the_file_is_checked_anew(file: Path, tmp_path: Path, parsed: list[Path]) -> None:
    load_safetensors(file)
    whole = file.read_bytes()
    renamed, longer, typed = (tmp_path / f"{name}.safetensors" for name in ("renamed", "longer", "typed"))
    renamed.write_bytes(whole.replace(b'"b"', b'"d"', 1))
    assert set(load_safetensors(renamed).tensors) == {"a", "c", "d"}
    longer.write_bytes(whole + b"\0")
    typed.write_bytes(whole.replace(b'"F32"', b'"F33"', 1))
    for path, said in ((longer, "it has bytes that belong to no tensor"), (typed, "has the dtype 'F33'")) * 2:
        with pytest.raises(DataError, match=said) as error:
            load_safetensors(path)
        assert path.name in str(error.value)
    for cut in (whole[:-1], whole[:40], whole[:4]):
        longer.write_bytes(cut)
        with pytest.raises(DataError, match=r"longer\.safetensors"):
            load_safetensors(longer)
    assert parsed[:2] == [file, renamed] and parsed.count(typed) == 2


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_numbers_are_those_of_the_tensors_in_the_order_of_the_file(tmp_path: Path, dtype: torch.dtype, mapped: bool) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    one = load_safetensors(tmp_path / "x.safetensors", mapped=mapped)
    assert one.header is not None and one.finite
    numbers = one.numbers()
    assert numbers is not None and numbers.dtype is torch.float32
    assert torch.equal(numbers, torch.cat([tensors[name].float().flatten() for name in one.header.order]))
    outline = open_header(tmp_path / "x.safetensors").numbers()
    assert outline is not None and outline.is_meta and outline.shape == numbers.shape


def test_there_is_no_row_of_all_numbers_where_tensors_differ_or_are_empty(file: Path, tmp_path: Path) -> None:
    assert load_safetensors(file).numbers() is None, "one of TENSORS is empty"
    save_file({"a": torch.ones(2), "b": torch.ones(2).bfloat16()}, tmp_path / "m.safetensors")
    assert load_safetensors(tmp_path / "m.safetensors").numbers() is None


def test_a_number_that_fp32_cannot_hold_is_looked_at(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 1e300], dtype=torch.float64)}, tmp_path / "x.safetensors")
    assert not load_safetensors(tmp_path / "x.safetensors").finite


@pytest.fixture
def alone() -> None:
    """No memory is left from other tests, and none comes while a test runs."""
    gc.collect()
    loaded_file.free_spare_memory()


@pytest.mark.usefixtures("alone")
def test_memory_is_used_again_when_its_last_tensor_has_gone(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_file({"a": torch.full((1000,), float(number)), "b": torch.full((24,), -float(number))}, path)
    first = load_safetensors(paths[0])
    kept = first.read("b")
    where = first.read("a").data_ptr()
    del first
    second = load_safetensors(paths[1])
    assert second.read("a").data_ptr() != where and bool((kept == 0).all()), "a tensor of it is still there"
    del kept
    third = load_safetensors(paths[2])
    assert third.read("a").data_ptr() == where and bool((third.read("a") == 2).all()) and bool((second.read("a") == 1).all())
    assert third.digest == load_safetensors(paths[2], mapped=True).digest


@pytest.mark.usefixtures("alone")
def test_memory_of_a_file_that_became_shorter_holds_nothing_of_it_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    save_file({"a": torch.full((1000,), 2.0)}, path)

    def cut_short(path: Path, *others: Any) -> tuple[bytes, int]:
        found = safetensors_file.read_header(path, *others)
        os.truncate(path, file.stat().st_size - 40)
        return found

    monkeypatch.setattr(loaded_file, "read_header", cut_short)
    with pytest.raises(DataError, match="became shorter while it was read"):
        load_safetensors(file)
    monkeypatch.undo()
    assert bool((load_safetensors(path).read("a") == 2).all())
