"""What is written to a terminal: texts of strangers carry no escape sequences to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from lorakeet.errors import visible


class TerminalConsole(Console):
    """rich's Console, which writes control characters within texts as escapes, such as \\x1b.

    Its own sequences, for colours and for what is drawn anew, stay: rich keeps them apart from texts.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """As of rich; cells of tables are measured with their escapes."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that a terminal shows and changes nothing by: what JSON itself does not escape is escaped too."""
    return visible(json.dumps(value, ensure_ascii=False, indent=indent), "\\u{:04x}")
