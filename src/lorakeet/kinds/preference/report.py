"""Adds to a report which of two answers each system prefers: headline, comparisons, and what became of the likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorakeet.errors import percent
from lorakeet.evaluate.calibration import reliability
from lorakeet.evaluate.compare import Comparison, compare_values
from lorakeet.evaluate.intervals import SHARE, Estimate, Floats, mean
from lorakeet.evaluate.report.report import Reliability, Report, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.verdict import Phrase, Verdict, verdict_of
from lorakeet.evaluate.wording import metric_words, signed, span
from lorakeet.kinds.preference.measure import (
    PairPreferences,
    compare_preferences,
    equal_lengths,
    mean_change,
    measure_preferences,
)
from lorakeet.kinds.preference.wording import CHOSEN_CHANGE, DIFFERENCE, LEAD, LIKELIER, PREFERRED, REJECTED_CHANGE


@dataclass(frozen=True, eq=False)
class PreferenceScores:
    """What the pairs say: the adapter's and its rivals' preferences, base or reference first, and changes of log-probabilities.

    `tokens` (n, 2) are those of the chosen and the rejected answers; `changes` (n, 2) the log-ratios of both to the reference, in
    nats a token, or to `against`. `likelier` are the models by their own log-probabilities, the adapter first. With `by_reward`
    the others are not measured so, and the models are compared by likelihood too. `beta` makes probabilities of the scores; None
    where the objective gives none.
    """

    adapter: PairPreferences
    rivals: tuple[PairPreferences, ...]
    tokens: Floats
    changes: Floats | None = None
    likelier: tuple[PairPreferences, ...] = ()
    beta: float | None = None
    by_reward: bool = False
    against: str = "the reference"


def with_preferences(report: Report, found: PreferenceScores, spec: EvaluateSpec) -> Report:
    """The report with the preferences before all else: metrics, comparisons in the order of the rivals, verdict, calibration."""
    alike, groups = equal_lengths(found.tokens[:, 0], found.tokens[:, 1]), found.adapter.groups
    more = {each.system: measure_preferences(each, alike, spec) for each in (found.adapter, *found.rivals)}
    more = {**{each.system: {} for each in found.likelier}, **more}
    notes = {each.system: each.note for each in (found.adapter, *found.rivals)}
    for each in found.likelier:
        more[each.system][LIKELIER] = mean(each.right, spec=spec, groups=groups, bounds=SHARE)
    mine, warnings = more[found.adapter.system], list[str]()
    if found.changes is not None:
        chosen, rejected = (mean_change(found.changes[:, side], spec, groups) for side in (0, 1))
        mine |= {CHOSEN_CHANGE: chosen, REJECTED_CHANGE: rejected}
        warnings += displacement(chosen, rejected, found.against)
    mine[LEAD] = mean_change(found.adapter.scores, spec, groups)
    known = {system.name for system in report.systems}
    systems = [
        replace(
            system, metrics={**more.get(system.name, {}), **system.metrics}, note=_joined(notes.get(system.name), system.note)
        )
        for system in report.systems
    ]
    others = [(name, metrics) for name, metrics in more.items() if name not in known]
    systems += [SystemResult(name, "floor", metrics, notes.get(name, "")) for name, metrics in others]
    compared = [compare_preferences(found.adapter, rival, alike, spec) for rival in found.rivals]
    mine_by = found.likelier[0] if found.likelier else found.adapter
    by_likelihood = [
        compare_values(
            (mine_by.system, other.system), LIKELIER, (mine_by.right, other.right), spec, groups=groups, bounds=(-1, 1)
        )
        for other in found.likelier[1:] if found.by_reward
    ]  # fmt: skip
    beside = [one[1] for one in compared if len(one) > 1]
    comparisons = (*(one[0] for one in compared), *beside, *by_likelihood, *report.comparisons)
    warnings += given_away(comparisons, more.get(DIFFERENCE, {}).get(PREFERRED))
    reliabilities = () if found.beta is None else (_reliability(found.adapter, found.beta, spec),)
    return replace(
        report,
        task="preference",
        systems=tuple(systems),
        comparisons=comparisons,
        verdict=with_likelihood(verdict_of(comparisons), by_likelihood),
        reliabilities=reliabilities,
        rows_of=len(found.adapter.scores),
        warnings=(*warnings, *report.warnings),
    )


def with_likelihood(verdict: Verdict | None, compared: Sequence[Comparison]) -> Verdict | None:
    """The verdict with what likelihood says: a reward may rise while the likelier answers stay what they were."""
    if verdict is None or not compared:
        return verdict
    one = compared[0]
    said = {"better": ". It finds the chosen answer likelier in more pairs than its base: ",
            "worse": ". But it finds the chosen answer likelier in fewer pairs than its base: "}  # fmt: skip
    text = said.get(one.verdict, ". It is not shown to find the chosen answer likelier in more pairs than its base: ")
    words = metric_words(one.metric)
    phrase = Phrase(f"{text}{words.change(one.difference.value)}", words.ends(one.difference, signs=True))
    tone = verdict.tone if one.verdict == "better" or verdict.tone != "better" else "mixed"
    return Verdict((*verdict.phrases, phrase), tone)


def given_away(comparisons: Sequence[Comparison], by_words: Estimate | None) -> list[str]:
    """A warning if the answers without their prompts say as well which one was chosen; `by_words` is the share by TF-IDF."""
    against = next((one for one in comparisons if one.right == DIFFERENCE and one.metric == PREFERRED), None)
    if by_words is None or against is None or against.verdict == "better" or by_words.low <= 0.5:
        return []
    return [
        "The answers give themselves away: TF-IDF, which never sees the prompts, prefers the chosen answer in "
        f"{percent(by_words.value, 0)} of the pairs. The adapter may have learned no more than their words. "
        "Choose pairs whose answers differ by the prompt."
    ]


def displacement(chosen: Estimate, rejected: Estimate, against: str) -> list[str]:
    """A warning if the chosen answers became less likely than under `against`; the mean changes are in nats a token."""
    if chosen.high >= 0:
        return []
    return [
        f"The chosen answers became less likely than under {against}, by {signed(chosen.value)} nats a token "
        f"({span(chosen, signs=True)}), the rejected ones by {signed(rejected.value)}. It learned what to "
        "avoid more than what to write: read its replies. preference.sft_weight above 0 keeps the chosen answers likely."
    ]


def _joined(*notes: str | None) -> str:
    return "; ".join(note for note in notes if note)


def _reliability(pairs: PairPreferences, beta: float, spec: EvaluateSpec) -> Reliability:
    """How often the adapter is right where it is sure: its probability that the chosen answer is preferred is σ(β · score)."""
    confidence = 1 / (1 + np.exp(-beta * np.abs(pairs.scores)))
    return Reliability(pairs.system, "adapter", reliability(confidence, pairs.scores > 0, spec=spec))
