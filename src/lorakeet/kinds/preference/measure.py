"""Which of two answers a model prefers: shares of pairs with intervals, paired comparisons, and simple baselines.

A system has a score for each pair: above 0 it prefers the chosen answer. Two scores are kept apart. By the reward, it is how
much more the log-ratio to the reference rose for the chosen answer: what the objective trains. The reference itself prefers
neither, so 0.5 is chance. By likelihood, it is the mean log-probability of a token, which every model has.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakeet.errors import DataError
from lorakeet.evaluate.classifier.logistic import regression
from lorakeet.evaluate.classifier.terms import Terms, characters_of, words_of
from lorakeet.evaluate.compare import Comparison, compare_values
from lorakeet.evaluate.intervals import SHARE, Estimate, Floats, mean, share
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.kinds.preference.wording import DIFFERENCE, LONGER, PREFERRED, PREFERRED_ALIKE, SHORTER

ALIKE = 0.1  # answers whose numbers of tokens differ by no more than this share are of equal length
TIE = 0.01  # nats, or nats a token: scores nearer to 0 are rounding, and prefer neither answer
FEWEST_ALIKE = 10  # pairs from which those of equal length are evaluated by themselves
LEAST_TERMS = 20  # training pairs that the TF-IDF baseline needs


@dataclass(frozen=True, eq=False)
class PairPreferences:
    """One system's score of each pair (n,): above 0 it prefers the chosen answer; within `tie` of 0 it counts half."""

    system: str
    scores: Floats
    groups: tuple[Hashable, ...] | None = None
    note: str = ""
    tie: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.scores) or not np.isfinite(self.scores).all():
            raise DataError(f"The scores of '{self.system}' cannot be measured: {len(self.scores)} pairs, not all finite.")

    @property
    def right(self) -> Floats:
        """1 for a pair whose chosen answer is preferred, 0 for the rejected one, 0.5 for neither (n,)."""
        return np.where(np.abs(self.scores) <= self.tie, 0.5, (self.scores > 0).astype(float))


def equal_lengths(chosen_tokens: Floats, rejected_tokens: Floats) -> NDArray[np.bool_]:
    """The pairs whose answers have equally many tokens, within ALIKE of the longer one (n,)."""
    longer = np.maximum(chosen_tokens, rejected_tokens)
    return np.asarray(np.abs(chosen_tokens - rejected_tokens) <= ALIKE * longer)


def measure_preferences(pairs: PairPreferences, alike: NDArray[np.bool_], spec: EvaluateSpec) -> dict[str, Estimate]:
    """The share of pairs whose chosen answer is preferred, of all and of those with answers of equal length."""
    found = {PREFERRED: _share(pairs.right, spec, pairs.groups)}
    if alike.sum() >= FEWEST_ALIKE and not alike.all():
        found[PREFERRED_ALIKE] = _share(pairs.right[alike], spec, _some(pairs.groups, alike))
    return found


def compare_preferences(
    left: PairPreferences, right: PairPreferences, alike: NDArray[np.bool_], spec: EvaluateSpec
) -> tuple[Comparison, ...]:
    """The paired differences of these shares."""
    systems = (left.system, right.system)
    found = [compare_values(systems, PREFERRED, (left.right, right.right), spec, groups=left.groups, bounds=(-1, 1))]
    if alike.sum() >= FEWEST_ALIKE and not alike.all():
        values = left.right[alike], right.right[alike]
        found.append(compare_values(systems, PREFERRED_ALIKE, values, spec, groups=_some(left.groups, alike), bounds=(-1, 1)))
    return tuple(found)


def mean_change(values: Floats, spec: EvaluateSpec, groups: Sequence[Hashable] | None) -> Estimate:
    """The mean of a change in nats a token (n,), with its interval."""
    return mean(values, spec=spec, groups=groups)


def length_of_answers(
    train: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]], groups: tuple[Hashable, ...] | None
) -> PairPreferences:
    """Prefers the answer (chosen, rejected) with more characters, or with fewer where more of the `train` pairs do.

    As many of both, or no training pairs: with more.
    """
    gaps, known = (np.array([len(one) - len(other) for one, other in some], float) for some in (pairs, train))
    longer, shorter = int((known > 0).sum()), int((known < 0).sum())
    name, sign, what, seen = (SHORTER, -1.0, "fewer", shorter) if shorter > longer else (LONGER, 1.0, "more", longer)
    note = f"always prefers the answer with {what} characters"
    return PairPreferences(name, sign * gaps, groups, f"{note}, as in {seen} of {len(train)} training pairs" if train else note)


def tfidf_difference(
    train: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]], groups: tuple[Hashable, ...] | None
) -> PairPreferences | None:
    """Logistic regression on the difference of the answers' TF-IDF terms (chosen, rejected), fitted to `train` pairs.

    It never sees the prompts, so it finds what gives an answer away by its own words. Word 1-2-grams and character 2-5-grams;
    None with fewer than LEAST_TERMS training pairs, or where no term occurs twice.
    """
    from scipy.sparse import hstack, vstack

    if len(train) < LEAST_TERMS:
        return None
    answers = [text for both in train for text in both]
    found = (Terms.fitted(answers, split, least=2, most=1 << 16) for split in (words_of, characters_of(2, 5)))
    fitted = [each[0] for each in found if each is not None]
    if not fitted:
        return None

    def differences(some: Sequence[tuple[str, str]]) -> Any:
        parts = [terms.transform([one for one, _ in some]) - terms.transform([other for _, other in some]) for terms in fitted]
        return hstack(parts).tocsr()

    known = differences(train)
    labels = ["wanted"] * len(train) + ["unwanted"] * len(train)
    model = regression(vstack([known, -known]).tocsr(), labels, intercept=False, balanced=False)
    scores = model.scores(differences(pairs))[:, 1]
    return PairPreferences(DIFFERENCE, scores, groups, f"sees the two answers without their prompt; fitted to {len(train)} pairs")


def _share(right: Floats, spec: EvaluateSpec, groups: Sequence[Hashable] | None) -> Estimate:
    if np.isin(right, (0.0, 1.0)).all():
        return share(right == 1, spec=spec, groups=groups)
    return mean(right, spec=spec, groups=groups, bounds=SHARE)


def _some(groups: Sequence[Hashable] | None, chosen: NDArray[np.bool_]) -> tuple[Hashable, ...] | None:
    return None if groups is None else tuple(group for group, one in zip(groups, chosen, strict=True) if one)
