"""Runs on text: what their report warns of, and the commands that it recommends."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli.main import main
from lorakeet.kinds.text.kind import KIND
from lorakeet.train.run import RunFolder
from tiny.runs import reviews, run, write_rows


@pytest.mark.slow
def test_rows_that_were_cut_or_left_out_are_warned_of(finished: Any, tmp_path: Path) -> None:
    records = [*reviews(30), {"text": "long " * 60, "label": "good"}]
    data = write_rows(tmp_path / "rows.jsonl", records)
    test = write_rows(tmp_path / "test.jsonl", [*reviews(5, seed=2), {"text": "far " * 60, "label": "bad"}])
    for too_long, said in (("truncate", "were shortened."), ("drop", "left out.")):
        changes = {"data.test": test, "data.too_long": too_long, "train.steps": 1, "evaluate.drift_texts": 0}
        report = run(finished.model, data, tmp_path / too_long, changes).report
        assert report is not None
        parts = {warning.split()[1]: warning for warning in report.warnings if "rows were longer" in warning}
        assert set(parts) in ({"test", "training"}, {"test", "held-out"})
        assert parts["test"] == f"1 test rows were longer than 120 tokens and {said}"


@pytest.mark.slow
def test_the_next_commands_run_as_they_are_printed(finished: Any, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished.path, copy)
    printed = [item.command.replace(str(finished.path), str(copy)) for item in finished.result.report.next_commands]
    for command in printed[:3]:  # merge, export, verify: serving does not end, and evaluating wants a file
        assert main(shlex.split(command)[1:]) == 0, command
    assert main(shlex.split(printed[-1].replace("FILE", str(finished.test)))[1:]) == 0


def test_a_path_with_a_space_is_one_word_of_the_next_commands(finished: Any) -> None:
    commands = KIND.next_commands(finished.result.setup, RunFolder(Path("my runs/a dog's")))
    words = [shlex.split(item.command) for item in commands]
    assert words[0] == ["lorakeet", "merge", "my runs/a dog's", "--out", "my runs/a dog's-merged"]
    assert words[3][-1] == "a dog's=my runs/a dog's" and words[4][2] == "my runs/a dog's"
