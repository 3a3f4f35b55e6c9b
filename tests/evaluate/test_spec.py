from __future__ import annotations

import dataclasses

import pytest

from lorakeet.errors import ConfigError
from lorakeet.evaluate.spec import EvaluateSpec


def test_defaults_are_allowed_and_every_field_has_help() -> None:
    EvaluateSpec().validate()
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(EvaluateSpec))


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        EvaluateSpec(confidence=1.0, resamples=10, calibration_bins=1).validate()
    message = str(caught.value)
    assert "3 problems" in message
    assert "evaluate.confidence is 1.0" in message and "resamples is 10" in message and "calibration_bins is 1" in message
