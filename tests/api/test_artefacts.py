"""Merge, export and verify from Python are the verbs of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorakeet as lk
from api.conftest import Shared
from lorakeet.errors import ConfigError


def test_merged_exported_and_verified(shared: Shared, tmp_path: Path) -> None:
    merged = lk.merge(shared.run, out=tmp_path / "merged", quiet=True)
    assert merged.certificate.passed and (tmp_path / "merged" / "model.safetensors").is_file()
    exported = lk.export(shared.run.path, tmp_path / "mine.gguf", quant="f32", quiet=True)
    assert exported.certificate.passed
    found = lk.verify(shared.run, tmp_path / "merged", quiet=True)
    assert found.passed and [name.rstrip("/") for name in found.artefacts] == [str(tmp_path / "merged")]
    model = lk.load(tmp_path / "merged", dtype="float32")
    assert model.generate("alder", max_tokens=6) == shared.run.generate("alder", max_tokens=6)
    model.release()


def test_wrong_options_are_named(shared: Shared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown key 'wheights' in lk.merge. Did you mean 'weights'"):
        lk.merge(shared.run, out=tmp_path / "x", wheights=(1.0,))
    with pytest.raises(ConfigError, match=r"quant in lk.export is 'q9'"):
        lk.export(shared.run, tmp_path / "x.gguf", quant="q9")
