"""What a command prints with --json, for tests of what reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lorakeet.errors import LorakeetError, Remedy


def failed(message: str, code: str = "", remedies: Sequence[Remedy] = ()) -> str:
    """The line of a command that fails with this error."""
    return json.dumps({"error": LorakeetError(message, code=code, remedies=remedies).to_mapping()}) + "\n"
