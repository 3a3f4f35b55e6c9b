from __future__ import annotations

import numpy as np
import pytest

from lorakeet.evaluate.calibration import Binned, calibration_error, reliability
from lorakeet.evaluate.spec import EvaluateSpec

QUICK = EvaluateSpec(resamples=400)


def sample(generator: np.random.Generator, n: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness of a three-label system whose logits are `temperature` times the true ones."""
    logits = generator.normal(size=(n, 3)) * 1.5
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    label = (truth.cumsum(axis=1) > generator.random((n, 1))).argmax(axis=1)
    said = np.exp(logits * temperature) / np.exp(logits * temperature).sum(axis=1, keepdims=True)
    return said.max(axis=1), said.argmax(axis=1) == label


def test_equal_mass_bins_by_hand() -> None:
    confidence = np.array([0.9, 0.5, 0.6, 0.8])
    correct = np.array([True, True, False, False])
    spec = EvaluateSpec(resamples=200, calibration_bins=2)
    assert calibration_error(confidence, correct, spec=spec).value == pytest.approx(abs(0.5 - 0.55) / 2 + abs(0.5 - 0.85) / 2)
    low, high = reliability(confidence, correct, spec=spec)
    assert (low.confidence, low.accuracy.value, low.accuracy.n) == (pytest.approx(0.55), 0.5, 2)
    assert (high.confidence, high.accuracy.value) == (pytest.approx(0.85), 0.5)


def test_constant_confidence_is_one_bin() -> None:
    correct = np.arange(100) < 65
    assert calibration_error(np.full(100, 0.65), correct, spec=QUICK).value == pytest.approx(0, abs=1e-12)
    assert len(reliability(np.full(100, 0.65), correct, spec=QUICK)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 1.4, 3.0])
def test_interval_covers_well_and_badly_calibrated_systems(temperature: float) -> None:
    generator = np.random.default_rng(0)
    many = sample(generator, 300_000, temperature)
    true = float(np.abs(Binned(*many, 10)(np.ones((1, 300_000)))).sum())
    found = [calibration_error(*sample(generator, 379, temperature), spec=QUICK) for _ in range(120)]
    assert np.mean([estimate.low <= true <= estimate.high for estimate in found]) > 0.87
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in found)


def test_bad_calibration_is_distinguished_from_good() -> None:
    generator = np.random.default_rng(1)
    assert calibration_error(*sample(generator, 1000, 1.0), spec=QUICK).low < 0.01
    assert calibration_error(*sample(generator, 1000, 3.0), spec=QUICK).low > 0.1


def test_groups_are_named_in_the_method() -> None:
    confidence, correct = sample(np.random.default_rng(2), 40, 1.0)
    assert calibration_error(confidence, correct, spec=QUICK, groups=[row // 4 for row in range(40)]).method.endswith(
        "over 10 groups"
    )


def test_an_interval_without_width_is_none() -> None:
    one = calibration_error(np.full(15, 0.5), np.ones(15, dtype=bool), spec=EvaluateSpec())
    few = calibration_error(np.array([0.7]), np.array([True]), spec=EvaluateSpec())
    assert one.why_none and few.why_none
