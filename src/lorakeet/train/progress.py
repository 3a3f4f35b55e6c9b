"""Progress of a run: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lorakeet.evaluate.wording import bytes_text

Record = Mapping[str, float | int | None]
OnRecord = Callable[[Record], object]


@dataclass(frozen=True)
class Words:
    """Plural nouns for what a run computes, and for the units of its held-out loss."""

    computed: str = "tokens"
    evaluated: str = "rows"


TEXT = Words()


class Reporter:
    """Receives the events of a run; this one prints nothing, those below print."""

    def begin(self, total: int, *, done: int) -> None: ...

    def step(self, record: Record) -> None: ...

    def base_loss(self, count: int) -> None: ...

    def held_out(self, record: Record) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Spoken(Reporter):
    """Says on a console, in plain lines, what takes long and what is unusual."""

    def __init__(self, console: Console, words: Words = TEXT) -> None:
        self.console, self.words = console, words

    def base_loss(self, count: int) -> None:
        self.say(f"Step 0: the base's loss on {count} held-out {self.words.evaluated}.")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bar(Spoken):
    """One line at the bottom of a terminal: loss, held-out loss, what is computed per second, memory, time left."""

    def __init__(self, console: Console, words: Words = TEXT) -> None:
        super().__init__(console, words)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._held_out = ""

    def begin(self, total: int, *, done: int) -> None:
        self._task = self._bar.add_task("train", total=total, completed=done, numbers="")
        self._bar.start()

    def step(self, record: Record) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=int(record["step"] or 0), numbers=numbers(record, self.words) + self._held_out)

    def held_out(self, record: Record) -> None:
        self._held_out = f" · held-out {_loss(record['held_out_loss'])}"
        self.console.print(held_out_line(record, self.words), highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Lines(Spoken):
    """At most one plain line every `every` seconds, and one for each held-out evaluation."""

    def __init__(self, console: Console, words: Words = TEXT, *, every: float = 30.0) -> None:
        super().__init__(console, words)
        self.every = every
        self._total = 0
        self._last = -every

    def begin(self, total: int, *, done: int) -> None:
        self._total = total

    def step(self, record: Record) -> None:
        now = time.monotonic()
        if now - self._last >= self.every or record["step"] == self._total:
            self._last = now
            self.say(f"step {record['step']}/{self._total} · {numbers(record, self.words)}")

    def held_out(self, record: Record) -> None:
        self.say(held_out_line(record, self.words))


class Calling(Reporter):
    """Passes each event on to another reporter, then calls a function with a copy of the record of a step or an evaluation."""

    def __init__(self, other: Reporter, on_step: OnRecord | None, on_held_out: OnRecord | None) -> None:
        self.other, self.on_step, self.on_held_out = other, on_step, on_held_out

    def begin(self, total: int, *, done: int) -> None:
        self.other.begin(total, done=done)

    def step(self, record: Record) -> None:
        self.other.step(record)
        if self.on_step is not None:
            self.on_step(dict(record))

    def base_loss(self, count: int) -> None:
        self.other.base_loss(count)

    def held_out(self, record: Record) -> None:
        self.other.held_out(record)
        if self.on_held_out is not None:
            self.on_held_out(dict(record))

    def say(self, text: str) -> None:
        self.other.say(text)

    def close(self) -> None:
        self.other.close()


def with_calls(reporter: Reporter, on_step: OnRecord | None, on_held_out: OnRecord | None) -> Reporter:
    """The reporter, which also calls these functions, where there are any."""
    return reporter if on_step is None and on_held_out is None else Calling(reporter, on_step, on_held_out)


def reporter_for(console: Console, *, words: Words = TEXT) -> Reporter:
    """A bar in a terminal, lines elsewhere."""
    return Bar(console, words) if console.is_terminal else Lines(console, words)


# A context for work of so many rows, which yields a function to report how many more are done.
Count = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def uncounted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A `Count` that reports nothing."""
    yield lambda _: None


@contextmanager
def counted(console: Console, what: str, total: int, *, every: float = 30.0) -> Iterator[Callable[[int], None]]:
    """A context that yields a function to report how many more of `total` are done.

    A transient bar in a terminal; elsewhere at most one line every `every` seconds, "what (40 of 120 done)"."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            yield partial(bar.advance, bar.add_task(what, total=total))
        return
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= every:
            last = time.monotonic()
            console.print(f"{what} ({done} of {total} done)", highlight=False, markup=False, soft_wrap=True)

    yield advance


def numbers(record: Record, words: Words = TEXT) -> str:
    """ "loss 1.234 · 402 tokens/s · 1.50 GiB" of one training record; rates below 10 with a decimal."""
    speed, memory = record["tokens_per_second"] or 0, record["memory_bytes"] or 0
    rate = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
    return f"loss {_loss(record['loss'])} · {rate} {words.computed}/s · {bytes_text(int(memory))}"


def held_out_line(record: Record, words: Words = TEXT) -> str:
    """ "step 40: held-out loss 1.234 (1.201 to 1.270, 64 rows)"; too few rows have no interval."""
    loss, low, high = (_loss(record[key]) for key in ("held_out_loss", "low", "high"))
    span = "" if record["low"] is None else f"{low} to {high}, "
    return f"step {record['step']}: held-out loss {loss} ({span}{record['n']} {words.evaluated})"


def _loss(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.4f}"
