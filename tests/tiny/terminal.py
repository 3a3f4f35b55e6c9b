"""What a function prints in the terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def printed(show: Any, what: Any, **console: Any) -> str:
    """The text that `show(what, console)` prints at 200 columns; `console` are settings of rich's Console."""
    file = io.StringIO()
    show(what, Console(file=file, **{"width": 200, **console}))
    return file.getvalue()
