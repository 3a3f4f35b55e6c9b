"""Runs one stage: `python -m first_hour.stage MODULE FOUND.json FOLDER ENDS [toy]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from first_hour.findings import Findings, failure


def main(arguments: Sequence[str]) -> None:
    module, path, folder, ends, *toy = arguments
    found = Findings(Path(path), Path(folder), toy=bool(toy), ends=float(ends))
    try:
        found.path.with_suffix(".card").write_text(found.card(), encoding="utf-8")
        importlib.import_module(f"first_hour.{module}").run(found)
    except Exception as error:
        found.add("failed", failure(error))
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
