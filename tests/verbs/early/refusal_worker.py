"""`lorakeet` with the words of each order, in a process of its own without torch, which then says on stderr how it ended."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from lorakeet.cli.main import main
from tiny.forked import serve


def work(order: dict[str, Any]) -> int:
    """Says after the program's own words its exit code, and whether torch and transformers were imported."""
    os.chdir(order["folder"])
    code = main(order["words"])
    print(code, "torch" in sys.modules, "transformers" in sys.modules, file=sys.stderr)
    return code


if __name__ == "__main__":
    assert "torch" not in sys.modules
    serve(work)
