"""The end of a run: Ctrl-C while judging says what is whole; report and certificate are kept even where a check failed."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorakeet.errors import RunStopped, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate, tolerance_check
from lorakeet.evaluate.report.report import read_report
from lorakeet.train.run import RunFolder
from lorakeet.workflows.finetuning.finish import conclude, judging


@pytest.mark.parametrize(("stop", "named"), [(KeyboardInterrupt(), "Ctrl-C"), (KeyboardInterrupt("SIGTERM"), "SIGTERM")])
def test_ctrl_c_while_judging_says_what_is_whole(tmp_path: Path, stop: KeyboardInterrupt, named: str) -> None:
    run = RunFolder(tmp_path / "run")
    words = rf"^{named}: .*adapter is whole, but it was not judged to the end"
    with pytest.raises(RunStopped, match=words) as caught, judging(run):
        raise stop
    assert run.resume_command in str(caught.value)


def test_a_failed_check_is_raised_after_everything_is_written_and_shown(finished: Any, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    bad = tolerance_check("base untouched", {"logit": 2.0}, tolerance={"logit": 1.0}, between=("a", "b"), n=3)
    certificate = Certificate("x", (bad,))
    report = dataclasses.replace(finished.result.report, certificate=certificate)
    console = Console(record=True, width=200, file=io.StringIO())
    with pytest.raises(VerificationFailed, match="base untouched"):
        conclude(report, certificate, run, console, remarks=["something between"])
    assert read_certificate(run.certificate) == certificate and read_report(run.path / "report.json") == report
    said = console.export_text()
    assert said.index("something between") < said.index("FAIL  base untouched") < said.index(f"Report: {run.page}")
    assert "Next: " not in said


def test_what_may_follow_is_said_last(finished: Any, tmp_path: Path) -> None:
    run, report = RunFolder.create(tmp_path / "run"), finished.result.report
    console = Console(record=True, width=200, file=io.StringIO())
    conclude(report, report.certificate, run, console)
    last = console.export_text().splitlines()[-len(report.next_commands) :]
    assert [line.removeprefix("Next: ").partition("   (")[0] for line in last] == [item.command for item in report.next_commands]
