"""Metrics of written replies against references: matches, overlaps, JSON, numbers, and replies that went wrong."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import regex

from lorakeet.errors import DataError
from lorakeet.evaluate.compare import Comparison, compare_values
from lorakeet.evaluate.intervals import Estimate, Floats, mean, share
from lorakeet.evaluate.overlaps import chrf, common_length
from lorakeet.evaluate.spec import EvaluateSpec

Score = Callable[[str, str], float]  # of a reply against its reference

SHORT = 8  # words: references of at most so many, by their median, must be matched; longer ones are compared by chrF
NEARLY_ALL = 0.9  # of the references are JSON, or numbers: then replies are compared as such
REPEATED = 3  # times that a run of REPEAT_WORDS words stands in a reply that repeats itself
REPEAT_WORDS = 4
_SIGN = r"[\p{L}\p{M}\p{N}]"
_LETTER = regex.compile(_SIGN)
_WORD = regex.compile(rf"(?<!{_SIGN})[-−](?=\p{{N}}){_SIGN}+|{_SIGN}+(?:['’]{_SIGN}+)*|[^\s\p{{L}}\p{{M}}\p{{N}}]")
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_NUMBER = re.compile(r"(?:(?<![\w.])[-+−])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m sorry|i am sorry|sorry, (?:but )?i|i (?:can(?:no|['’])t|am (?:unable|not able)|won['’]t)|as an ai\b)", re.I
)


@dataclass(frozen=True, eq=False)
class Replies:
    """One system's replies to prompts, in the order of their references. `cut` (n,) marks those that reached the token limit.

    `groups` (n,) are ids of dependent rows; `note` tells the reader about the system.
    """

    system: str
    texts: tuple[str, ...]
    references: tuple[str, ...]
    cut: tuple[bool, ...] = ()
    groups: tuple[Hashable, ...] | None = None
    note: str = ""
    _scores: dict[Score, Floats] = field(default_factory=dict, init=False, repr=False)  # each reply is scored once

    def __post_init__(self) -> None:
        counts = {len(self.texts), len(self.references), len(self.cut or self.texts), len(self.groups or self.texts)}
        if len(counts) > 1 or not self.texts:
            numbers = f"{len(self.texts)} replies to {len(self.references)} prompts"
            raise DataError(f"'{self.system}' wrote {numbers}; expected one for each, at least 1.")


def exact(reply: str, reference: str) -> float:
    """1 if both are equal but for white space around them."""
    return float(reply.strip() == reference.strip())


def normalised(text: str) -> str:
    """The text in one case and one Unicode form (NFKC), its words with single spaces between, without punctuation."""
    return " ".join(word for word in words(text) if _LETTER.search(word))


def words(text: str) -> list[str]:
    """The words and signs of a text in one case; scripts without spaces count by characters."""
    found: list[str] = _WORD.findall(_UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold()))
    return found


def unspaced_share(texts: Sequence[str]) -> float:
    """The share of letters in scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)."""
    sample = "".join(text[:200] for text in texts[:500])
    letters = sum(sign.isalpha() for sign in sample)
    return len(_UNSPACED.findall(sample)) / letters if letters else 0.0


def normalised_match(reply: str, reference: str) -> float:
    """1 if both are equal after `normalised`; references of signs alone are compared as they are."""
    left, right = normalised(reply), normalised(reference)
    return float(left == right) if right else exact(reply, reference)


def token_f1(reply: str, reference: str) -> float:
    """F1 of the words that both have, as in SQuAD's evaluation (Rajpurkar et al. 2016)."""
    left, right = normalised(reply).split(), normalised(reference).split()
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right)) if left and right else float(left == right)


