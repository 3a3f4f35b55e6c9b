"""The preferences come first in a report, and a chosen answer that became less likely is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.compose import language_report
from lorakeet.evaluate.report.report import Report, render_html
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.kinds.preference.measure import DIFFERENCE, PairPreferences
from lorakeet.kinds.preference.report import PreferenceScores, displacement, with_preferences

COUNT, SPEC = 40, EvaluateSpec(resamples=200)


def language() -> Report:
    losses = [RowLosses(name, np.full(COUNT, loss), np.full(COUNT, 4)) for name, loss in (("adapter", 4.0), ("base", 5.0))]
    texts = [f"prompt {number}" for number in range(COUNT)]
    return language_report("title", adapter=losses[0], base=losses[1], texts=texts, truths=texts, spec=SPEC)


def scores(right: int = 38, change: float = 0.2) -> PreferenceScores:
    signs = np.where(np.arange(COUNT) < right, 1.0, -1.0)
    rivals = (PairPreferences("base", np.where(np.arange(COUNT) < 22, 1.0, -1.0)), PairPreferences("longer answer", -signs))
    changes = np.stack([change + np.linspace(-0.05, 0.05, COUNT), np.linspace(-0.6, -0.4, COUNT)], axis=1)
    adapter = PairPreferences("adapter", signs)
    return PreferenceScores(adapter, rivals, np.full((COUNT, 2), 4.0), changes, (adapter, rivals[0]), 0.1)


def test_preferences_come_before_the_loss() -> None:
    found = with_preferences(language(), scores(), SPEC)
    assert found.task == "preference" and found.verdict is not None
    assert found.verdict.sentence.startswith("The adapter beats its base by +40.0 points of the pairs")
    assert [one.metric for one in found.comparisons] == ["preferred", "preferred", "loss"]
    adapter, base, longer = found.systems
    assert {"preferred", "likelier", "lead", "chosen_change", "rejected_change", "loss"} <= adapter.metrics.keys()
    assert "preferred" in base.metrics and (longer.name, longer.role) == ("longer answer", "floor")
    assert found.reliabilities and not found.warnings
    page = render_html(found)
    assert "Chosen preferred" in page and "Chosen likelier" in page


def test_answers_that_give_themselves_away_are_a_warning() -> None:
    words = PairPreferences(DIFFERENCE, np.where(np.arange(COUNT) < 37, 1.0, -1.0))
    found = with_preferences(language(), replace(scores(), rivals=(*scores().rivals, words)), SPEC)
    assert [warning for warning in found.warnings if "prefers the chosen answer in 92 % of the pairs" in warning]
    assert found.verdict is not None and "TF-IDF of the answers alone" in found.verdict.sentence
    chance = PairPreferences(DIFFERENCE, np.where(np.arange(COUNT) % 2 == 0, 1.0, -1.0))
    assert not with_preferences(language(), replace(scores(), rivals=(*scores().rivals, chance)), SPEC).warnings


def test_an_objective_without_probabilities_has_no_calibration() -> None:
    assert not with_preferences(language(), replace(scores(), beta=None, changes=None, likelier=()), SPEC).reliabilities


def test_chosen_answers_that_became_less_likely_are_a_warning() -> None:
    (warning,) = with_preferences(language(), scores(change=-0.3), SPEC).warnings
    assert "became less likely" in warning and "−0.300" in warning and "preference.sft_weight" in warning


def test_a_change_that_touches_zero_is_none() -> None:
    touching = Estimate(-0.1, -0.3, 0.1, 10, "made up")
    assert not displacement(touching, touching, "the base")


def test_what_the_answers_are_compared_with_is_named() -> None:
    (warning,) = with_preferences(language(), replace(scores(change=-0.3), against="the base"), SPEC).warnings
    assert "became less likely than under the base, by" in warning and "the reference" not in warning
    (warning,) = with_preferences(language(), scores(change=-0.3), SPEC).warnings
    assert "became less likely than under the reference, by" in warning


def test_the_shorter_answer_is_named_in_the_headline() -> None:
    shorter = replace(scores().rivals[1], system="shorter answer")
    found = with_preferences(language(), replace(scores(), rivals=(scores().rivals[0], shorter)), SPEC).verdict
    assert found is not None and "the shorter answer" in found.sentence
