"""Metrics of written replies against references: matches, overlaps, JSON, numbers, and replies that went wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lorakeet.errors import DataError
from lorakeet.evaluate.compare import Comparison, compare_statistics, compare_values
from lorakeet.evaluate.intervals import SHARE, UNBOUNDED, Estimate, Floats, Statistic, bootstrap_or_words, mean, share
from lorakeet.evaluate.overlaps import chrf, common_length
from lorakeet.evaluate.reading.conventions import Conventions, Kind, conventions_of, json_of
from lorakeet.evaluate.reading.ordered import quadratic_kappa, rank_correlation
from lorakeet.evaluate.reading.texts import unspaced_letters, words
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.wording import metric_words

Score = Callable[[str, str], float]  # of a reply against its reference

REPEATED = 3  # times that a run of REPEAT_WORDS words stands in a reply that repeats itself
REPEAT_WORDS = 4
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m sorry|i am sorry|sorry, (?:but )?i|i (?:can(?:no|['’])t|am (?:unable|not able)|won['’]t)|as an ai\b)", re.I
)


@dataclass(frozen=True, eq=False)
class Replies:
    """One system's replies to prompts, in the order of their references. `cut` (n,) marks those that reached the token limit.

    `groups` (n,) are ids of dependent rows; `note` tells the reader about the system. `known` are answers of training rows, and
    `scale` ordered labels: with the references they say how replies are read.
    """

    system: str
    texts: tuple[str, ...]
    references: tuple[str, ...]
    cut: tuple[bool, ...] = ()
    groups: tuple[Hashable, ...] | None = None
    note: str = ""
    known: tuple[str, ...] = ()
    scale: tuple[str, ...] = ()
    _scores: dict[Score, Floats] = field(default_factory=dict, init=False, repr=False)  # each reply is scored once

    def __post_init__(self) -> None:
        counts = {len(self.texts), len(self.references), len(self.cut or self.texts), len(self.groups or self.texts)}
        if len(counts) > 1 or not self.texts:
            numbers = f"{len(self.texts)} replies to {len(self.references)} prompts"
            raise DataError(f"'{self.system}' wrote {numbers}; expected one for each, at least 1.")

    @cached_property
    def how(self) -> Conventions:
        """How these replies are read."""
        return conventions_of(self.references, self.known, self.scale)


PLAIN = Conventions()


def exact(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """1 if both are equal but for white space around them."""
    return float(reply.strip() == reference.strip())


def unspaced_share(texts: Sequence[str]) -> float:
    """The share of letters in scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)."""
    sample = "".join(text[:200] for text in texts[:500])
    letters = sum(sign.isalpha() for sign in sample)
    return unspaced_letters(sample) / letters if letters else 0.0


def normalised_match(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """1 if both are the same text to a reader (`Conventions.same_text`)."""
    return float(how.same_text(reply, reference))


def token_f1(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """F1 of the words that both have, as in SQuAD's evaluation (Rajpurkar et al. 2016)."""
    left, right = how.normal(reply).split(), how.normal(reference).split()
    return _f1((Counter(left) & Counter(right)).total(), left, right)


