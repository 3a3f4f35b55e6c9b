"""The settings of preference objectives: their defaults, and what is refused."""

from __future__ import annotations

import pytest

from lorakeet.kinds.preference.spec import OBJECTIVES, PreferenceSpec


def test_each_objective_has_its_own_defaults() -> None:
    assert {objective: PreferenceSpec().resolved(objective).beta for objective in OBJECTIVES} == {
        "dpo": 0.1, "ipo": 0.1, "cdpo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0,
    }  # fmt: skip
    assert PreferenceSpec().resolved("simpo").margin == 1.0 and PreferenceSpec().resolved("cdpo").label_smoothing == 0.1
    assert PreferenceSpec().resolved("orpo").sft_weight == 1.0 and PreferenceSpec().resolved("dpo").sft_weight == 0.0
    assert PreferenceSpec().resolved("ipo").length_normalised and not PreferenceSpec().resolved("dpo").length_normalised


def test_a_given_value_stays() -> None:
    assert PreferenceSpec(beta=0.5, label_smoothing=0.0).resolved("cdpo").beta == 0.5
    assert PreferenceSpec(label_smoothing=0.0).resolved("cdpo").label_smoothing == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0}, "preference.beta is 0; expected above 0"),
        ({"beta": float("nan")}, "preference.beta is nan"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"margin": -1.0}, "preference.margin is -1; expected 0 or more"),
        ({"desirable_weight": 0.0}, "preference.desirable_weight is 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(settings: dict[str, float], said: str) -> None:
    (found,) = PreferenceSpec(**settings).validate()  # type: ignore[arg-type]
    assert said in found


@pytest.mark.parametrize(
    ("objective", "settings", "said"),
    [
        ("sft", {"beta": 0.2}, "preference.beta is set, but train.objective is sft"),
        ("dpo", {"label_smoothing": 0.1}, "Take cdpo"),
        ("dpo", {"margin": 0.5}, "not simpo"),
        ("ipo", {"length_normalised": False}, "ipo divides by the length"),
        ("kto", {"length_normalised": True}, "kto does not have"),
        ("kto", {"sft_weight": 0.1}, "kto has no chosen answer"),
        ("orpo", {"desirable_weight": 2.0}, "are for kto"),
    ],
)
def test_settings_of_another_objective_are_refused(objective: str, settings: dict[str, float], said: str) -> None:
    (found,) = PreferenceSpec(**settings).conflicts(objective)  # type: ignore[arg-type]
    assert said in found


def test_settings_of_the_objective_are_taken() -> None:
    assert not PreferenceSpec(beta=0.3, length_normalised=True, sft_weight=0.1).conflicts("dpo")
    assert not PreferenceSpec(label_smoothing=0.1, margin=0.4).conflicts("simpo")
