"""What was held is said beside its budget, and warned of where it was more."""

from __future__ import annotations

import io

from rich.console import Console

from lorakeet.memory.measure import PeakMemory
from lorakeet.workflows.runs.peak_memory import held_at_most, say_peak


def test_the_peak_is_said_and_a_budget_that_was_not_kept_is_warned_of() -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    memory = PeakMemory()
    memory.bytes = 1_100_000_000
    say_peak(memory, 2_000_000_000, 1_200_000_000, console)
    assert "Memory: 1.10 GB held at most, of 2.00 GB allowed and 1.20 GB planned." in console.export_text()
    memory.sampled = True
    say_peak(memory, 1_000_000_000, 900_000_000, console)
    said = console.export_text()
    assert said.startswith("WARNING: the budget was not kept.") and "looked at 20 times a second" in said
    say_peak(memory, 1_000_000_000, None, console, mapped=True)
    said = console.export_text()
    assert said.startswith("Memory: 1.10 GB held at most") and "pages of llama.cpp's file among it, of 1.00 GB allowed." in said


def test_what_is_held_within_a_context_is_said_where_there_is_a_budget() -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    with held_at_most(None, None, console):
        pass
    assert console.export_text() == ""
    with held_at_most(1 << 50, 1 << 40, console):
        pass
    said = console.export_text()
    assert said.startswith("Memory: ") and " held at most" in said and " allowed and " in said
