"""No verb uses an adapter of another content than its certificate's; --uncertified goes on, and the result says so."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lorakeet as lk
from lorakeet.cli.main import main
from lorakeet.config import RunConfig, dump_yaml, read_run
from lorakeet.errors import DataError, LorakeetError, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.evaluate.report.report import read_report, write_report
from lorakeet.formats.detect import read_certified
from lorakeet.formats.files.loaded_file import open_header
from lorakeet.formats.identity import require_certified
from lorakeet.formats.peft import peft
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.serve.adapter_files import inspect_adapter, read_stored_adapter
from lorakeet.studio.index import summary_of
from lorakeet.verbs.options import VERBS
from tiny.damages import DAMAGES, SEVEN
from tiny.exports import certified_anew


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.path, tmp_path / "copied"))


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_named(copied: Path, name: str) -> None:
    assert require_certified(copied) == require_certified(copied / "adapter") == ""
    damage, named = DAMAGES[name]
    damage(copied)
    for path in (copied, copied / "adapter"):
        with pytest.raises(LorakeetError) as refused:
            require_certified(path)
        assert named in str(refused.value)
        with pytest.raises(LorakeetError):
            lk.Adapter.read(path, quiet=True)
    assert main(["check", str(copied)]) in (2, 3), "exit 0 for seven of seven on 2b423591"


# How each verb with an adapter is called; a new verb with a run or adapter stands here or in FREE, or the law fails.
CALLS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "evaluate": lambda run, out, base: [str(run)],
    "predict": lambda run, out, base: [str(run), "--data", str(run / "rows.jsonl"), "--out", str(out / "a.jsonl")],
    "merge": lambda run, out, base: [str(run), "--out", str(out / "merged")],
    "compress": lambda run, out, base: [str(run), "--out", str(out / "small")],
    "convert": lambda run, out, base: [str(run), str(out / "kohya.safetensors"), "--to", "kohya"],
    "export": lambda run, out, base: [str(run), "--out", str(out / "a.gguf")],
    "verify": lambda run, out, base: [str(run), "--against", str(base)],
    "check": lambda run, out, base: [str(run)],
    "chat": lambda run, out, base: [str(run)],
    "serve": lambda run, out, base: ["--model", str(base), "--adapter", f"a={run}", "--port", "0"],
    "push": lambda run, out, base: [str(run), "a/b", "--base", "c/d"],
    "generate": lambda run, out, base: ["--prompt", "a fox", "--adapter", f"a={run}", "--out", str(out / "drawn")],
    "finetune": lambda run, out, base: [
        str(run / "config.yaml"), "--lora.continue_from", str(run), "--out", str(out / "again"), "--train.steps", "1"
    ],
}  # fmt: skip
FREE = {
    "quickstart", "plan", "tune",  # train anew
    "extract", "quantize",  # read models
    "studio", "doctor",
}  # fmt: skip


def test_every_verb_is_in_the_table() -> None:
    assert {verb.name for verb in VERBS} == {*CALLS, *FREE}
    for verb in VERBS:
        names = {one.name for one in fields(verb.options)} | ({one.name for one in fields(RunConfig)} & {"uncertified"})
        assert ("uncertified" in names) >= (verb.name in CALLS)


def called(verb: str, run: Path, out: Path, base: Path, *more: str) -> int:
    """The exit code of a verb about `run`; `generate` is for runs on images, which are compared before any model is read."""
    if verb == "generate":
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("kind: text", "kind: image"))
    return main([verb, *CALLS[verb](run, out, base), *more])


@pytest.mark.parametrize("name", SEVEN)
@pytest.mark.parametrize("verb", CALLS)
def test_every_verb_refuses(
    copied: Path, verb: str, name: str, finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "none")
    (copied / "rows.jsonl").write_text('{"text": "alder birch"}\n')
    damage, named = DAMAGES[name]
    damage(copied)
    code = called(verb, copied, tmp_path / "out", finished.model)
    said = " ".join(capsys.readouterr().err.split())
    assert code == (2 if name == "cut in half" else 3) and named in said, said
    assert not [*tmp_path.glob("out/*")], "nothing is written"


@pytest.mark.parametrize("name", SEVEN)
def test_python_refuses(copied: Path, name: str, tmp_path: Path) -> None:
    DAMAGES[name][0](copied)
    calls: list[Callable[[], Any]] = [
        lambda: lk.open_run(copied).adapter, lambda: lk.merge(copied, out=tmp_path / "m", quiet=True),
        lambda: lk.export(copied, tmp_path / "a.gguf", quiet=True), lambda: lk.evaluate(copied, quiet=True),
        lambda: lk.predict(copied, [{"text": "alder"}], quiet=True), lambda: lk.verify(copied, against=["x"], quiet=True),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LorakeetError) as refused:
            call()
        assert DAMAGES[name][1] in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


@pytest.mark.parametrize("way", ["merge", "gguf", "ollama", "mlx"])
@pytest.mark.parametrize("name", SEVEN)
def test_the_studios_commands_refuse(copied: Path, way: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What its buttons carry out; the job shows what is said, with a click that goes on (tests/studio/test_taking.py)."""
    pytest.importorskip("starlette", reason="starlette, of the extra lorakeet[studio], makes the pages")
    from lorakeet.studio.places import Places
    from lorakeet.studio.taking import wanted

    DAMAGES[name][0](copied)
    found = wanted(Places.of(copied.parent, (copied.parent,)), copied.name, way, {"quant": "f16"})
    assert main(list(found.words)) == (2 if name == "cut in half" else 3)
    said = " ".join(capsys.readouterr().err.split())
    assert DAMAGES[name][1] in said and (name == "cut in half" or "--uncertified" in said)


