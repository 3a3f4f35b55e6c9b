"""A declaration with another name than its entry point."""

from __future__ import annotations

from dataclasses import replace

from line_kind import DECLARATION as LINE

DECLARATION = replace(LINE, name="curve")
