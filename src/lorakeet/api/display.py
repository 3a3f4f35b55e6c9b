"""How results show themselves: as text when printed, as a page or a table in a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lorakeet.evaluate.report.report import Report, render_html
from lorakeet.workflows.finetuning.kind import PlanResult


@dataclass(frozen=True)
class ShownPlan:
    """A forecast of memory and time. `result` holds the numbers; `peak` and `fits` are the first that one reads."""

    result: PlanResult
    console: Console

    @property
    def peak(self) -> int:
        """The most bytes of the run."""
        return self.result.peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the budget; None without one."""
        return self.peak <= self.result.budget.bytes if self.result.budget else None

    def __str__(self) -> str:
        return self.console.export_text(clear=False, styles=False).rstrip()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def page_of(report: Report, *, height: int = 900) -> str:
    """The report's page in a frame of its own, so that a notebook's styles and its own do not mix."""
    page = html.escape(render_html(report), quote=True)
    return f'<iframe srcdoc="{page}" width="100%" height="{height}" frameborder="0"></iframe>'


def table_of(rows: list[tuple[Any, ...]]) -> str:
    """A small table; the first row is its head."""
    head, *body = ([html.escape(str(cell)) for cell in row] for row in rows)
    lines = ["<table><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr>"]
    for row in body:
        lines += ["<tr>", *(f"<td>{cell}</td>" for cell in row), "</tr>"]
    return "".join([*lines, "</table>"])
