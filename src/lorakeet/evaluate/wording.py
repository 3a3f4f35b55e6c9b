"""Formats numbers and metrics for people."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorakeet.errors import percent
from lorakeet.registry import declarations

if TYPE_CHECKING:
    from lorakeet.evaluate.intervals import Estimate


@dataclass(frozen=True)
class MetricWords:
    """A metric's name in a heading and inside a sentence, its meaning, and its direction.

    A metric that is not `drawn` has no chart and is in the table only. A `share` of rows is written in percent, and differences
    of it in points; all others are written as they are. One that is not `of_answers` says nothing of how good answers are.
    """

    title: str
    inline: str
    meaning: str
    higher_is_better: bool
    digits: int = 3
    drawn: bool = True
    share: bool = False
    of_answers: bool = True

    def level(self, value: float, digits: int | None = None) -> str:
        """A value with its unit."""
        digits = self.digits if digits is None else digits
        return percent(value, max(1, digits - 2)) if self.share and math.isfinite(value) else number(value, digits)

    def change(self, value: float, digits: int | None = None) -> str:
        """A difference with its sign and unit."""
        digits = self.digits if digits is None else digits
        return f"{_points(value, digits)} points" if self.share else signed(value, digits)

    def said(self, value: float) -> str:
        """A difference inside a sentence: "+3.1 points of accuracy"."""
        link = " of " if self.share and not self.inline.startswith("of ") else " "
        return f"{self.change(value)}{link}{self.inline}"

    def ends(self, found: Estimate, digits: int | None = None, *, signs: bool = False, between: str = " to ") -> str:
        """The interval of a value, or with `signs` of a difference, in the unit of both."""
        digits = self.digits if digits is None else digits
        if not self.share or found.why_none:
            return span(found, digits, signs=signs, between=between)
        if signs:
            return f"{_points(found.low, digits)}{between}{_points(found.high, digits)}"
        low, high = (percent(end, max(1, digits - 2)) for end in (found.low, found.high))
        return f"{low.removesuffix(' %')}{between}{high}"


METRIC_WORDS = {
    "accuracy": MetricWords("Accuracy", "accuracy", "Share of rows answered correctly", True),
    "macro_f1": MetricWords("Macro-F1", "macro-F1", "Mean F1 over labels, equally weighted", True),
    "balanced_accuracy": MetricWords("Balanced accuracy", "balanced accuracy", "Mean recall of the labels", True),
    "log_loss": MetricWords("Log-loss", "log-loss", "−log p of the true label, in nats", False),
    "calibration_error": MetricWords("Calibration error", "calibration error", "Gap between confidence and accuracy", False),
    "exact_match": MetricWords("Exact match", "exact match", "Share of replies equal to the reference", True),
    "normalised_match": MetricWords("Normalised match", "normalised match", "Equal but for case, marks, a label's reason", True),
    "json_match": MetricWords("JSON match", "JSON match", "Share of replies that are JSON of equal value", True),
    "numeric_match": MetricWords("Numeric match", "numeric match", "Share of replies with the right number", True),
    "absolute_error": MetricWords(
        "Absolute error", "mean absolute error", "Mean; at most the range of the answers, as without a number", False
    ),
    "rank_correlation": MetricWords("Rank correlation", "rank correlation", "Spearman's, of reply and reference", True),
    "mean_distance": MetricWords("Distance", "places of mean distance", "Places that a reply is off on the scale", False),
    "quadratic_kappa": MetricWords("Quadratic kappa", "quadratic kappa", "Agreement on the scale; 0 is that of chance", True),
    "set_f1": MetricWords("Set F1", "set F1", "Labels that reply and reference share, in any order", True),
    "set_match": MetricWords("Set match", "set match", "Share of replies with the same labels, in any order", True),
    "token_f1": MetricWords("Token F1", "token F1", "Words that reply and reference share", True),
    "chrf": MetricWords("chrF", "chrF", "Character n-grams that both share, from 0 to 1", True),
    "rouge_l": MetricWords("ROUGE-L", "ROUGE-L", "Longest common subsequence of words", True, drawn=False),
    "valid_json": MetricWords("Valid JSON", "valid JSON", "Share of replies that are JSON", True, drawn=False),
    "judge_wins": MetricWords("Preferred by the judge", "of the prompts", "Share by a judge model, both orders; ties half", True),
    "empty": MetricWords("Empty replies", "empty replies", "", False, drawn=False),
    "cut_off": MetricWords("Replies cut off", "replies cut off", "Share that reached the token limit", False, drawn=False),
    "repeats": MetricWords("Replies that repeat", "replies that repeat", "The same four words three times", False, drawn=False),
    "refusals": MetricWords("Refusals", "refusals", "By their first words, in English", False, drawn=False),
    "reply_words": MetricWords("Words a reply", "words a reply", "", False, 1, drawn=False),
    "brier": MetricWords("Brier score", "Brier score", "Squared error of the probabilities", False, drawn=False),
    "loss": MetricWords("Loss", "nats a token", "Mean −log p of a token, in nats", False, of_answers=False),
    "perplexity": MetricWords("Perplexity", "perplexity", "exp(loss)", False, 2),
}
_SHARES = (  # of rows, replies or pairs; recall and confidence too are shares
    "accuracy", "balanced_accuracy", "calibration_error", "exact_match",
    "normalised_match", "json_match", "numeric_match", "set_match", "valid_json", "judge_wins", "empty", "cut_off", "repeats",
    "refusals",
)  # fmt: skip
METRIC_WORDS |= {name: replace(METRIC_WORDS[name], share=True) for name in _SHARES}


CHECK_WORDS = {
    "logit": "largest logit difference / largest logit",
    "mean_kl": "mean KL, nats a token",
    "top1_agreement": "same most likely token",
    "non_finite": "logits that are not finite",
    "loss": "loss difference, nats a token",
    "latent": "largest latent difference / largest latent",
    "effect": "KL as a share of the adapter's effect",
    "nearer_base": "times nearer to the base than to the adapter",
}


def check_words(name: str) -> str:
    """The words for a measure of a certificate; an unknown one keeps its name."""
    return CHECK_WORDS.get(name, name.replace("_", " "))


def compact(value: float) -> str:
    """A number in three significant digits, with a minus sign (U+2212)."""
    if not math.isfinite(value):
        return number(value)
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "−")


def all_metric_words() -> dict[str, MetricWords]:
    """The words for each metric in the order of a report: those of kinds first."""
    return {name: words for one in declarations().values() for name, words in one.metrics.items()} | METRIC_WORDS


def metric_words(name: str) -> MetricWords:
    """The words for a metric; an unknown one keeps its name, and higher counts as better."""
    return all_metric_words().get(name) or MetricWords(name.replace("_", " "), name.replace("_", " "), "", True)


def number(value: float | None, digits: int = 3) -> str:
    """A number as text: fixed digits, a minus sign (U+2212), powers of ten if all digits would be zero."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if value != 0 and (abs(value) < 0.5 * 10**-digits or abs(value) >= 1e6):
        text = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    else:
        text = f"{value:.{digits}f}"
    return text.replace("-", "−")


