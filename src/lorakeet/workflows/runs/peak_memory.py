"""The peak memory of a process, printed beside its budget and plan by every verb that keeps a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.measure import PeakMemory
from lorakeet.workflows.runs.residency import Residency


def say_peak(memory: PeakMemory, residency: Residency[Any], console: Console, *, mapped: bool = False) -> None:
    """Prints the peak of the process, its budget and its plan; with a warning if the budget was exceeded.

    With `mapped`, pages of a file that llama.cpp has mapped are in the peak, which the budget leaves out: no warning then.
    """
    found = f"{bytes_text(memory.bytes)} in use at most{', sampled 20 times a second' if memory.sampled else ''}"
    found += ", pages of llama.cpp's file among it" * mapped
    plan = "" if residency.planned is None else f" and {bytes_text(residency.planned)} planned"
    text = f"Memory: {found}, of {residency.budget} allowed{plan}."
    if memory.bytes > residency.budget.bytes and not mapped:
        text = (
            f"WARNING: the budget was not kept. {text} The results are sound; give more next time, and please report the model "
            "and this line."
        )
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def peak_said(residency: Residency[Any], console: Console, *, mapped: bool = False) -> Iterator[None]:
    """A context at whose end `say_peak` prints its peak, if there is a budget for the memory of the process."""
    if not residency.budget or residency.gpu is not None:
        yield
        return
    with PeakMemory() as memory:
        yield
    say_peak(memory, residency, console, mapped=mapped)
