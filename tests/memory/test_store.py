"""The store: aligned records that come back exactly, readable as safetensors, and refused where they are damaged or foreign."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.memory.store import LINE, PAGE, StoredRows, StoreWriter, WeightStore, new_store

IDENTITY = {"model": "a" * 64, "dtype": "float32"}


def block(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q.weight": torch.randn(3, 5, generator=generator),
        "q.base.packed": torch.randint(0, 256, (7,), generator=generator, dtype=torch.uint8),
        "mean": torch.tensor(float(seed)),
        "norm": torch.randn(5, generator=generator).bfloat16(),
    }


def written(path: Path, blocks: int = 3) -> Path:
    with new_store(path, identity=IDENTITY, tensors=4 * blocks) as writer:
        for number in range(blocks):
            writer.add(f"layers.{number}", block(number))
    return path


def test_records_come_back_aligned_and_exact(tmp_path: Path) -> None:
    store = WeightStore.open(written(tmp_path / "s.safetensors"), IDENTITY)
    for number in range(3):
        record = store.record(f"layers.{number}")
        assert record.begin % PAGE == 0 and all(place.begin % LINE == 0 for place in record.tensors.values())
        buffer = torch.empty(record.bytes, dtype=torch.uint8)
        store.read(record.begin, buffer)
        views = record.views(buffer)
        assert views.keys() == block(number).keys()
        for name, tensor in block(number).items():
            assert views[name].dtype == tensor.dtype and torch.equal(views[name], tensor)
            assert torch.equal(store.tensor(f"layers.{number}.{name}"), tensor)
    with pytest.raises(KeyError):
        store.record("layers.3")
    store.close()


def test_layers_1_is_not_layers_10(tmp_path: Path) -> None:
    store = WeightStore(written(tmp_path / "s.safetensors", blocks=11))
    assert store.record("layers.1").end < store.record("layers.10").begin
    store.close()


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = load_file(written(tmp_path / "s.safetensors"))
    assert torch.equal(tensors["layers.2.q.weight"], block(2)["q.weight"])
    assert {name.partition(".")[0] for name in tensors} == {"layers", "padding"}


def test_rows_are_read_alone_and_in_parts(tmp_path: Path) -> None:
    weight, stack = torch.randn(9, 4).bfloat16(), torch.randn(5, 3, 2)
    with new_store(tmp_path / "s", identity=IDENTITY, tensors=3) as writer:
        writer.add("embed", {"weight": weight, "stack": stack, "norm": stack[0, 0]})
    store = WeightStore(tmp_path / "s")
    rows = StoredRows(store, "embed.weight")
    assert rows.shape == (9, 4) and rows.dtype == torch.bfloat16
    assert torch.equal(rows[2:5], weight[2:5]) and torch.equal(rows[6:100], weight[6:])
    assert torch.equal(rows.gather([8, 0, 8]), weight[[8, 0, 8]])
    elsewhere = store.rows("embed.weight", torch.device("meta"))
    assert elsewhere[2:5].is_meta and elsewhere.gather([1]).is_meta and elsewhere.lookup(torch.tensor([[1, 2]])).is_meta
    assert torch.equal(store.rows("embed.stack")[3:], stack[3:]) and torch.equal(store.rows("embed.norm")[:], stack[0, 0])
    store.close()


def test_another_models_store_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "s.safetensors")
    with pytest.raises(DataError, match=r"holds another model.*model is aaaa.*not bbbb"):
        WeightStore.open(path, {**IDENTITY, "model": "b" * 64})


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.999])
def test_a_truncated_store_is_refused(tmp_path: Path, keep: float) -> None:
    path = written(tmp_path / "s.safetensors")
    size = path.stat().st_size
    os.truncate(path, int(keep if keep > 1 else size * keep))
    with pytest.raises(DataError, match=r"cut off|damaged"):
        WeightStore(path)


def test_a_store_that_is_cut_off_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "s.safetensors")
    store = WeightStore(path)
    record = store.record("layers.2")
    os.truncate(path, record.begin + 8)
    with pytest.raises(DataError, match="ends at byte"):
        store.read(record.begin, torch.empty(record.bytes, dtype=torch.uint8))
    store.close()


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "s.safetensors")
    data = bytearray(path.read_bytes())
    data[8] = ord("[")
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        WeightStore(path)


def test_too_little_disk_space_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(EnvironmentProblem, match=r"[GM]iB free"),
        new_store(tmp_path / "s", identity=IDENTITY, tensors=1, size=1 << 60),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")])
def test_what_the_disk_refuses_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(StoreWriter, "add", refuse)
    with pytest.raises(EnvironmentProblem, match=words):
        written(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        written(tmp_path / "file" / "s.safetensors")


def test_an_interrupted_store_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        new_store(tmp_path / "s", identity=IDENTITY, tensors=4) as writer,
    ):
        writer.add("layers.0", block(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_names_are_used_once_and_the_header_is_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already has"), new_store(tmp_path / "s", identity=IDENTITY, tensors=8) as writer:
        writer.add("a", {"w": torch.zeros(2)})
        writer.add("a", {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="are reserved"), new_store(tmp_path / "s", identity={"x": "y" * 10**5}, tensors=1):
        pass
