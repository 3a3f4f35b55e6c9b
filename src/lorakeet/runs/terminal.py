"""What is written to a terminal: texts of strangers carry no escape sequences to it, and tables cut no number."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lorakeet.errors import visible

_LONGEST = 32  # characters of a word that stays whole; longer ones, such as paths, are no numbers


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


def print_address(console: Console, address: str, port: int) -> None:
    """With --json, when `console` writes to standard error, prints where a server listens to standard output, as one line."""
    if console.stderr:
        print(json_text({"address": address, "port": port}), flush=True)


class WholeTable(Table):
    """A table whose columns are never narrower than their words. Where that is too wide, each row is a list, a line a cell."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=10_000)
        sizes = [[Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)] for column in self.columns]
        widths = [max(size.maximum for size in column) for column in sizes]
        least = [min(width, max(min(size.minimum, _LONGEST) for size in column))
                 for width, column in zip(widths, sizes, strict=True)]  # fmt: skip
        most = options.max_width - (Measurement.get(console, wide, self).maximum - sum(widths))  # beside borders and padding
        if sum(least) > most:
            yield from self._lists(console)
            return
        while sum(widths) > most:
            widest = max((index for index, width in enumerate(widths) if width > least[index]), key=widths.__getitem__)
            widths[widest] -= 1
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)
        for column in self.columns:
            column.width = None

    def _lists(self, console: Console) -> RenderResult:
        def text(cell: RenderableType) -> Text:
            return cell if isinstance(cell, Text) else console.render_str(str(cell))

        heads = [text(column.header) for column in self.columns]
        yield from (text(part) for part in (self.title,) if part)
        for row, cells in zip(self.rows, zip(*(column.cells for column in self.columns), strict=True), strict=True):
            first, *others = map(text, cells)
            yield Text.assemble(first, style=row.style or "")
            for head, cell in zip(heads[1:], others, strict=True):
                if cell:
                    yield Text.assemble("  ", head, ": " if head else "", cell, style=row.style or "")
        yield from (text(part) for part in (self.caption,) if part)
