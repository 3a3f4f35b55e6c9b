"""Device and dtype: what auto means here, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models import placement
from lorakeet.models.placement import device_for, dtype_for, narrow_for, planned_on, products_for, text_dtype_for, why_not_cuda
from lorakeet.models.spec import ModelSpec

CPU = torch.device("cpu")


def test_a_named_dtype_and_device_are_taken() -> None:
    assert dtype_for("float16", CPU) == torch.float16
    assert device_for("cpu") == CPU
    assert products_for(ModelSpec(products="float32"), torch.bfloat16, CPU) == torch.float32


@pytest.mark.parametrize(("features", "expected"), [({"avx512_bf16": True}, torch.bfloat16), ({"avx512_f": True}, torch.float32)])
def test_auto_takes_bfloat16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert dtype_for("auto", CPU) == expected


def test_auto_device_exists() -> None:
    torch.zeros(1, device=device_for("auto"))


def test_auto_products_are_the_stored_dtype_or_float32() -> None:
    assert products_for(ModelSpec(), torch.bfloat16, CPU) in (torch.bfloat16, torch.float32)
    assert products_for(ModelSpec(), torch.float32, CPU) == torch.float32


@pytest.mark.parametrize("name", ["gpu", "xla", "meta"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.device is '{name}'; expected auto, cpu"):
        device_for(name)


def test_devices_that_are_not_here() -> None:
    with pytest.raises(EnvironmentProblem, match=r"model.device is 'cuda:63'"):
        device_for("cuda:63")


def test_a_plan_may_be_about_a_cuda_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planned_on("cuda:1") == torch.device("cuda", 1) and planned_on("cuda").type == "cuda"
    assert planned_on("auto") == planned_on("cpu") == CPU
    assert dtype_for("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda"):
        planned_on("cuda:x")


def test_text_is_float16_on_gpus_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, found in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert text_dtype_for("auto", card) == found and text_dtype_for("float32", card) == torch.float32
    assert dtype_for("auto", card) == torch.float32, "of pictures"
    assert text_dtype_for("auto", CPU) == dtype_for("auto", CPU)


def test_16_bits_are_bfloat16_but_for_gpus_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert narrow_for(None) == narrow_for(CPU) == narrow_for(card) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, name in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert narrow_for(card) == name and narrow_for(CPU) == "bfloat16"


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")


@pytest.mark.usefixtures("old_card")
def test_a_card_that_is_too_old_is_refused_by_name_and_passed_over_with_a_word() -> None:
    with pytest.raises(EnvironmentProblem, match=r"'cuda', but Tesla V100 has compute capability 7\.0; expected 7\.5.* to cpu"):
        device_for("cuda")
    assert device_for("auto").type != "cuda" and "Tesla V100 has compute" in why_not_cuda("auto")
    assert why_not_cuda("cpu") == "", "the user has chosen"


def test_a_gpu_that_torch_has_no_code_for_is_no_gpu_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(placement, "unusable", lambda number: f"torch has no code for GPU {number}")
    with pytest.raises(EnvironmentProblem, match=r"'cuda', but torch has no code for GPU 0\. Set model\.device to cpu"):
        device_for("cuda")
    assert device_for("auto").type != "cuda"
    assert why_not_cuda("auto").startswith("Training runs on the CPU: torch has no code for GPU 0. Set model.device")


def test_no_cuda_is_said_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for why, words in (("A GPU is here.", r"sees 0 CUDA devices here\. A GPU is here\."), ("", "use model.device auto")):
        monkeypatch.setattr(placement, "unused_gpus", lambda why=why: why)
        with pytest.raises(EnvironmentProblem, match=words):
            device_for("cuda")
        assert why_not_cuda("auto") == (f"Training runs on the CPU. {why}" if why else "")