def rouge_l(reply: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words."""
    left, right = normalised(reply).split(), normalised(reference).split()
    return 2 * common_length(left, right) / (len(left) + len(right)) if left and right else float(left == right)


def valid_json(reply: str, reference: str) -> float:
    """1 if the reply is JSON."""
    return float(_json(reply) is not None)


def json_match(reply: str, reference: str) -> float:
    """1 if reply and reference are JSON of equal value, whatever the order of keys and the white space."""
    found, expected = _json(reply), _json(reference)
    return float(found is not None and found == expected and _kinds(found) == _kinds(expected))


def numeric_match(reply: str, reference: str) -> float:
    """1 if the last number of the reply is the last of the reference, within 1e-6 of it."""
    left, right = _number(reply), _number(reference)
    return float(left is not None and right is not None and abs(left - right) <= 1e-6 * max(1.0, abs(right)))


SCORES: dict[str, Score] = {
    "exact_match": exact,
    "normalised_match": normalised_match,
    "json_match": json_match,
    "valid_json": valid_json,
    "numeric_match": numeric_match,
    "token_f1": token_f1,
    "chrf": chrf,
    "rouge_l": rouge_l,
}
FAULTS = ("empty", "cut_off", "repeats", "refusals")  # shares of replies; lower is better


def main_metric(references: Sequence[str]) -> str:
    """The metric that decides for such references: json_match, numeric_match, normalised_match (short ones) or chrf."""
    if _share_of(references, lambda text: isinstance(_json(text), (dict, list))) >= NEARLY_ALL:
        return "json_match"
    if _share_of(references, lambda text: _NUMBER.fullmatch(text.strip().strip("$€£%")) is not None) >= NEARLY_ALL:
        return "numeric_match"
    return "normalised_match" if np.median([len(words(text)) for text in references]) <= SHORT else "chrf"


def reply_scores(replies: Replies, metric: str, own: Score | None = None) -> Floats:
    """One metric of every reply (n,); `own` computes a metric that SCORES lacks. Raises DataError if it is not finite."""
    score = SCORES.get(metric) or own
    if score is None:
        raise DataError(f"There is no metric '{metric}'; expected one of {', '.join(SCORES)}.")
    if score in replies._scores:
        return replies._scores[score]
    found = np.array([score(*pair) for pair in zip(replies.texts, replies.references, strict=True)], dtype=np.float64)
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise DataError(f"The metric '{metric}' of reply {row} is {found[row]}; expected a finite number.")
    replies._scores[score] = found
    return found


def metrics_shown(main: str) -> tuple[str, ...]:
    """The metrics of a report whose main one is `main`, that one first."""
    left_out = {"json_match": ("numeric_match",), "numeric_match": ("json_match", "valid_json")}
    out = left_out.get(main, ("json_match", "valid_json", "numeric_match"))
    return (main, *(name for name in SCORES if name != main and name not in out))


def graded_beside(main: str) -> tuple[str, ...]:
    """The metrics that are compared beside `main`, a share of right replies: how near the others come."""
    if main == "json_match":
        return ("valid_json", "chrf")
    return ("chrf",) if main in ("exact_match", "normalised_match") else ()


def measure_replies(replies: Replies, main: str, spec: EvaluateSpec, own: Score | None = None) -> dict[str, Estimate]:
    """Every metric of `replies` with its interval, the main one first; then the shares of FAULTS and the length in words."""
    found = {name: _estimate(reply_scores(replies, name, own), replies, spec) for name in metrics_shown(main)}
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
    found["reply_words"] = mean(lengths, spec=spec, groups=replies.groups)
    return found


def compare_replies(left: Replies, right: Replies, metric: str, spec: EvaluateSpec, own: Score | None = None) -> Comparison:
    """The paired comparison of two systems' replies to the same prompts in one metric, where higher is better."""
    if left.references != right.references or left.groups != right.groups:
        raise DataError(f"'{left.system}' and '{right.system}' replied to different prompts; have both reply to the same.")
    names, scores = (left.system, right.system), (reply_scores(left, metric, own), reply_scores(right, metric, own))
    return compare_values(names, metric, scores, spec, groups=left.groups)


def repeats(text: str) -> bool:
    """True if a run of REPEAT_WORDS words stands REPEATED times or more in the text."""
    found = words(text)
    runs = Counter(tuple(found[start : start + REPEAT_WORDS]) for start in range(len(found) - REPEAT_WORDS + 1))
    return any(count >= REPEATED for count in runs.values())


def _estimate(values: Floats, replies: Replies, spec: EvaluateSpec) -> Estimate:
    if np.isin(values, (0.0, 1.0)).all():
        return share(values == 1, spec=spec, groups=replies.groups)
    return mean(values, spec=spec, groups=replies.groups)


def _share_of(texts: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, texts)) / len(texts)


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is none, or the value null."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _kinds(value: Any) -> Any:
    """Where a JSON value has true and false, which equal 1 and 0 otherwise."""
    if isinstance(value, dict):
        return {key: _kinds(each) for key, each in value.items()}
    return [_kinds(each) for each in value] if isinstance(value, list) else isinstance(value, bool)


def _number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None
