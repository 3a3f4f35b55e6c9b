"""The reference on disk: read to the bit, and refused where it is of something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakeet.data.chat import Example
from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors
from lorakeet.kinds.preference.reference import VALUES, digest_of, read_reference, save_reference
from lorakeet.kinds.preference.task import Reference

FOUND = Reference(np.array([-1.25, -3.1]), np.array([-0.1, -7.0]), 2048, 1e-5)


def example(*ids: int, targets: int = 1) -> Example:
    return Example(np.array(ids, np.int64), np.arange(len(ids)) >= len(ids) - targets, "", None, False)


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    for reference in (FOUND, replace(FOUND, from_base=None)):
        save_reference(path, reference, "digest")
        found = read_reference(path, "digest")
        assert np.array_equal(found.train, FOUND.train) and np.array_equal(found.held_out, FOUND.held_out)
        assert (found.micro_tokens, found.from_base) == (2048, reference.from_base)


def test_a_reference_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(DataError, match="is missing"):
        read_reference(path, "digest")
    save_reference(path, FOUND, "digest")
    with pytest.raises(DataError, match="another reference model or of other rows"):
        read_reference(path, "other")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError):
        read_reference(path, "digest")


def test_numbers_that_changed_on_disk_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_reference(path, FOUND, "digest")
    whole = path.read_bytes()
    for changed in (np.array([-1.25, -3.2]), FOUND.train[::-1].copy()):
        at = whole.index(FOUND.train.tobytes())
        path.write_bytes(whole[:at] + changed.tobytes() + whole[at + changed.nbytes :])
        with pytest.raises(DataError, match="it is damaged"):
            read_reference(path, "digest")
    damaged = open_safetensors(path)
    tensors = {"train": torch.from_numpy(FOUND.train), "held_out": torch.from_numpy(FOUND.held_out)}
    earlier = {key: value for key, value in damaged.metadata.items() if key != VALUES}
    save_tensors(path, tensors, metadata=earlier)  # as an earlier version wrote it
    assert np.array_equal(read_reference(path, "digest").train, FOUND.train)


def test_the_digest_depends_on_tokens_targets_parts_and_names() -> None:
    rows = [example(1, 2, 3), example(4, 5)]
    digests = {
        digest_of([rows], "model"), digest_of([rows], "other"), digest_of([rows[:1], rows[1:]], "model"),
        digest_of([[example(1, 2, 9), rows[1]]], "model"), digest_of([[example(1, 2, 3, targets=2), rows[1]]], "model"),
    }  # fmt: skip
    assert len(digests) == 5 and digest_of([rows], "model") in digests
