"""How results show themselves: as text when printed, as a page or a table in a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Console

from lorakeet.core.plan import Plan
from lorakeet.errors import shortened
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.report import Report, render_html
from lorakeet.evaluate.wording import bytes_text
from lorakeet.kinds.protocol import PlanResult
from lorakeet.verbs.merges.into_model import Merged

_LONGEST = 290  # characters
HEAD = ("weights", "shape", "rank", "scale", "trained parameters")


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return one_line(f"Plan: peak {bytes_text(self.peak)}, {self.result.planned.plan.summary()}")

    def _repr_html_(self) -> str:
        forecast, later = self.result.planned.forecast, self.result.later_commands
        kinds = list(dict.fromkeys(kind for phase in forecast.phases for kind, size in phase.kinds.items() if size))
        unit, word, digits = (2**30, "GiB", 2) if self.peak >= 2**30 else (2**20, "MiB", 0)

        def shown(size: int) -> str:
            return f"{size / unit:.{digits}f}" if size * 200 >= unit else ""

        head = (f"phase, in {word} at its peak", *kinds, "together")
        sizes = [[phase.kinds.get(kind, 0) for kind in kinds] + [phase.bytes] for phase in forecast.phases]
        names = [f"{phase.name} (a command of its own)" if phase.name in later else phase.name for phase in forecast.phases]
        body = [(name, *map(shown, row)) for name, row in zip(names, sizes, strict=True)]
        budget = f" of a budget of {shown(self.result.budget.bytes)}" if self.result.budget else ""
        said = f"Peak of the run: <b>{shown(self.peak)} {word}</b>{budget}; {html.escape(self.result.planned.plan.summary())}."
        whole = f"<details><summary>Time, targets and remarks</summary><pre>{html.escape(str(self))}</pre></details>"
        return f"<p>{said}</p>{table_of([head, *body])}{whole}"


class ShownPairs(Plan):
    """What is trained, as a table of paths, shapes and ranks."""

    @classmethod
    def of(cls, plan: Plan) -> ShownPairs:
        """The same plan with this table."""
        return cls(**{field.name: getattr(plan, field.name) for field in fields(Plan)})

    def __str__(self) -> str:
        rows = [HEAD, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([*lines, self.summary()])

    def __repr__(self) -> str:
        return one_line(self.summary())

    def _repr_html_(self) -> str:
        return f"{table_of([HEAD, *self.rows()])}<p>{html.escape(self.summary())}</p>"


class ShownCertificate(Certificate):
    """What was compared, as a table of measures, limits and verdicts."""

    @classmethod
    def of(cls, certificate: Certificate) -> ShownCertificate:
        """The same certificate with this table."""
        return cls(**{field.name: getattr(certificate, field.name) for field in fields(Certificate)})

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}: {self.verdict}", *map(str, (*self.checks, *self.modules, *self.unchecked))])

    def __repr__(self) -> str:
        return one_line(f"{self.subject}: {self.verdict}, {len(self.checks)} checks")

    def _repr_html_(self) -> str:
        rows: list[tuple[Any, ...]] = [("", "compared", "with", "measure", "found", "limit", "n")]
        for check in self.checks:
            for key, value in check.measured.items():
                bound = f"{'≥' if key in check.floors else '≤'} {check.tolerance[key]:.3g}"
                names = (check.name, check.right, key.replace("_", " "))
                rows.append(("✓" if check.passed else "✗", *names, f"{value:.3g}", bound, check.n))
        left = "".join(f"<li>{html.escape(str(one))}</li>" for one in (*self.modules, *self.unchecked))
        said = f"<p>{html.escape(self.subject)}: <b>{html.escape(self.verdict)}</b></p>"
        return f"{said}{table_of(rows)}{f'<ul>{left}</ul>' if left else ''}"


class ShownMerge(Merged):
    """What was merged, as a sentence and the table of its certificate."""

    @classmethod
    def of(cls, merged: Merged) -> ShownMerge:
        """The same result with this table."""
        values = {one.name: getattr(merged, one.name) for one in fields(Merged)}
        return cls(**{**values, "certificate": ShownCertificate.of(merged.certificate)})

    def __str__(self) -> str:
        return f"Merged at {self.out}: {self.certificate.verdict}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>{ShownCertificate.of(self.certificate)._repr_html_()}"


def one_line(text: str) -> str:
    """The text of a value where a list or a debugger shows it: one line of less than 300 characters."""
    return shortened(" ".join(text.split()), _LONGEST)


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
