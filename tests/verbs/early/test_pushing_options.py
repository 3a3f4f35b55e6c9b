"""What `lorakeet push` refuses before the hub is reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, Check
from lorakeet.verbs.early.pushing_options import named_here, require_pushable
from lorakeet.verbs.options import PushOptions


def certificate(*, passed: bool) -> Certificate:
    return Certificate("a", (Check("logits", "a", "b", {"x": 2.0 - passed}, {"x": 1.0}, passed=passed),))


def run_folder(folder: Path, *, base: str, passed: bool = True) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: m\n")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    certificate(passed=passed).write(folder / "certificate.json")
    return folder


def refused(kind: type[Exception], words: str, run: Path, **more: object) -> None:
    with pytest.raises(kind, match=words):
        require_pushable(PushOptions(str(run), "me/x", **more))  # type: ignore[arg-type]


def test_a_run_that_passed_on_a_base_of_the_hub(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", base="plants/tiny")
    assert require_pushable(PushOptions(str(run), "me/x")).path == run


def test_what_is_missing_or_failed(tmp_path: Path) -> None:
    refused(DataError, "nope is no finished run: it has no certificate", tmp_path / "nope")
    failed = run_folder(tmp_path / "failed", base="plants/tiny", passed=False)
    refused(VerificationFailed, "does not compute what it should", failed)
    run = run_folder(tmp_path / "run", base="plants/tiny")
    refused(DataError, "is no merged model. Write one with: lorakeet merge", run, merged=tmp_path / "merged")
    refused(DataError, "does not exist. Write it with: lorakeet export", run, gguf=tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(VerificationFailed, r"a\.gguf has no certificate \(.*a\.certificate\.json is", run, gguf=tmp_path / "a.gguf")
    certificate(passed=False).write(tmp_path / "a.certificate.json")
    refused(VerificationFailed, "does not compute what it should", run, gguf=tmp_path / "a.gguf")


def test_a_base_that_only_this_machine_can_name(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", base=str(tmp_path))
    refused(ConfigError, "found on this machine only. Give its id on the hub with --base", run)
    moved = str(tmp_path / "moved")
    assert named_here(moved) and named_here("package:not-installed") and not named_here("plants/tiny")
    require_pushable(PushOptions(str(run), "me/x", base="plants/tiny"))
