"""`lorakeet check`: exit codes for a pipeline, from the report and the certificate alone."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import ServedModules, read_certificate, tolerance_check
from lorakeet.evaluate.report.report import read_report, write_report
from lorakeet.verbs.check import check
from lorakeet.verbs.options import CheckOptions
from tiny.runs import quiet


def test_met_and_not_met(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished.path)
    report = read_report(finished.path / "report.json")
    accuracy = next(one for one in report.systems if one.role == "adapter").metrics["accuracy"]
    assert main(["check", run, "--accuracy", f">={accuracy.low - 0.01}", "--require", "log_loss <=99", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["what"] for one in told["requirements"]] == ["accuracy", "log_loss", "certificate"] and told["met"]
    assert main(["check", run, "--accuracy", f">={accuracy.low + 0.01}", "--drift", "<=99 at value"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"accuracy is {accuracy}, and >= {accuracy.low + 0.01:g} at low is required" in said and "1 of 3 requirements" in said
    assert main(["check", run, "--accuracy", f">={accuracy.low + 0.01} at high"]) == 0


def test_better_than_a_system(finished: Any) -> None:
    report = read_report(finished.path / "report.json")
    verdicts = {one.right: one.verdict for one in reversed(report.comparisons)}
    for system, verdict in verdicts.items():
        options = CheckOptions(run=str(finished.path), beats=(system,))
        if verdict == "better":
            assert check(options, console=quiet()).requirements[0].met
        else:
            with pytest.raises(VerificationFailed, match=re.escape(f"against {system}")):
                check(options, console=quiet())
    assert "base" in verdicts


def test_the_majority_class_has_to_be_beaten_too_where_it_is_compared(finished: Any, tmp_path: Path) -> None:
    """`--beats base` passed for an adapter that always said "ok"."""
    run = shutil.copytree(finished.path, tmp_path / "run")
    report = read_report(run / "report.json")
    first = replace(report.comparisons[0], verdict="better")
    level = replace(first, right="majority class", verdict="no difference shown")
    note = next(one.note for one in report.systems if one.name == "majority class")
    write_report(replace(report, comparisons=(first, level)), run)
    for beats in (first.right, "majority", "majority class"):
        with pytest.raises(VerificationFailed, match=re.escape(f"against majority class ({note})")):
            check(CheckOptions(run=str(run), beats=(beats,)), console=quiet())
    write_report(replace(report, comparisons=(first, replace(level, verdict="better"))), run)
    assert len(check(CheckOptions(run=str(run), beats=("base",)), console=quiet()).requirements) == 3


def test_a_failed_certificate_fails(finished: Any, tmp_path: Path) -> None:
    run = shutil.copytree(finished.path, tmp_path / "run")
    before = read_certificate(run / "certificate.json")
    replace(before, checks=(replace(before.checks[0], passed=False), *before.checks[1:])).write(run / "certificate.json")
    with pytest.raises(VerificationFailed):
        check(CheckOptions(run=str(run)), console=quiet())
    assert check(CheckOptions(run=str(run), certificate="any", loss=None), console=quiet()).requirements == ()


@pytest.mark.parametrize(("unseen", "code"), [(None, 3), ({}, 0), ({"q_proj": "rounding"}, 3)])
def test_a_served_certificate_wants_a_server_that_is_proved(
    finished: Any, unseen: dict[str, str] | None, code: int, tmp_path: Path
) -> None:
    """`unseen`: what a wrong server might lack; None: no server was verified."""
    run, url = shutil.copytree(finished.path, tmp_path / "run"), "http://h#a"
    before = read_certificate(run / "certificate.json")
    if unseen is not None:
        limit = {"different_prompts": 0.0}
        of_server = tolerance_check(f"{url}: prompt ids", limit, tolerance=limit, between=("live", url))
        modules = ServedModules(url, ("a",), seen=("all modules",), unseen=unseen)
        replace(before, checks=(*before.checks, of_server), modules=(modules,)).write(run / "certificate.json")
    assert main(["check", str(run), "--certificate", "served"]) == code
    assert main(["check", str(run), "--certificate", "passed"]) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"require": ("acuracy >=0",)}, ConfigError, "The report has no acuracy; it has .* Did you mean 'accuracy'"),
        ({"require": ("accuracy>=0",)}, ConfigError, "expected a metric and a bound"),
        ({"accuracy": "0.7"}, ConfigError, "the requirement on accuracy is '0.7'"),
        ({"beats": ("bsae",)}, ConfigError, "does not compare the adapter with 'bsae'.*Did you mean 'base'"),
        ({"run": "."}, DataError, "is no run folder"),
    ],
)
def test_mistakes_are_one_message(finished: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check(CheckOptions(**{"run": str(finished.path), **options}), console=quiet())
