"""Uploads take at most a stated number of bytes: counted before they are written, freed at once, known after a restart."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lorakeet.serve.upload_space import FORGOTTEN, UploadsFull, UploadSpace

BLOCK = 4096


def put(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def space(folder: Path, blocks: int) -> UploadSpace:
    return UploadSpace(folder / "uploads", folder / "incoming", blocks * BLOCK)


def test_bytes_are_counted_before_they_are_written(tmp_path: Path) -> None:
    within = space(tmp_path, 4)
    part = tmp_path / "incoming" / "x.part"
    for _ in range(4):
        within.grow(part, BLOCK)
    with pytest.raises(UploadsFull, match=r"may take 16 KiB in all \(--uploads-total\).*DELETE /v1/adapters/NAME"):
        within.grow(part, 1)
    assert within.used == 4 * BLOCK, "what was refused is not counted"
    assert not part.exists(), "nothing was written yet"
    with pytest.raises(UploadsFull):
        within.grow(tmp_path / "incoming" / "y.part", 0)
    within.end(part, stored=False)
    assert within.used == 0


def test_an_empty_file_counts_a_block(tmp_path: Path) -> None:
    within = space(tmp_path, 3)
    for number in range(3):
        within.grow(tmp_path / "incoming" / f"{number}.part", 0)
    with pytest.raises(UploadsFull):
        within.grow(tmp_path / "incoming" / "3.part", 0)


def test_what_is_there_at_a_start_counts_and_what_was_removed_does_not(tmp_path: Path) -> None:
    kept = put(tmp_path / "uploads" / "a@1" / "adapter_model.safetensors", 2 * BLOCK + 1)
    put(tmp_path / "incoming" / "someone" / "b" / "adapter_config.json", 10)
    within = space(tmp_path, 4)
    part = tmp_path / "incoming" / "x.part"
    with pytest.raises(UploadsFull):
        within.grow(part, 1)
    kept.unlink()
    within.grow(part, 3 * BLOCK)
    assert within.used == 4 * BLOCK


def test_a_file_that_is_written_counts_once(tmp_path: Path) -> None:
    within = space(tmp_path, 3)
    part = put(tmp_path / "incoming" / "x.part", 0)
    within.grow(part, 2 * BLOCK)
    put(part, 2 * BLOCK)
    assert within.used == 2 * BLOCK
    os.replace(part, put(tmp_path / "incoming" / "someone" / "b" / "file", 0))
    within.end(part, stored=True)
    assert within.used == 2 * BLOCK
    within.grow(part, BLOCK)
    with pytest.raises(UploadsFull):
        within.grow(part, 1)


def test_what_was_never_accepted_goes_where_space_is_needed(tmp_path: Path) -> None:
    old, new = (put(tmp_path / "incoming" / "someone" / name / "adapter_config.json", BLOCK) for name in ("old", "new"))
    within = space(tmp_path, 2)
    then = time.time() - FORGOTTEN - 60
    os.utime(old.parent, (then, then))
    within.grow(tmp_path / "incoming" / "x.part", 1)
    assert not old.exists() and new.exists()


def test_a_link_among_uploads_leads_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "large", 100 * BLOCK)
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "a@1").symlink_to(tmp_path / "elsewhere")
    assert space(tmp_path, 1).used == BLOCK
