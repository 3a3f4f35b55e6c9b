"""What a process held at most, said beside its budget and its plan, by every verb that keeps a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.measure import PeakMemory


def say_peak(memory: PeakMemory, budget: int, planned: int | None, console: Console, *, mapped: bool = False) -> None:
    """What the process held at most, beside its plan and budget; a warning where that is more than the budget.

    With `mapped`, pages of a file that llama.cpp has mapped are among it, which the budget leaves out: then nothing is warned of.
    """
    found = f"{bytes_text(memory.bytes)} held at most{', looked at 20 times a second' if memory.sampled else ''}"
    found += ", pages of llama.cpp's file among it" * mapped
    plan = "" if planned is None else f" and {bytes_text(planned)} planned"
    text = f"Memory: {found}, of {bytes_text(budget)} allowed{plan}."
    if memory.bytes > budget and not mapped:
        text = (
            f"WARNING: the budget was not kept. {text} What was done is sound; give more next time, and please report the model "
            "and this line."
        )
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def held_at_most(budget: int | None, planned: int | None, console: Console, *, mapped: bool = False) -> Iterator[None]:
    """A context at whose end `say_peak` says what was held in it, where there is a budget."""
    if budget is None:
        yield
        return
    with PeakMemory() as memory:
        yield
    say_peak(memory, budget, planned, console, mapped=mapped)
