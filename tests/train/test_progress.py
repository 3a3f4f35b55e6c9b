"""What is printed where."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lorakeet.train.progress import Bar, Lines, Reporter, Words, counted, reporter_for

STEP = {"step": 3, "loss": 1.25, "tokens_per_second": 401.7, "memory_bytes": 1_600_000_000}
HELD_OUT = {"step": 3, "held_out_loss": 1.5, "low": 1.4, "high": 1.6, "n": 64}


def run(reporter: Reporter) -> None:
    reporter.begin(10, done=0)
    reporter.base_loss(64)
    for step in (1, 2, 3):
        reporter.step({**STEP, "step": step})
    reporter.held_out(HELD_OUT)
    reporter.say("a [word]")
    reporter.close()


def test_lines_are_rare_and_plain() -> None:
    out = io.StringIO()
    reporter = reporter_for(Console(file=out, width=40))
    assert isinstance(reporter, Lines)
    run(reporter)
    assert out.getvalue().splitlines() == [
        "Step 0: the base's loss on 64 held-out rows.",
        "step 1/10 · loss 1.2500 · 402 tokens/s · 1.49 GiB",
        "step 3: held-out loss 1.5000 (1.4000 to 1.6000, 64 rows)",
        "a [word]",
    ]


def test_the_bar_shows_loss_held_out_loss_speed_and_memory() -> None:
    out = io.StringIO()
    reporter = reporter_for(Console(file=out, force_terminal=True, width=120, color_system=None))
    assert isinstance(reporter, Bar)
    run(reporter)
    shown = out.getvalue()
    for part in ("step 3/10", "loss 1.2500", "402 tokens/s", "1.49 GiB", "held-out loss 1.5000", "a [word]", "64 held-out rows."):
        assert part in shown


def test_pictures_are_counted_as_pictures() -> None:
    out = io.StringIO()
    run(reporter_for(Console(file=out, width=60), words=Words("pictures", "pictures")))
    assert "64 held-out pictures." in out.getvalue()
    assert "402 pictures/s" in out.getvalue() and "1.6000, 64 pictures)" in out.getvalue() and "token" not in out.getvalue()


def test_what_takes_long_is_counted_in_lines_and_what_is_short_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 31.0, 31.0, 40.0, 62.0, 62.0])
    monkeypatch.setattr("lorakeet.train.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    out = io.StringIO()
    with counted(Console(file=out, width=60), "base [answers] 9 rows", 9) as advance:
        for _ in range(4):
            advance(2)
    assert out.getvalue().splitlines() == ["base [answers] 9 rows (4 of 9 done)", "base [answers] 9 rows (8 of 9 done)"]


def test_in_a_terminal_it_is_a_bar_that_goes() -> None:
    out = io.StringIO()
    with counted(Console(file=out, force_terminal=True, width=80, color_system=None), "base answers 9 rows", 9) as advance:
        advance(9)
    shown, _, gone = out.getvalue().rpartition("100%")
    assert "base answers 9 rows" in shown and "\x1b[2K" in gone  # the line is erased
