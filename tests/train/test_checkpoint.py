"""Checkpoints: written whole, read back exactly, damage found."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.errors import ConfigError
from lorakeet.train import checkpoint, rng
from lorakeet.train.checkpoint import BestTensors, Position, Snapshot
from lorakeet.train.spec import TrainSpec
from lorakeet.train.stopping import EarlyStopping


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    trained = {name: torch.randn(3, 4, generator=generator) for name in ("a.A", "a.B")}
    moments = {"a.A|exp_avg": torch.randn(3, 4, generator=generator), "a.A|step": torch.tensor(float(step))}
    watch = EarlyStopping(base_loss=3.0, best_loss=0.1 + step, best_step=step, reference=0.1 + step, stale=1)
    position = Position(step=step, seconds=1.5, tokens=100, metrics_bytes=10, watch=watch)
    return Snapshot(position, trained, moments, rng.states(), {"a.A": trained["a.A"] * 2}, {"same": {"x": 1}, "environment": {}})


def test_all_comes_back(tmp_path: Path) -> None:
    saved = snapshot(7)
    path = checkpoint.save(tmp_path, saved, keep=2)
    assert path.name == "step-000007"
    read = checkpoint.load_checkpoint(path)
    assert (read.position, read.identity) == (saved.position, saved.identity)
    for name in ("trained", "moments", "random", "best"):
        before, after = getattr(saved, name), getattr(read, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(1), keep=1)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert not [file for file in path.iterdir() if file.read_bytes()[:2] in (b"\x80\x04", b"PK")]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000010", "step-000011"]


@pytest.mark.parametrize("file", ["trained.safetensors", "moments.safetensors", "random.safetensors", "best.safetensors",
                                  "state.json", "manifest.json"])  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_any_damage_is_found_and_the_one_before_used(tmp_path: Path, file: str, damage: str) -> None:
    checkpoint.save(tmp_path, snapshot(4), keep=3)
    path = checkpoint.save(tmp_path, snapshot(8), keep=3) / file
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + (bytes([data[middle] ^ 4]) + data[middle + 1 :] if damage == "flip" else b""))
    said: list[str] = []
    found = checkpoint.load_newest(tmp_path, say=said.append)
    assert found is not None
    assert found.position.step == 4
    assert len(said) == 1
    assert "step-000008 is damaged" in said[0]
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-000004"]
    assert (tmp_path / "step-000008.damaged").is_dir()


def test_of_several_hashes_one_must_be_the_same() -> None:
    earlier, now, elsewhere = {"model": "b" * 64}, {"model": ["a" * 64, "b" * 64]}, {"model": ["a" * 64, "c" * 64]}
    for saved, found in ((earlier, now), (now, {"model": "a" * 64}), (now, elsewhere)):
        checkpoint.require_same(saved, found, run=Path("run"))
    with pytest.raises(ConfigError, match=r"The model changed .*\(sha256 bbbbbbbb… then, aaaaaaaa… now\)"):
        checkpoint.require_same(earlier, elsewhere, run=Path("run"))


def test_other_settings_are_named_all_at_once() -> None:
    shapes = {"a.A": torch.zeros(2, 3)}
    saved = checkpoint.run_identity(TrainSpec(), {"data": "abc"}, parameters=shapes, learning_rate=1e-3)
    same = checkpoint.run_identity(
        TrainSpec(keep_checkpoints=5, log_to="wandb"), {"data": "abc"}, parameters=shapes, learning_rate=1e-3
    )
    checkpoint.require_same(json.loads(json.dumps(saved)), same, run=Path("run"))
    other = checkpoint.run_identity(TrainSpec(seed=1), {"data": "abd"}, parameters={"a.A": torch.zeros(2, 4)}, learning_rate=2e-3)
    with pytest.raises(ConfigError) as error:
        checkpoint.require_same(saved, other, run=Path("run"))
    words = ("4 problems", "train.seed was 0", "is 1 now", "The data changed since run started", "train.learning_rate was 0.001")
    for word in (*words, "The trained tensors changed"):
        assert word in str(error.value)


SHAPES = {"a.A": (4, 300), "a.B": (500, 4)}
BYTES = 4 * sum(rows * columns for rows, columns in SHAPES.values())


def storages() -> dict[int, int]:
    """Bytes of all storages that live tensors with numbers have, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, Parameter) and thing.layout == torch.strided and thing.device.type == "cpu":  # with numbers
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def parameters() -> dict[str, Parameter]:
    return {name: Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_kept_stays_as_it_was(on_disk: bool, tmp_path: Path) -> None:
    best = BestTensors(tmp_path / "best" if on_disk else None)
    assert best.tensors is None
    trained = parameters()
    for _ in range(2):
        best.keep(trained)
        then = {name: parameter.detach().clone() for name, parameter in trained.items()}
        with torch.no_grad():
            for parameter in trained.values():
                parameter.mul_(2)
        assert best.tensors is not None and best.tensors.keys() == then.keys()
        assert all(torch.equal(best.tensors[name], then[name]) for name in then)
    best.close()
    assert best.tensors is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("on_disk", "expected"), [(False, BYTES), (True, 0)])
def test_on_disk_it_takes_no_memory(on_disk: bool, expected: int, tmp_path: Path) -> None:
    trained, best = parameters(), BestTensors(tmp_path / "best" if on_disk else None)
    before = storages()
    best.keep(trained)
    assert sum(size for place, size in storages().items() if place not in before) == expected