BASED = [verb for verb in CALLS if verb not in ("generate", "finetune")]  # an image run has another base; it may train on any


@pytest.mark.parametrize("verb", BASED)
def test_every_verb_compares_the_base(
    copied: Path, verb: str, finished: Any, tmp_path: Path, other_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The base of the run changed where it lies, and, for verbs that can name one, another base is named."""
    monkeypatch.setenv("HF_TOKEN", "none")
    (copied / "rows.jsonl").write_text('{"text": "alder birch"}\n')
    options = {one.name for one in fields(next(one.options for one in VERBS if one.name == verb))}
    if "base" in options and verb not in ("push", "convert"):
        assert called(verb, copied, tmp_path / "out", other_base, "--base", str(other_base)) == 3
        assert "base weights has changed" in " ".join(capsys.readouterr().err.split())
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(finished.model), str(other_base)))
    assert called(verb, copied, tmp_path / "out", other_base) == 3
    assert "base weights has changed" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def other_base(finished: Any, tmp_path: Path) -> Path:
    """The base with one matrix moved by 0.01."""
    other = Path(shutil.copytree(finished.model, tmp_path / "other"))
    weights = next(other.glob("*.safetensors"))
    found = load_file(weights)
    found[sorted(found)[0]] += 0.01
    save_file(found, weights, metadata={"format": "pt"})
    return other


@pytest.mark.slow
def test_another_base_goes_on_with_uncertified(copied: Path, other_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert main(["evaluate", str(copied), "--base", str(other_base), "--uncertified", "--out", str(out)]) == 0
    assert read_report(out / "report.json").facts["Adapter"].startswith("uncertified: base weights")
    assert main(["check", str(copied), "--certificate", "any"]) == 0, "the run itself stays as it was"


def test_the_same_base_quantised_otherwise_is_said(copied: Path, tmp_path: Path) -> None:
    settings = tmp_path / "packed.yaml"
    config = read_run(copied / "config.yaml")
    settings.write_text(dump_yaml(config.changed(model={"quantize": QuantSpec(method="int8")})))
    said = open_adapter(copied, config=settings, say=lambda _: None).note
    assert said.startswith("uncertified: base quantisation"), "what --config requests is no damage"
    config_file = copied / "config.yaml"
    config_file.write_text(settings.read_text())
    with pytest.raises(VerificationFailed, match="base quantisation"):
        open_adapter(copied, say=lambda _: None)


def test_a_base_that_is_not_here_is_said(copied: Path, finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(finished.model), "/nowhere/model"))
    assert main(["check", str(copied)]) == 0
    assert "base not compared" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("place", ["lorakeet.formats.detect.peft.read", "lorakeet.serve.adapter_files.peft.read"])
def test_what_was_read_is_compared(copied: Path, finished: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is put back between reading and comparing is another one than is used."""
    file = copied / "adapter" / "adapter_model.safetensors"
    good = file.read_bytes()
    DAMAGES["B x 3"][0](copied)

    def read(folder: Path, **how: Any) -> Any:
        found = peft.read(folder, **how)
        if getattr(how.get("opened"), "func", how.get("opened")) is not open_header:
            file.write_bytes(good)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(place.replace("peft.read", "peft"), SimpleNamespace(**{**vars(peft), "read": read}))
        with pytest.raises(VerificationFailed, match=r"lora_B\.weight has changed"):
            if "serve" in place:
                live = ServingModel(load_text_model(ModelSpec(path=str(finished.model), dtype="float32")))
                source = inspect_adapter(copied, live)
                read_stored_adapter(source, "a", live, lambda path, read: require_certified(path, read=read))
            else:
                read_certified(copied, say=lambda _: None)
    assert require_certified(copied) == ""


@pytest.mark.slow
def test_uncertified_goes_on_and_the_results_say_so(copied: Path, tmp_path: Path) -> None:
    DAMAGES["A of two layers swapped"][0](copied)
    assert main(["merge", str(copied), "--to", "adapter", "--rank", "2", "--out", str(tmp_path / "small"), "--uncertified"]) == 0
    found = read_certificate(tmp_path / "small" / "certificate.json")
    assert found.facts["adapter"].startswith("uncertified: tensor ") and require_certified(tmp_path / "small") == ""
    assert main(["evaluate", str(copied), "--out", str(tmp_path / "report"), "--uncertified"]) == 0
    report = read_report(tmp_path / "report" / "report.json")
    assert report.facts["Adapter"].startswith("uncertified: ") and "uncertified" in report.warnings[0]


@pytest.mark.slow
def test_a_resumed_run_that_is_cut_off_keeps_its_own_adapter(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate of the earlier end is of an earlier adapter: it goes when another is written."""

    def cut_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    DAMAGES["A of two layers swapped"][0](copied)
    certified_anew(copied)  # as of an earlier end; the last checkpoint has other tensors
    monkeypatch.setattr("lorakeet.verbs.finetune.complete", cut_off)
    assert main(["finetune", "--resume", str(copied)]) != 0
    assert (copied / "adapter").is_dir() and not (copied / "certificate.json").exists()
    with pytest.raises(VerificationFailed, match="certificate is missing"):
        require_certified(copied)


@pytest.mark.parametrize("verb", CALLS)
def test_a_run_that_lost_its_certificate_is_refused(
    copied: Path, verb: str, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "none")
    (copied / "rows.jsonl").write_text('{"text": "alder birch"}\n')
    (copied / "certificate.json").unlink()
    for path in (copied, copied / "adapter"):
        with pytest.raises(VerificationFailed, match="its certificate is missing"):
            require_certified(path)
    assert called(verb, copied, tmp_path / "out", finished.model) == (2 if verb == "push" else 3)
    assert require_certified(copied, uncertified=True).startswith("uncertified: its certificate is missing")


def test_a_missing_certificate_is_a_requirement_that_is_not_met(copied: Path) -> None:
    (copied / "certificate.json").unlink()
    assert main(["check", str(copied), "--certificate", "passed", "--uncertified"]) == 3
    assert main(["check", str(copied), "--certificate", "any", "--uncertified"]) == 0


def test_any_certificate_does_not_skip_the_comparison(copied: Path) -> None:
    DAMAGES["B x 3"][0](copied)
    assert main(["check", str(copied), "--certificate", "any"]) == 3
    assert main(["check", str(copied), "--certificate", "any", "--uncertified"]) == 0


@pytest.mark.slow
def test_the_card_of_what_was_made_of_it_says_so(copied: Path, tmp_path: Path) -> None:
    DAMAGES["A of two layers swapped"][0](copied)
    made = ["--out", str(tmp_path / "made"), "--to", "ollama", "--quant", "f32"]
    assert main(["export", str(copied), *made, "--uncertified"]) == 0
    said = (tmp_path / "made" / "README.md").read_text()
    assert "The adapter was uncertified: tensor" in said


def test_without_a_certificate_it_is_not_trained_here(copied: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(copied / "adapter", tmp_path / "bare"))
    said: list[str] = []
    assert require_certified(bare, say=said.append) == "not trained here" and "not trained here" in said[0]
    assert open_adapter(bare, say=lambda _: None).note == "not trained here"


def test_older_certificates_stay_readable(copied: Path) -> None:
    path = copied / "certificate.json"
    told = json.loads(path.read_text())
    del told["sha256"], told["identity"]
    path.write_text(json.dumps(told))
    assert read_certificate(path).passed and "before adapters were identified" in require_certified(copied)


def test_the_base_is_compared_by_content(copied: Path, finished: Any, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(finished.model, tmp_path / "moved"))
    assert open_adapter(copied, base=str(moved), say=lambda _: None).note == "", "another place is no other content"
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(finished.model), str(moved)))
    assert open_adapter(copied, say=lambda _: None).note == ""


def test_a_broken_certificate_is_no_missing_one(copied: Path) -> None:
    (copied / "certificate.json").write_text("{")
    with pytest.raises(DataError):
        require_certified(copied)


def test_the_bases_tokenizer_is_compared(copied: Path, finished: Any, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished.model, tmp_path / "retold"))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(VerificationFailed, match=r"base tokenizer chat_template\.jinja"):
        open_adapter(copied, base=str(other), say=lambda _: None)


def test_a_link_to_an_adapter_has_its_certificate(copied: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(copied / "adapter")
    assert require_certified(link) == ""
    DAMAGES["B x 3"][0](copied)
    with pytest.raises(VerificationFailed, match=r"lora_B\.weight has changed"):
        require_certified(link)


def test_an_edited_report_is_found(copied: Path) -> None:
    path = copied / "report.json"
    path.write_text(path.read_text().replace('"accuracy": {\n', '"accuracy": {\n ', 1))
    assert main(["check", str(copied)]) == 0, "white space is no content"
    told = json.loads(path.read_text())
    told["rows_of"] = 500
    path.write_text(json.dumps(told))
    assert main(["check", str(copied), "--accuracy", ">=0"]) == 2


def test_a_report_of_another_run_is_found(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is whole, with a digest of its own; even one of the same adapter and certificate, of other rows."""
    monkeypatch.setenv("HF_TOKEN", "none")
    report = read_report(copied / "report.json")
    (other := tmp_path / "other").mkdir()
    write_report(dataclasses.replace(report, rows_of=500, warnings=("another",)), other)
    assert read_report(other / "report.json").rows_of == 500
    shutil.copy(other / "report.json", copied / "report.json")
    shutil.copy(other / "report.html", copied / "report.html")
    with pytest.raises(DataError, match="is not the report that"):
        read_report(copied / "report.json")
    assert main(["check", str(copied), "--accuracy", ">=0"]) == main(["check", str(copied), "--uncertified"]) == 2
    assert main(["push", str(copied), "a/b", "--base", "c/d"]) == 2
    assert "is not the report that" in summary_of(copied).problem


@pytest.mark.slow
def test_a_run_that_ended_between_certificate_and_report_is_measured_again(copied: Path) -> None:
    """Its report is of an earlier evaluation, and no other exists."""
    certificate = read_certificate(copied / "certificate.json")
    dataclasses.replace(certificate, report="0" * 64).write(copied / "certificate.json")
    with pytest.raises(DataError, match="is not the report that") as refused:
        read_report(copied / "report.json")
    _, _, command = str(refused.value).rpartition("lorakeet ")
    assert main(shlex.split(command)) == 0
    assert read_report(copied / "report.json") and main(["check", str(copied)]) == 0


@pytest.mark.slow
def test_a_report_stays_that_of_its_certificate_when_artefacts_are_verified(copied: Path, tmp_path: Path) -> None:
    written = read_certificate(copied / "certificate.json").report
    assert main(["merge", str(copied), "--out", str(tmp_path / "merged")]) == 0
    assert main(["verify", str(copied), "--against", str(tmp_path / "merged")]) == 0
    held = read_certificate(copied / "certificate.json")
    assert held.report == written != "" and held.artefacts and main(["check", str(copied)]) == 0
