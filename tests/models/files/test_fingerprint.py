"""`models.fingerprint`: any other model gives another hash; the same files give the same one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorakeet.models.files import fingerprint as module
from lorakeet.models.files.fingerprint import fingerprint
from tiny.models import save_tiny_llama


@pytest.mark.parametrize("whole", [True, False])
def test_the_same_files_elsewhere_and_other_weights(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(module, "WHOLE", 2**30 if whole else 0)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama_folder, copy)
    assert fingerprint(copy) == fingerprint(tiny_llama_folder)
    other = save_tiny_llama(tmp_path / "other", seed=1)  # equal names and shapes
    assert fingerprint(other) != fingerprint(copy)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert fingerprint(copy) != fingerprint(tiny_llama_folder)


@pytest.mark.parametrize("whole", [True, False])
def test_a_changed_end_of_the_file_shows(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(module, "WHOLE", 2**30 if whole else 0)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama_folder, copy)
    shard = copy / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert fingerprint(copy) != fingerprint(tiny_llama_folder)


def test_files_that_did_not_change_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = save_tiny_llama(tmp_path / "model", seed=3), list[Path]()
    monkeypatch.setattr(module, "add_file", lambda found, shard: (read.append(shard), found.update(shard.read_bytes())))
    first = fingerprint(folder)
    assert fingerprint(folder) == first and len(read) == 1
    save_tiny_llama(folder, seed=4)
    assert fingerprint(folder) != first and len(read) == 2
