"""The headline of a report, from the paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.wording import metric_words, signed

Tone = Literal["better", "mixed", "none", "worse"]
PRIMARY = ("accuracy", "loss", "denoising_loss")  # metrics for the headline: the first one that was compared


@dataclass(frozen=True)
class Phrase:
    """A part of the headline, and its interval."""

    text: str
    interval: str


@dataclass(frozen=True)
class Verdict:
    """The headline in phrases, and its tone: `mixed` if the comparisons disagree."""

    phrases: tuple[Phrase, ...]
    tone: Tone

    @property
    def sentence(self) -> str:
        """The headline as plain text."""
        return "".join(f"{phrase.text} ({phrase.interval})" for phrase in self.phrases) + "."


def verdict_of(comparisons: Sequence[Comparison]) -> Verdict | None:
    """The verdict on the left system of `comparisons`, against each right system in order; None without comparisons."""
    metric = next((name for name in PRIMARY if any(comparison.metric == name for comparison in comparisons)), None)
    chosen = [comparison for comparison in comparisons if comparison.metric == metric]
    if not chosen:
        return None
    phrases = [_first(chosen[0])]
    phrases += [_later(comparison, before) for before, comparison in pairwise(chosen)]
    verdicts = {comparison.verdict for comparison in chosen}
    tones: dict[str, Tone] = {"better": "better", "worse": "worse", "no difference shown": "none"}
    return Verdict(tuple(phrases), tones[chosen[0].verdict] if len(verdicts) == 1 else "mixed")


def _first(comparison: Comparison) -> Phrase:
    left, right = f"The {comparison.left}", _named(comparison.right)
    if comparison.verdict == "better":
        return Phrase(f"{left} beats {right}{_size(comparison)}", _interval(comparison, first=True))
    if comparison.verdict == "worse":
        return Phrase(f"{left} is worse than {right}{_size(comparison)}", _interval(comparison, first=True))
    words = metric_words(comparison.metric).inline
    change = signed(comparison.difference.value)
    return Phrase(
        f"No difference shown between the {comparison.left} and {right}: {change} {words}", _interval(comparison, first=True)
    )


def _later(comparison: Comparison, before: Comparison) -> Phrase:
    word = "and" if comparison.verdict == before.verdict else "but"
    right = _named(comparison.right)
    if comparison.verdict == "better":
        link = "," if before.verdict != "no difference shown" else ";"
        verb = "beats " if before.verdict != "better" else ""
        text = f"{link} {word} {verb}{right}{_size(comparison, unit=False)}"
    elif comparison.verdict == "worse":
        verb = "" if before.verdict == "worse" else "is worse than "
        text = f", {word} {verb}{right}{_size(comparison, unit=False)}"
    else:
        text = f"; {word} no difference from {right} is shown: {signed(comparison.difference.value)}"
    return Phrase(text, _interval(comparison, first=False))


def _named(system: str) -> str:
    return {"base": "its base", "majority class": "the majority class"}.get(system, system)


def _size(comparison: Comparison, *, unit: bool = True) -> str:
    """ " by +0.1 accuracy", or ": −0.1 nats a token" if lower is better, where "by" would mislead."""
    words = f" {metric_words(comparison.metric).inline}" if unit else ""
    link = " by " if comparison.higher_is_better else ": "
    return f"{link}{signed(comparison.difference.value)}{words}"


def _interval(comparison: Comparison, *, first: bool) -> str:
    difference = comparison.difference
    words = f"{difference.confidence * 100:g} % interval " if first else ""
    return f"{words}{signed(difference.low)} to {signed(difference.high)}"
