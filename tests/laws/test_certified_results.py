"""What is made of an adapter says if it was uncertified, and comes with its certificate by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lorakeet.cli.main import main
from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.identity import content_differences, require_certified
from lorakeet.runs.certified import model_identity
from tiny.damages import DAMAGES
from tiny.runs import QUICK, reviews, sentence, write_rows

NOTE = "uncertified: tensor "


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.path, tmp_path / "copied"))


@pytest.fixture
def damaged(copied: Path) -> Path:
    DAMAGES["A of two layers swapped"][0](copied)
    return copied


def test_rows_state_an_uncertified_adapter(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nalder birch GOOD\noak\n")
    words = ["predict", str(damaged), "--data", str(rows), "--json", "--uncertified"]
    assert main([*words, "--out", str(tmp_path / "answers.jsonl")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["columns"][-1] == "label_adapter" and any(note.startswith(NOTE) for note in said["notes"])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and all(answer["label_adapter"].startswith(NOTE) for answer in answers)
    assert answers[0]["label"] and "label_review" in answers[0]


def test_rows_of_a_certified_adapter_have_no_such_column(copied: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nalder birch GOOD\n")
    assert main(["predict", str(copied), "--data", str(rows), "--out", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").read_text().splitlines()[0].split(",")[-1] == "label_review"


@pytest.mark.slow
def test_a_compressed_adapter_says_what_it_was_cut_from(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert main(["compress", str(damaged), "--out", str(out), "--to", "1200", "--tolerance", "0.9", "--uncertified"]) in (0, 3)
    assert read_certificate(out / "certificate.json").facts["adapter"].startswith(NOTE)
    report = read_report(out / "report.json")
    assert NOTE in report.facts["Adapter"] and NOTE in report.warnings[0]
    assert require_certified(out) == ""


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["lora.continue_from", "lora.on_top_of", "train.reference"])
def test_training_from_an_uncertified_adapter_is_said(damaged: Path, finished: Any, tmp_path: Path, setting: str) -> None:
    out = tmp_path / "again"
    words = ["finetune", str(damaged / "config.yaml"), "--train.steps", "1", "--lora.rank", "2"]
    if setting == "train.reference":
        other = sentence(Random(1))
        made = [{"prompt": row["text"], "chosen": f"{row['label']} it is", "rejected": other} for row in reviews(40)]
        pairs = write_rows(tmp_path / "pairs.jsonl", made)
        words = ["finetune", "--model", str(finished.model), "--data.train", str(pairs), "--train.objective", "dpo"]
        words += [word for name, value in {**QUICK, "train.steps": "1"}.items() for word in (f"--{name}", value)]
    words += [f"--{setting}", str(damaged), "--out", str(out)]
    assert main(words) == 3
    assert not (out / "adapter").exists()
    assert main([*words, "--uncertified"]) == 0
    assert NOTE in read_certificate(out / "certificate.json").facts["adapter"]
    assert any(NOTE in warning for warning in read_report(out / "report.json").warnings)
    assert NOTE in (out / "adapter" / "README.md").read_text()
    assert require_certified(out) == "", "the new adapter has a certificate of its own"


MADE: dict[str, Callable[[Path], list[str]]] = {
    "merge": lambda out: ["merge", "RUN", "--out", str(out)],
    "combine": lambda out: ["merge", "RUN", "--to", "adapter", "--rank", "2", "--out", str(out)],
    "compress": lambda out: ["compress", "RUN", "--to", "1200", "--tolerance", "0.9", "--out", str(out)],
    "gguf": lambda out: ["export", "RUN", "--quant", "f32", "--out", f"{out}.gguf"],
    "ollama": lambda out: ["export", "RUN", "--to", "ollama", "--quant", "f32", "--out", str(out)],
    "extract": lambda out: ["extract", "MERGED", "BASE", "--rank", "4", "--out", str(out)],
}
ADAPTERS = ("combine", "compress", "extract")


def certificate_beside(out: Path) -> Path:
    return out / "certificate.json" if out.is_dir() else out.with_name(f"{out.stem}.certificate.json")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_a_result_and_its_certificate_come_by_one_rename(
    kind: str, copied: Path, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each rename the place holds nothing, or the whole with a certificate of just that."""
    if kind == "extract":
        assert main(["merge", str(copied), "--out", str(tmp_path / "merged")]) == 0
    names = {"RUN": str(copied), "MERGED": str(tmp_path / "merged"), "BASE": str(finished.model)}
    place = tmp_path / "made"
    words = [names.get(word, word) for word in MADE[kind](place)]
    out = Path(words[words.index("--out") + 1])
    if kind == "gguf":  # of an earlier file that is gone
        Certificate("Another", read_certificate(copied / "certificate.json").checks).write(certificate_beside(out))
    seen: list[bool] = []
    replace, rename = os.replace, os.rename

    def watched(move: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any, **more: Any) -> None:
            move(source, target, **more)
            if out.exists():
                held = read_certificate(certificate_beside(out))
                apart = [] if kind in ADAPTERS else content_differences(held.identity, model_identity(out))
                seen.append(bool(held.identity) and not apart)

        return moved

    monkeypatch.setattr(os, "replace", watched(replace))
    monkeypatch.setattr(os, "rename", watched(rename))
    assert main(words) in (0, 3)
    assert seen and all(seen)
    if kind in ADAPTERS:
        assert require_certified(out) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_a_crash_before_the_certificate_leaves_nothing(
    kind: str, copied: Path, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "extract":
        assert main(["merge", str(copied), "--out", str(tmp_path / "merged")]) == 0
    names = {"RUN": str(copied), "MERGED": str(tmp_path / "merged"), "BASE": str(finished.model)}
    words = [names.get(word, word) for word in MADE[kind](tmp_path / "made")]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Certificate, "write", killed)
    assert main(words) != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"copied", *(["merged"] if kind == "extract" else [])})


@pytest.mark.slow
@pytest.mark.parametrize("what", ["--merged", "--gguf"])
def test_push_compares_what_was_made(
    what: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "none")
    monkeypatch.setattr("lorakeet.verbs.push.upload", lambda *given, **more: pytest.fail("sent"))
    out = tmp_path / ("merged" if what == "--merged" else "model.gguf")
    made = ["merge"] if what == "--merged" else ["export", "--quant", "f32"]
    assert main([made[0], str(copied), *made[1:], "--out", str(out)]) == 0
    file = out / "model.safetensors" if out.is_dir() else out
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(bytes(raw))
    words = ["push", str(copied), "a/b", "--base", "c/d", what, str(out)]
    capsys.readouterr()
    assert main(words) == 3
    assert "model weights has changed" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(pytest.fail.Exception, match="sent"):
        main([*words, "--uncertified"])