def rouge_l(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words."""
    left, right = how.normal(reply).split(), how.normal(reference).split()
    return _f1(common_length(left, right), left, right)


def set_f1(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """F1 of the labels that both have, whatever their order."""
    left, right = how.set_of(reply), how.set_of(reference)
    return _f1(len(left & right), left, right)


def set_match(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """1 if both have the same labels, whatever their order."""
    return float(how.set_of(reply) == how.set_of(reference))


def _f1(common: int, left: Any, right: Any) -> float:
    return 2 * common / (len(left) + len(right)) if left and right else float(left == right)


def _chrf(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    return chrf(reply, reference)


def valid_json(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """1 if the reply, or its only fenced block, is JSON."""
    return float(json_of(reply) is not None)


def json_match(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """1 if reply and reference are JSON of equal value, whatever the order of keys and the white space."""
    found, expected = json_of(reply), json_of(reference)
    return float(found is not None and found == expected and _kinds(found) == _kinds(expected))


def numeric_match(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """1 if both answer with the same number (`Conventions.same_number`)."""
    return float(how.same_number(reply, reference))


def absolute_error(reply: str, reference: str, how: Conventions = PLAIN) -> float:
    """How far the number of a reply is off, at most the range of the answers, which a reply without a number counts.

    Ordered labels are off by as many places.
    """
    found, expected = how.number(reply), how.number(reference)
    return how.range if found is None or expected is None else min(abs(found - expected), how.range)


SCORES: dict[str, Callable[[str, str, Conventions], float]] = {
    "exact_match": exact,
    "normalised_match": normalised_match,
    "json_match": json_match,
    "valid_json": valid_json,
    "numeric_match": numeric_match,
    "absolute_error": absolute_error,
    "mean_distance": absolute_error,
    "set_f1": set_f1,
    "set_match": set_match,
    "token_f1": token_f1,
    "chrf": _chrf,
    "rouge_l": rouge_l,
}
TOGETHER: dict[str, Callable[[Floats, Floats], Statistic]] = {  # of all rows, in place of a mean over them
    "rank_correlation": rank_correlation,
    "quadratic_kappa": quadratic_kappa,
}
FAULTS = ("empty", "cut_off", "repeats", "refusals")  # shares of replies; lower is better
_OF_TEXT = ("token_f1", "chrf", "rouge_l")
SHOWN: dict[Kind, tuple[str, ...]] = {  # the metrics of each kind of answer; the first decides
    "JSON": ("json_match", "exact_match", "normalised_match", "valid_json", *_OF_TEXT),
    "numbers": ("numeric_match", "absolute_error", "rank_correlation", "exact_match", "normalised_match"),
    "ordered labels": ("mean_distance", "quadratic_kappa", "exact_match", "normalised_match"),
    "sets of labels": ("set_f1", "set_match", "exact_match", "normalised_match"),
    "short texts": ("normalised_match", "exact_match", *_OF_TEXT),
    "texts": ("chrf", "exact_match", "normalised_match", "token_f1", "rouge_l"),
}


def main_metric(how: Conventions) -> str:
    """The metric that decides for answers that are read so; of numbers with decimals it is their error."""
    return "absolute_error" if how.kind == "numbers" and how.measured else SHOWN[how.kind][0]


def share_metric(how: Conventions) -> str:
    """The main metric, or in its place a share from 0 to 1, of which a margin can be set without knowing the numbers."""
    metric = main_metric(how)
    return {"absolute_error": "numeric_match", "mean_distance": "normalised_match"}.get(metric, metric)


def reply_scores(replies: Replies, metric: str, own: Score | None = None) -> Floats:
    """One metric of every reply (n,); `own` computes a metric that SCORES lacks. Raises DataError if it is not finite."""
    score: Any = SCORES.get(metric) or own
    if score is None:
        raise DataError(f"There is no metric '{metric}'; expected one of {', '.join(SCORES)}.")
    if score in replies._scores:
        return replies._scores[score]
    about = (replies.how,) if metric in SCORES else ()
    pairs = zip(replies.texts, replies.references, strict=True)
    found = np.array([score(*pair, *about) for pair in pairs], dtype=np.float64)
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise DataError(f"The metric '{metric}' of reply {row} is {found[row]}; expected a finite number.")
    replies._scores[score] = found
    return found


def _statistic(replies: Replies, metric: str) -> Statistic:
    """A metric of all rows together. A reply without a number counts as the middle one, on a scale as the farthest label."""
    how, found = replies.how, list[tuple[float, float]]()
    for reply, reference in zip(replies.texts, replies.references, strict=True):
        given, true = how.number(reply), how.number(reference)
        true = how.middle if true is None else true
        if how.scale:
            places = sorted(how.scale.values())
            farthest = max((places[0], places[-1]), key=lambda place: abs(place - true))
            given = float(farthest if given is None else np.clip(given, places[0], places[-1]))
        found.append((how.middle if given is None else given, true))
    return TOGETHER[metric](*np.array(found).T)


def metrics_shown(main: str, how: Conventions) -> tuple[str, ...]:
    """The metrics of a report whose main one is `main`, that one first."""
    return (main, *(name for name in SHOWN[how.kind] if name != main))


def measure_replies(replies: Replies, main: str, spec: EvaluateSpec, own: Score | None = None) -> dict[str, Estimate]:
    """Every metric of `replies` with its interval, the main one first; then the shares of FAULTS and the length in words."""
    found = {}
    for name in metrics_shown(main, replies.how):
        if name in TOGETHER:
            found[name] = bootstrap_or_words(_statistic(replies, name), len(replies.texts), spec=spec, groups=replies.groups)
        else:
            found[name] = _estimate(reply_scores(replies, name, own), replies, spec, _bounds(name, replies.how))
    cut = replies.cut or (False,) * len(replies.texts)
    faults = {
        "empty": [not text.strip() for text in replies.texts],
        "cut_off": list(cut),
        "repeats": [repeats(text) for text in replies.texts],
        "refusals": [_REFUSAL.match(text) is not None for text in replies.texts],
    }
    for name, flags in faults.items():
        found[name] = share(np.array(flags), spec=spec, groups=replies.groups)
    lengths = np.array([len(words(text)) for text in replies.texts], dtype=np.float64)
    found["reply_words"] = mean(lengths, spec=spec, groups=replies.groups, bounds=(0.0, np.inf))
    return found


def compare_replies(left: Replies, right: Replies, metric: str, spec: EvaluateSpec, own: Score | None = None) -> Comparison:
    """The paired comparison of two systems' replies to the same prompts in one metric."""
    if left.references != right.references or left.groups != right.groups:
        raise DataError(f"'{left.system}' and '{right.system}' replied to different prompts; have both reply to the same.")
    names, higher = (left.system, right.system), metric_words(metric).higher_is_better
    if metric in TOGETHER:
        sides = _statistic(left, metric), _statistic(right, metric)
        return compare_statistics(names, metric, sides, len(left.texts), spec, groups=left.groups)
    scores, (least, most) = (reply_scores(left, metric, own), reply_scores(right, metric, own)), _bounds(metric, left.how)
    bounds = (least - most, most - least)
    return compare_values(names, metric, scores, spec, groups=left.groups, higher_is_better=higher, bounds=bounds)


def repeats(text: str) -> bool:
    """True if a run of REPEAT_WORDS words stands REPEATED times or more in the text."""
    found = words(text)
    runs = Counter(tuple(found[start : start + REPEAT_WORDS]) for start in range(len(found) - REPEAT_WORDS + 1))
    return any(count >= REPEATED for count in runs.values())


def _bounds(metric: str, how: Conventions) -> tuple[float, float]:
    """Between which a reply's score lies; a metric of the user's may lie anywhere."""
    if SCORES.get(metric) is absolute_error:
        return (0.0, how.range)
    return SHARE if metric in SCORES else UNBOUNDED


def _estimate(values: Floats, replies: Replies, spec: EvaluateSpec, bounds: tuple[float, float]) -> Estimate:
    if np.isin(values, (0.0, 1.0)).all():
        return share(values == 1, spec=spec, groups=replies.groups)
    return mean(values, spec=spec, groups=replies.groups, bounds=bounds)


def _kinds(value: Any) -> Any:
    """Where a JSON value has true and false, which equal 1 and 0 otherwise."""
    if isinstance(value, dict):
        return {key: _kinds(each) for key, each in value.items()}
    return [_kinds(each) for each in value] if isinstance(value, list) else isinstance(value, bool)