def _points(share: float, digits: int) -> str:
    kept = max(1, digits - 2)
    return signed(round(100 * share, kept) + 0.0, kept)


def signed(value: float, digits: int = 3) -> str:
    """A difference as text, always with its sign; zero has none."""
    text = number(value, digits)
    return f"+{text}" if value > 0 and math.isfinite(value) else text


def span(found: Estimate, digits: int = 3, *, signs: bool = False, between: str = " to ") -> str:
    """An interval as text, or the words in its place; with `signs` as a difference."""
    text = signed if signs else number
    return found.why_none or f"{text(found.low, digits)}{between}{text(found.high, digits)}"


def bytes_text(count: int | None) -> str:
    """A size as text in GiB, MiB or KiB: 1 GiB = 2^30 bytes."""
    if count is None:
        return "–"
    for unit, bits, digits in (("GiB", 30, 2), ("MiB", 20, 0), ("KiB", 10, 0)):
        if count >= 1 << bits:
            return f"{count / (1 << bits):.{digits}f} {unit}"
    return f"{count} bytes"


def as_written(seconds: float) -> float:
    """The seconds that `duration_text` writes up to 90 minutes: a sum of these is that of the parts that a reader sees."""
    return seconds if seconds < 90 else 60.0 * round(seconds / 60)


def duration_text(seconds: float) -> str:
    """A time as people write it: 0.25 s, 42 s, 28 min, 3 h 5 min, 2 days 4 h."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"
