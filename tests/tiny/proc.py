"""Files below /proc as another system would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def proc_file(patch: pytest.MonkeyPatch, path: str, text: str | None) -> None:
    """Reads of `path` return `text`, or fail as on a system without it."""
    real = Path.read_text

    def read(self: Path, *given: Any, **more: Any) -> str:
        if self != Path(path):
            return real(self, *given, **more)
        if text is None:
            raise FileNotFoundError(path)
        return text

    patch.setattr(Path, "read_text", read)
