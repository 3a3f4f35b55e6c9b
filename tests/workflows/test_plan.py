"""`lorakeet plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from lorakeet.cli.main import lorakeet


def test_the_verb_needs_neither_rows_nor_weights(config_folder: Path) -> None:
    command = ["plan", "--model", str(config_folder), "--quantize", "nf4", "--rank", "4", "--tokens", "32", "--json"]
    done = CliRunner().invoke(lorakeet, command, standalone_mode=False)
    assert done.exception is None, done.exception
    found = json.loads(done.stdout)
    assert found["peak"] > 0 and found["micro_batch"] == {"rows": 1, "tokens": 32}
    assert found["speed"]["flops"] > 0 and found["trained_parameters"] > 0
    assert sorted(path.name for path in config_folder.iterdir()) == ["config.json"]
