"""A command line in a folder with good rows, and the check that it is refused as bad input is: one message, nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli.main import main
from tiny.runs import QUICK, tree, write_rows


@dataclass
class Bench:
    """A folder with good rows and the tiny model, and a command line that is refused in it."""

    folder: Path
    model: Path
    capsys: pytest.CaptureFixture[str]

    def finetune(self, *flags: object, data: object = "rows.jsonl", model: object = None) -> list[str]:
        quick = [word for key, value in QUICK.items() for word in (f"--{key}", value)]
        return ["finetune", "--model", str(model or self.model), "--data", str(data), "--out", "run", *quick, *map(str, flags)]

    def refused(self, command: list[str], *words: str) -> str:
        """The message, after checking that it has every one of `words` and that no file was written, changed or lost."""
        before, folders = tree(self.folder), sorted(self.folder.rglob("*"))
        self.capsys.readouterr()  # what building the files printed
        code = main(command)
        output = self.capsys.readouterr()
        assert code == 2, output.err
        assert output.err.startswith("Error: ") and output.err.count("Error: ") == 1
        assert "Traceback" not in output.err
        said = " ".join(output.err.split())
        missing = [word for word in words if word not in said]
        assert not missing, f"{missing} not in: {said}"
        assert tree(self.folder) == before and sorted(self.folder.rglob("*")) == folders
        return said

    def write(self, name: str, content: str | bytes | Sequence[Any]) -> str:
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            write_rows(path, content)
        return name
