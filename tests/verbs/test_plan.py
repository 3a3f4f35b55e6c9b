"""`lorakeet plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorakeet.cli.main import lorakeet
from tiny.runs import write_rows


def test_the_verb_needs_neither_rows_nor_weights(config_folder: Path) -> None:
    command = ["plan", "--model", str(config_folder), "--quantize", "nf4", "--rank", "4", "--tokens", "32", "--json"]
    done = CliRunner().invoke(lorakeet, command, standalone_mode=False)
    assert done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert found["peak"] > 0 and found["micro_batch"] == {"rows": 1, "tokens": 32}
    assert found["speed"]["flops"] > 0 and found["trained_parameters"] > 0
    assert done.return_value == 0 and found["refused"] == []
    assert sorted(path.name for path in config_folder.iterdir()) == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--memory.budget", "64MB"], "it needs at least"),
        (["--ranks", "prune", "--ranks.budget", "2k", "--memory.budget", "64MB"], "The memory budget is 64MB"),
    ],
)
def test_a_plan_that_a_run_would_refuse_ends_with_2(config_folder: Path, words: list[str], why: str) -> None:
    command = ["plan", "--model", str(config_folder), "--rank", "4", "--tokens", "32", *words]
    done = CliRunner().invoke(lorakeet, [*command, "--json"], standalone_mode=False)
    assert done.exception is None and done.return_value == 2
    refused = json.loads(done.stdout)["refused"]
    assert any(one.startswith(why) for one in refused)
    shown = CliRunner().invoke(lorakeet, command, standalone_mode=False)
    assert shown.return_value == 2 and shown.stdout.count("finetune refuses: ") == len(refused)


def test_rows_that_a_run_would_refuse_end_with_2(tiny_llama_folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "alder", "completion": " birch"}])
    command = ["plan", "--model", str(tiny_llama_folder), "--data", str(tmp_path / "rows.jsonl"), "--rank", "4", "--json"]
    done = CliRunner().invoke(lorakeet, command, standalone_mode=False)
    assert done.exception is None and done.return_value == 2 and len(json.loads(done.stdout)["refused"]) == 1
