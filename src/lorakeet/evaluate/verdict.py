"""The headline of a report, from the paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from lorakeet.evaluate.answers import Answers, Confusion, balanced_accuracy, none_right, recall_of_rarest
from lorakeet.evaluate.baselines import CONSTANT, EMBEDDED, MAJORITY, MEDIAN, NEAREST, TFIDF
from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.wording import metric_words, signed
from lorakeet.registry import declarations

NAMED = {
    "base": "its base",
    "few-shot base": "the few-shot base",
    MAJORITY: "the majority class",
    "uncut adapter": "the uncut adapter",
    NEAREST: "copies of the nearest training answers",
    CONSTANT: "a constant answer",
    MEDIAN: "the median training answer",
}  # systems as a sentence names them
ONE_SEED = "One seed was trained"
COPIES = (NEAREST, CONSTANT, MEDIAN)
WITHOUT_MODEL = (TFIDF, EMBEDDED, MAJORITY, *COPIES)
GRADED = ("valid_json", "chrf")  # of replies: how near they come where few are right; named before others
NAMED_ELSEWHERE = 2  # metrics beside the headline's that it names at most, of each direction
Tone = Literal["better", "mixed", "none", "worse"]


@dataclass(frozen=True)
class Phrase:
    """A part of the headline, and its interval; empty where it states no number."""

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
        return "".join(f"{phrase.text} ({phrase.interval})" if phrase.interval else phrase.text for phrase in self.phrases) + "."


def verdict_of(comparisons: Sequence[Comparison]) -> Verdict | None:
    """The verdict on the left system of `comparisons`, in the metric of the first; None without comparisons.

    Against each right system in order. Replies that are no better where the loss is lower are said to be no better: a lower loss
    alone, of a model that knows the format now, proves nothing.
    """
    if not comparisons:
        return None
    chosen = [comparison for comparison in comparisons if comparison.metric == comparisons[0].metric]
    copies = sorted((one for one in chosen if one.right in COPIES), key=_lead)
    chosen = [one for one in chosen if one not in copies[1:]]  # the better copy says it all
    phrases = [_first(chosen[0])]
    lower = next((one for one in comparisons if one.metric == "loss" and one.right == chosen[0].right), None)
    elsewhere = _elsewhere(chosen[0], comparisons, "better")
    alone = lower is not None and lower.verdict == "better" and not elsewhere
    if lower is not None and alone and chosen[0].verdict != "better" and chosen[0].metric != "loss":
        answers = "The answers are worse" if chosen[0].verdict == "worse" else "No better answers are shown"
        said = f"{answers}, though the loss is lower{_size(lower)}"
        phrases = [Phrase(said, _interval(lower, first=False)), replace(phrases[0], text=f". {phrases[0].text}")]
    for before, one in pairwise(chosen):
        others = _elsewhere(one, comparisons, "better") + _elsewhere(one, comparisons, "worse")
        phrases.append(_later(one, before, unit=bool(others)))
    lost = _elsewhere(chosen[0], comparisons, "worse") if chosen[0].verdict != "worse" else []
    phrases += _listed("It", elsewhere if chosen[0].verdict != "better" else [])
    phrases += _listed("But it" if chosen[0].verdict == "better" or elsewhere else "It", lost)
    phrases += _without_model(chosen, comparisons)
    verdicts = {comparison.verdict for comparison in (*chosen, *(lost if chosen[0].verdict == "better" else ()))}
    tones: dict[str, Tone] = {"better": "better", "worse": "worse", "no difference shown": "none"}
    return Verdict(tuple(phrases), tones[chosen[0].verdict] if len(verdicts) == 1 else "mixed")


def noted(verdict: Verdict | None, note: str) -> Verdict | None:
    """The verdict with a further sentence; the same without one, and None for no verdict."""
    return verdict if verdict is None or not note else replace(verdict, phrases=(*verdict.phrases, Phrase(f". {note}", "")))


def of_uneven(verdict: Verdict | None, answers: Answers, spec: EvaluateSpec) -> Verdict | None:
    """The verdict with what accuracy hides where nearly all rows have one label: recall of the rarest, balanced accuracy."""
    if verdict is None:
        return None
    (rarest, recall), balanced = recall_of_rarest(answers, spec), balanced_accuracy(answers, spec)
    words = metric_words("balanced_accuracy")  # the mean of recalls
    found = f". It finds {round(recall.value * recall.n)} of {recall.n} rows of {rarest!r}: recall {words.level(recall.value)}"
    more = (Phrase(found, words.ends(recall)), Phrase(f", balanced accuracy {words.level(balanced.value)}", words.ends(balanced)))
    return replace(verdict, phrases=(*verdict.phrases, *more))


def of_unfound(verdict: Verdict | None, confusions: Sequence[Confusion]) -> Verdict | None:
    """The verdict that begins with the labels of which the adapter, whose confusions are the last, has no row right.

    A mean over rows hides them.
    """
    if verdict is None or not confusions or not (lost := none_right(confusions[-1])):
        return verdict
    tone = "mixed" if verdict.tone == "better" else verdict.tone
    return Verdict((Phrase(f"The {confusions[-1].system} has {lost} right. ", ""), *verdict.phrases), tone)


def circumstances(part: str, seeds: str = ONE_SEED) -> str:
    """What a headline has to say of its evidence: which rows were measured, and how many seeds were trained."""
    if part == "test":
        return seeds
    return f"There are no test rows: the held-out rows, which also chose the checkpoint, are measured. {seeds}"


def _without_model(chosen: Sequence[Comparison], comparisons: Sequence[Comparison]) -> list[Phrase]:
    """What follows where the adapter is not shown to be better than a method without a language model."""
    level = next((one for one in chosen if one.right in WITHOUT_MODEL and one.verdict != "better"), None)
    if level is None:
        return []
    if ahead := _elsewhere(level, comparisons, "better"):
        words = metric_words(level.metric).title
        state = "is better" if level.verdict == "worse" else "is level"
        said = f". {_subject(level, chosen)}, without a language model, {state} in {words} alone: the adapter has "
        return _signed_phrases(said, ahead)
    if level.verdict == "worse":
        return [Phrase(f". {_subject(level, chosen)} needs no language model", "")]
    surer = next((one for one in comparisons if (one.right, one.metric) == (level.right, "log_loss")), None)
    said = f". {_subject(level, chosen)}, without a language model, may do as well"
    if surer is None or surer.verdict != "worse":
        return [Phrase(said, "")]
    return [Phrase(f"{said}: the adapter has {signed(surer.difference.value)} log-loss", _interval(surer, first=False))]


def _subject(level: Comparison, chosen: Sequence[Comparison]) -> str:
    """The method as the subject of a sentence: not named again where it was the last that was named."""
    named = named_system(level.right)
    return "That method" if level is chosen[-1] else f"{named[:1].upper()}{named[1:]}"


def _lead(one: Comparison) -> float:
    """How far the left system is ahead, by the estimate."""
    return one.difference.value if one.higher_is_better else -one.difference.value


def _elsewhere(one: Comparison, comparisons: Sequence[Comparison], verdict: str) -> list[Comparison]:
    """Comparisons of the same systems in other metrics of answers that have this verdict."""
    rest = [other for other in comparisons if metric_words(other.metric).of_answers and other.metric != one.metric]
    found = [other for other in rest if other.right == one.right and other.verdict == verdict]
    return sorted(found, key=lambda other: other.metric not in GRADED)[:NAMED_ELSEWHERE]


def _listed(subject: str, found: Sequence[Comparison]) -> list[Phrase]:
    """What the adapter gained or lost in other metrics, such as the format where no more of its replies match."""
    if not found:
        return []
    gained = found[0].verdict == "better"
    verb = "gains" if all(metric_words(one.metric).higher_is_better for one in found) else "is better by"
    return _signed_phrases(f". {subject} {verb if gained else 'is worse by'} ", found)


def _signed_phrases(start: str, found: Sequence[Comparison]) -> list[Phrase]:
    starts = [start, *(len(found) - 1) * [", and "]]
    return [
        Phrase(f"{before}{metric_words(one.metric).said(one.difference.value)}", _interval(one, first=False))
        for before, one in zip(starts, found, strict=True)
    ]


def _first(comparison: Comparison) -> Phrase:
    left, right = f"The {comparison.left}", named_system(comparison.right)
    if comparison.verdict == "better":
        return Phrase(f"{left} beats {right}{_size(comparison)}", _interval(comparison, first=True))
    if comparison.verdict == "worse":
        return Phrase(f"{left} is worse than {right}{_size(comparison)}", _interval(comparison, first=True))
    change = metric_words(comparison.metric).said(comparison.difference.value)
    return Phrase(f"No difference shown between the {comparison.left} and {right}: {change}", _interval(comparison, first=True))


def _later(comparison: Comparison, before: Comparison, *, unit: bool) -> Phrase:
    """A further rival; with the `unit`, where other metrics say something else of it."""
    word = "and" if comparison.verdict == before.verdict else "but"
    right = named_system(comparison.right)
    anew = before.verdict == "no difference shown"  # whose clause has another subject
    link, subject = ("; ", " it") if anew else (", ", "")
    if comparison.verdict == "better":
        verb = "beats " if before.verdict != "better" else ""
        text = f"{link}{word}{subject} {verb}{right}{_size(comparison, unit=unit)}"
    elif comparison.verdict == "worse":
        verb = "" if before.verdict == "worse" else "is worse than "
        text = f"{link}{'and' if anew else word}{subject} {verb}{right}{_size(comparison, unit=unit)}"
    else:
        text = f"; {word} no difference from {right} is shown: {_change(comparison, unit=unit)}"
    return Phrase(text, _interval(comparison, first=False))


def named_system(system: str) -> str:
    """A system as a sentence names it."""
    of_kinds = {name: words for one in declarations().values() for name, words in one.rivals.items()}
    return (NAMED | of_kinds).get(system, system)


def _size(comparison: Comparison, *, unit: bool = True) -> str:
    """ " by +3 points of accuracy", or ": −3 points of …", where "worse by −3" would mislead, or a lower loss that is better."""
    link = " by " if comparison.higher_is_better and comparison.verdict == "better" else ": "
    return f"{link}{_change(comparison, unit=unit)}"


def _change(comparison: Comparison, *, unit: bool) -> str:
    words, value = metric_words(comparison.metric), comparison.difference.value
    return words.said(value) if unit else words.change(value)


def _interval(comparison: Comparison, *, first: bool) -> str:
    difference = comparison.difference
    words = f"{difference.confidence * 100:g} % interval " if first else ""
    return f"{words if not difference.why_none else ''}{metric_words(comparison.metric).ends(difference, signs=True)}"
