"""`workflows.push_export`: a folder goes to the server that was named, and one that was written before is known again."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.workflows import push_export as workflow
from lorakeet.workflows.export import export
from lorakeet.workflows.options import ExportOptions
from tiny.runs import quiet


def test_push_goes_to_the_server_that_was_named(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        export(
            ExportOptions(str(finished.path), out=tmp_path / "o", to="ollama", push=True, host="http://127.0.0.1:9"),
            console=quiet(),
        )
    assert (tmp_path / "o" / "Modelfile").is_file()


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
