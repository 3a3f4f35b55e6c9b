"""A kind of run from another package, a linear regression on numbers: no line of Lorakeet changes for it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.registry import declarations
from lorakeet.studio.index import Index
from lorakeet.verbs.finetune import FinetuneResult, finetune
from lorakeet.verbs.options import FinetuneOptions
from lorakeet.verbs.plan import plan
from tiny.other_packages import PACKAGES, installed, registered
from tiny.runs import quiet, tree, write_rows


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RunConfig]:
    with registered(installed(tmp_path / "site")):
        yield read_run(None, flags(tmp_path))


def flags(folder: Path) -> dict[str, str]:
    """Of a run on forty points of z = 3x - 2y with a little noise."""
    draw = random.Random(0)
    points = [(draw.random(), draw.random(), draw.gauss(0, 0.01)) for _ in range(40)]
    data = write_rows(folder / "points.jsonl", [{"text": f"{x} {y} {3 * x - 2 * y + noise}"} for x, y, noise in points])
    found = {
        "kind": "line", "model": "none", "data.train": data, "data.held_out_fraction": 0.25, "data.near_duplicates": 1,
        "train.steps": 60, "train.batch_size": 10, "train.checkpoint_every": 20, "train.patience": 0, "out": folder / "run",
    }  # fmt: skip
    return {key: str(value) for key, value in found.items()}


def trained(config: RunConfig, **options: Any) -> FinetuneResult:
    return finetune(config, FinetuneOptions(**options), console=quiet())


def test_a_kind_of_another_package_is_trained_evaluated_certified_and_reported(config: RunConfig, tmp_path: Path) -> None:
    result = trained(config)
    assert result.setup.weights.tolist()[0] == pytest.approx([3, -2], abs=0.5)
    report = read_report(result.run.report)
    assert report == result.report and report.comparisons[0].verdict == "better" and report.rows_of == 10
    assert report.facts["Model"] == "two weights, zero at first" and report.facts["Rows"].startswith("30 training")
    assert "two weights" in result.run.page.read_text() and read_certificate(result.run.certificate).passed
    mapping = result.to_mapping()
    assert mapping["rows"] == {"train": 30, "held_out": 10, "test": 0} and mapping["steps"] == mapping["outcome"]["steps"] == 60


def test_it_is_resumed_to_the_same_bytes(config: RunConfig, tmp_path: Path) -> None:
    first, copy = trained(config).run.path, tmp_path / "copy"
    shutil.copytree(first, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000060")
    shutil.rmtree(copy / "adapter")
    again = trained(read_run(copy / "config.yaml"), resume=copy)
    assert again.outcome is not None and again.outcome.steps == 60
    assert tree(copy / "adapter") == tree(first / "adapter")


def test_a_dry_run_writes_nothing_and_a_failed_check_is_raised(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan(config, console=quiet()).peak == 32
    assert trained(config, dry_run=True).to_mapping()["dry_run"] and not (tmp_path / "run").exists()
    from line_kind.kind import LineTask

    monkeypatch.setattr(LineTask, "save", lambda self, folder: np.savetxt(folder / "line.txt", np.zeros((1, 2))))
    with pytest.raises(VerificationFailed, match="on disk"):
        trained(config)


def test_the_names_of_kinds_are_those_of_the_registry(config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line \(of line_kind\). Did you mean 'line'") as caught:
        read_run(None, {"kind": "lime", "data.train": "x", "model": "y"})
    assert caught.value.code == "kind-unknown" and caught.value.values["known"] == ["text", "image", "line"]
    with pytest.raises(ConfigError, match=r"kind is line, and no rates are tried for that"):
        trained(config, try_rates=True)
    shutil.rmtree(tmp_path / "site")
    declarations.cache_clear()
    with pytest.raises(ConfigError) as caught:
        read_run(None, {"kind": "line", "data.train": "x", "model": "y"})
    assert caught.value.code == "kind-unknown" and caught.value.values["known"] == ["text", "image"]


@pytest.mark.slow
def test_a_run_imports_the_modules_of_its_own_kind_only() -> None:
    code = (
        "import sys, lorakeet.verbs.finetune\nfrom lorakeet.config import RunConfig\n"
        "from lorakeet.kinds.protocol import run_kind\n"
        "run_kind(RunConfig())\n"
        "print([name for name in sys.modules if name == 'diffusers' or name.startswith('lorakeet.kinds.images.kind')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


VERBS = """
import json, sys
from lorakeet.cli.main import main
flags, run, rows, written = json.loads(sys.argv[1])
codes = [main([*words, "--json"]) for words in (
    ["plan", *flags],
    ["finetune", *flags, "--line.start", "0.5"],
    ["finetune", "--resume", run],
    ["evaluate", run, "--data", rows],
    ["verify", run, "--against", written],
    ["check", run, "--loss", "<=0.1"],
    ["finetune", *flags, "--seeds", "2", "--out", "other"],
    ["finetune", *flags, "--model.quantize", "nf4"],
    ["predict", run, "--data", rows, "--out", "answers.jsonl"],
)]
codes += [main(["evaluate", run, "--base", "other"]), main(["verify", run, "--against", written])]
with open(written, "a") as file:
    file.write("# changed")
codes += [main(["check", run, "--loss", "<=0.1"]), main(["evaluate", run, "--uncertified", "--out", "again"])]
codes += [main(["draw-line", "--run", run, "--json"]), main(["draw-line"])]
help_code = main(["finetune", "--help"])
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_every_verb_goes_through_it(tmp_path: Path) -> None:
    """In a process of its own, as its settings are read when Lorakeet is imported."""
    site, run = installed(tmp_path / "site"), tmp_path / "run"
    given = flags(tmp_path)
    words = [part for name, value in given.items() for part in (f"--{name}", value)]
    path = os.pathsep.join([str(site), str(PACKAGES), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", VERBS, json.dumps([words, str(run), given["data.train"], str(run / "adapter" / "line.txt")])],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    codes = json.loads(found.stdout.strip().rpartition("\n")[2])
    assert codes == [0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 0, 3, 0, 0, 2], found.stdout + found.stderr
    said = " ".join((found.stdout + found.stderr).split())
    assert "--line.start" in said and "text (a causal language model), image (a diffusion model) or line (a line through" in said
    assert '"weights": [' in found.stdout and "No run is given; name one with --run." in said, "its own verb"
    assert "A line has one solution" in said and "a line has no layers to quantise" in said
    assert "is a run of kind line" in said and "file line.txt has changed" in said
    assert "line" in (run / "config.yaml").read_text() and "Fitting a line" in (run / "report.html").read_text()
    shown = Index(tmp_path, tmp_path / "cache.sqlite").summaries()
    assert [one.name for one in shown if one.passed] == ["run"], "the studio's list"
    assert "to which --base means nothing" in said and "uncertified" in (tmp_path / "again" / "report.json").read_text()
    certificate = read_certificate(run / "certificate.json")
    assert len({check.name for check in certificate.checks}) == len(certificate.checks) == 2, "those of one name are kept once"
    assert certificate.passed and str(run / "adapter" / "line.txt") in certificate.artefacts
