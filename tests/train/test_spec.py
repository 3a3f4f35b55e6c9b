"""The settings of training, on text and on images, and their rules."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from lorakeet.settings import fields_of, load
from lorakeet.train.spec import TrainSpec, learning_rate_for


def test_every_field_has_help_and_the_defaults_are_valid() -> None:
    assert all(setting.help.endswith(".") for setting in fields_of(TrainSpec))
    assert TrainSpec().validate() == []
    assert load(TrainSpec, {"steps": "50", "learning_rate": "1e-3"}, where="test") == TrainSpec(steps=50, learning_rate=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0.0}, {"epochs": math.inf}, {"steps": 0}, {"batch_size": 0}, {"micro_tokens": -1}, {"learning_rate": 0.0},
        {"learning_rate": math.nan}, {"learning_rate": 5.0}, {"b_learning_rate_ratio": 0.0}, {"weight_decay": -0.1},
        {"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"warmup_fraction": 1.0}, {"clip_norm": -1.0}, {"head_chunk": 0},
        {"evaluate_every": 0}, {"patience": -1}, {"min_improvement": -1.0}, {"checkpoint_every": 0}, {"keep_checkpoints": 0},
        {"seed": -1}, {"seed": 2**63},
    ],
)  # fmt: skip
def test_each_wrong_value_is_named(change: dict[str, float]) -> None:
    (name,) = change
    problems = dataclasses.replace(TrainSpec(), **change).validate()  # type: ignore[arg-type]
    assert len(problems) == 1
    assert problems[0].startswith(f"train.{name} is ")


def test_steps_win_over_epochs() -> None:
    assert TrainSpec(epochs=2.5).total_steps(10) == 25
    assert TrainSpec(epochs=0.01).total_steps(10) == 1
    assert TrainSpec(epochs=2.5, steps=7).total_steps(10) == 7


def test_evaluations_are_ten_a_run_and_at_least_one_an_epoch() -> None:
    assert TrainSpec(epochs=3).evaluation_interval(100) == 30
    assert TrainSpec(epochs=100).evaluation_interval(5) == 5
    assert TrainSpec(epochs=1).evaluation_interval(3) == 1
    assert TrainSpec(evaluate_every=4).checkpoint_interval(100) == 4
    assert TrainSpec(evaluate_every=4, checkpoint_every=9).checkpoint_interval(100) == 9


def test_learning_rate_rule() -> None:
    assert learning_rate_for(2000, 0.781) == pytest.approx(5e-4)
    assert learning_rate_for(576, 0.781) == pytest.approx(5e-4 * (2000 / 576) ** 0.781)
    assert learning_rate_for(4096, 0.781) < learning_rate_for(4096, 0.0775) < 5e-4


def test_the_settings_import_no_torch() -> None:
    code = "import lorakeet.train.spec, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
