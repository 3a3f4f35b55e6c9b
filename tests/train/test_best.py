"""The best tensors so far: copies, in memory or on disk alone, and what they cost in bytes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.train.best import Best

SHAPES = {"a.A": (4, 300), "a.B": (500, 4)}
BYTES = 4 * sum(rows * columns for rows, columns in SHAPES.values())


def tensor_bytes() -> int:
    """Bytes of all storages that live tensors have, each counted once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def parameters() -> dict[str, Parameter]:
    return {name: Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_kept_stays_as_it_was(on_disk: bool, tmp_path: Path) -> None:
    best = Best(tmp_path / "best" if on_disk else None)
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
    trained, best = parameters(), Best(tmp_path / "best" if on_disk else None)
    before = tensor_bytes()
    best.keep(trained)
    assert tensor_bytes() - before == expected
