"""What was held is said beside its budget, and warned of where it was more."""

from __future__ import annotations

import io

from rich.console import Console

from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.memory.measure import PeakMemory
from lorakeet.runs.residency import MemoryPlan, Residency, peak_said, say_peak


def within(budget: str | None, planned: int = 0) -> Residency[MemoryPlan]:
    plan = MemoryPlan(Forecast((Phase("train step", {"base": planned}),))) if planned else None
    return Residency(Budget.parse(budget), plan=plan)


def test_the_peak_is_said_and_a_budget_that_was_not_kept_is_warned_of() -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    memory = PeakMemory()
    memory.bytes = 1100 << 20
    say_peak(memory, within("2GB", 1200 << 20), console)
    assert "Memory: 1.07 GiB in use at most, of 2GB allowed and 1.17 GiB planned." in console.export_text()
    memory.sampled = True
    say_peak(memory, within("1GB", 900 << 20), console)
    said = console.export_text()
    assert said.startswith("WARNING: the budget was not kept.") and "sampled 20 times a second" in said
    say_peak(memory, within("1GB"), console, mapped=True)
    said = console.export_text()
    assert said.startswith("Memory: 1.07 GiB in use at most") and "pages of llama.cpp's file among it, of 1GB allowed." in said


def test_the_peak_of_a_context_is_said_under_a_budget() -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    with peak_said(within(None), console):
        pass
    assert console.export_text() == ""
    with peak_said(within("1024TiB", 1 << 40), console):
        pass
    said = console.export_text()
    assert said.startswith("Memory: ") and " in use at most" in said and " allowed and " in said
