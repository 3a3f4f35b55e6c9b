"""`verbs.export`: a file or a folder that llama.cpp confirms, with its card and its certificate; nothing half done."""

from __future__ import annotations

import dataclasses
import errno
import html
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, EnvironmentProblem, PackageMissing, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.exporting.gguf_model import DIGEST, NAME
from lorakeet.exporting.runtime_support import require_separable
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs import export as workflow
from lorakeet.verbs.export import export
from lorakeet.verbs.options import ExportOptions, VerifyOptions
from lorakeet.verbs.verify import verify
from tiny.exports import write_model
from tiny.runs import quiet


@pytest.fixture(scope="module")
def finished(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the finished run, since checks are added to its certificate."""
    return dataclasses.replace(finished, path=Path(shutil.copytree(finished.path, tmp_path_factory.mktemp("export") / "run")))


def test_a_gguf_file_with_model_card_and_certificate(finished: Any, tmp_path: Path) -> None:
    out = tmp_path / "reviews.gguf"
    found = export(ExportOptions(str(finished.path), out=out, quant="f16"), console=quiet())
    assert found.to_mapping()["passed"] is True and found.model.types["F16"] == 15
    assert read_certificate(tmp_path / "reviews.certificate.json") == found.certificate
    card = (tmp_path / "reviews.README.md").read_text()
    verdict = finished.result.report.verdict
    assert verdict.sentence in html.unescape(card) and "All checks passed." in card
    assert finished.model.name in card and str(finished.model) not in card  # the paths of a machine stay there
    assert len(GgufFile(out).value(DIGEST)) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "reviews.README.md", "reviews.certificate.json", "reviews.gguf",
    ]  # fmt: skip


def test_a_budget_too_small_for_the_check_is_refused_before_anything_is_written(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="but the check of an export takes at least"):
        export(ExportOptions(str(finished.path), out=tmp_path / "model.gguf", memory="50MiB"), console=quiet())
    assert not list(tmp_path.iterdir())


def test_types_of_llama_cpp_go_through_its_quantiser(finished: Any, tmp_path: Path) -> None:
    found = export(ExportOptions(str(finished.path), out=tmp_path / "small.gguf", quant="q4_0"), console=quiet())
    assert found.model.types["Q4_0"] > 10 and found.certificate is not None and found.certificate.passed
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True])
def test_a_folder_for_ollama(finished: Any, tmp_path: Path, separate: bool) -> None:
    said = io.StringIO()
    out = tmp_path / "ollama"
    options = ExportOptions(str(finished.path), out=out, to="ollama", quant="f32", separate=separate)
    found = export(options, console=Console(file=said))
    assert ("Ollama from 0.34.1 refuses a Modelfile with ADAPTER" in said.getvalue()) is separate
    assert ("leave out --separate: the adapter is then merged" in said.getvalue()) is separate
    assert found.certificate is not None and found.certificate.passed
    names = {"Modelfile", "README.md", "certificate.json", "model.gguf"} | ({"adapter.gguf"} if separate else set())
    assert {path.name for path in out.iterdir()} == names
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\n") and ("ADAPTER ./adapter.gguf\n" in modelfile) is separate
    assert "<|im_start|>{{ .Role }}" in modelfile and not list(out.glob("*.safetensors"))
    assert verify(VerifyOptions(str(finished.path), against=(str(out),), rows=2), console=quiet()).exit_code == 0


def test_a_wrong_address_is_found_before_anything_is_written(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host is 'localhost:11434'"):
        export(
            ExportOptions(str(finished.path), out=tmp_path / "o", to="ollama", push=True, host="localhost:11434"), console=quiet()
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_called_phi3_and_is_none_is_read_as_what_it_is(finished: Any, tmp_path: Path) -> None:
    found = export(ExportOptions(str(finished.path), out=tmp_path / "a.gguf", name="my-phi-3-compare"), console=quiet())
    assert found.certificate is not None and found.certificate.passed
    assert GgufFile(tmp_path / "a.gguf").value(NAME) == "my-phi_3-compare"
    card = (tmp_path / "a.README.md").read_text()
    assert "# my-phi-3-compare" in card and "The file's general.name is 'my-phi_3-compare'" in card


@pytest.mark.parametrize("what", ["certificate", "card"])
def test_a_disk_that_is_full_after_the_model_is_said_in_words(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "card":
        monkeypatch.setattr(workflow, "save_text", full)
    else:
        monkeypatch.setattr(workflow.Certificate, "write", full)
    with pytest.raises(EnvironmentProblem, match=r"export .*a\.gguf could not be written: the disk .*is full"):
        export(ExportOptions(str(finished.path), out=tmp_path / "a.gguf"), console=quiet())
    assert not (tmp_path / "a.gguf").exists(), "no file stands there without its certificate"


def test_what_cannot_be_is_refused_before_anything_is_written(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    wrong: tuple[dict[str, Any], ...] = (
        {"out": tmp_path / "there"},
        {"out": tmp_path / "a.gguf", "separate": True},
        {"out": tmp_path / "a.gguf", "push": True},
    )
    for settings, words in zip(wrong, ("never overwritten", "is for --to ollama", "needs --to ollama"), strict=True):
        with pytest.raises(ConfigError, match=words):
            export(ExportOptions(str(finished.path), **settings), console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_adapter_that_gguf_cannot_hold_is_not_kept_separate(finished: Any, tmp_path: Path) -> None:
    opened = open_adapter(finished.path)
    pairs = {path: replace(pair, magnitude=torch.ones(pair.B.shape[0])) for path, pair in opened.adapter.pairs.items()}
    dora = replace(opened, adapter=replace(opened.adapter, pairs=pairs))
    with pytest.raises(ConfigError, match=r"--separate: .*DoRA \(.*Leave out --separate: the merged model holds all of it"):
        require_separable(dora.adapter)


def test_without_llama_cpp_it_is_said_that_nothing_was_checked(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "is_installed", lambda: False)
    assert main(["export", str(finished.path), "--out", str(tmp_path / "a.gguf")]) == 0
    said = capsys.readouterr().out
    assert "Not checked: llama.cpp is not installed" in said
    assert f"then: lorakeet verify {finished.path} --against {tmp_path / 'a.gguf'}\n" in said
    with pytest.raises(PackageMissing, match=r"needs llama\.cpp.s quantiser"):
        export(ExportOptions(str(finished.path), out=tmp_path / "b.gguf", quant="q4_k_m"), console=quiet())


def test_a_wrong_file_is_found_at_once(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(source: Path, adapter: Any, out: Path, **more: Any) -> Any:
        write_model(source, None, out)
        return workflow.GgufModel(out, out.stat().st_size, {}, ())

    monkeypatch.setattr(workflow, "write_gguf", forgets)
    with pytest.raises(VerificationFailed, match="the adapter is not in it at all"):
        export(ExportOptions(str(finished.path), out=tmp_path / "a.gguf"), console=quiet())
    assert not read_certificate(tmp_path / "a.certificate.json").passed
    assert "do not use it" in (tmp_path / "a.README.md").read_text()


def test_a_file_that_llama_cpp_refuses_gets_a_certificate_and_a_model_card_that_say_so(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = workflow.write_gguf

    def unknown(source: Path, adapter: Any, out: Path, **more: Any) -> Any:
        found = real(source, adapter, out, **more)
        key = b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little")
        data = out.read_bytes()
        assert key + b"llama" in data
        out.write_bytes(data.replace(key + b"llama", key + b"lemma"))
        return found

    monkeypatch.setattr(workflow, "write_gguf", unknown)
    assert main(["export", str(finished.path), "--out", str(tmp_path / "a.gguf")]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "llama.cpp cannot load" in said and "unknown model architecture" in said and said.endswith("Do not use it.")
    certificate = read_certificate(tmp_path / "a.certificate.json")
    assert [check.name for check in certificate.checks] == ["a.gguf: loads in llama.cpp"] and not certificate.passed
    assert "do not use it" in (tmp_path / "a.README.md").read_text() and (tmp_path / "a.gguf").is_file()


def test_push_goes_to_the_server_that_was_named(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        export(
            ExportOptions(str(finished.path), out=tmp_path / "o", to="ollama", push=True, host="http://127.0.0.1:9"),
            console=quiet(),
        )
    assert (tmp_path / "o" / "Modelfile").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True])
def test_a_push_that_failed_is_made_up_for_by_the_same_command(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate: bool
) -> None:
    out, said, pushed = tmp_path / "o", io.StringIO(), []
    console = Console(file=said, force_terminal=True, width=300)
    words: dict[str, Any] = {"out": out, "to": "ollama", "push": True, "separate": separate}
    with pytest.raises(EnvironmentProblem, match=r"The same command sends it again.*cd \S*/o && ollama create run -f Modelfile"):
        export(ExportOptions(str(finished.path), host="http://127.0.0.1:9", **words), console=console)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}

    def push(folder: Path, model: Any, name: str, *, on_progress: Any, **more: Any) -> None:
        pushed.append((folder, name, model.adapter))
        on_progress("model.gguf", 50, 100)

    monkeypatch.setattr(workflow, "push", push)
    found = export(ExportOptions(str(finished.path), **words), console=console)
    assert pushed == [(out, "run", "adapter.gguf" if separate else "")] and "sending model.gguf" in said.getvalue()
    assert found.certificate is not None and found.certificate.passed and found.model.types["F16"] == 15
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.slow
def test_only_a_checked_export_of_the_same_adapter_and_settings_is_pushed_again(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "push", lambda *given, **more: pytest.fail("it was pushed"))
    words: dict[str, Any] = {"out": tmp_path / "o", "to": "ollama"}
    export(ExportOptions(str(finished.path), **words), console=quiet())
    for other in ({"quant": "f32"}, {"separate": True}):
        with pytest.raises(ConfigError, match=r"never overwritten; --push sends a folder again only where .*quantisation: f"):
            export(ExportOptions(str(finished.path), push=True, **words, **other), console=quiet())
    certificate = tmp_path / "o" / "certificate.json"
    held = read_certificate(certificate)
    dataclasses.replace(held, checks=(dataclasses.replace(held.checks[0], passed=False),)).write(certificate)
    with pytest.raises(VerificationFailed):
        export(ExportOptions(str(finished.path), push=True, **words), console=quiet())
    certificate.unlink()
    with pytest.raises(ConfigError, match="holds a checked export"):
        export(ExportOptions(str(finished.path), push=True, **words), console=quiet())
