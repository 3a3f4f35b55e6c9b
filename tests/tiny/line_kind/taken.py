"""A declaration whose sections have names that are taken."""

from __future__ import annotations

from dataclasses import replace

from line_kind import DECLARATION as LINE
from line_kind import LineSpec
from lorakeet.registry import Section

DECLARATION = replace(LINE, sections={"train": Section(LineSpec, "x"), "no name": Section(LineSpec, "x")})
