"""`lorakeet plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorakeet.cli.main import lorakeet
from lorakeet.workflows.finetuning import plan_text

SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config.json and nothing else; the order to the C library would outlast the test."""
    monkeypatch.setattr(plan_text, "return_freed_memory", lambda: True)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def test_the_verb_needs_neither_rows_nor_weights(folder: Path) -> None:
    command = ["plan", "--model", str(folder), "--quantize", "nf4", "--rank", "4", "--tokens", "32", "--json"]
    done = CliRunner().invoke(lorakeet, command, standalone_mode=False)
    assert done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert found["peak"] > 0 and found["micro_batch"] == {"rows": 1, "tokens": 32}
    assert found["speed"]["flops"] > 0 and found["trained_parameters"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]
