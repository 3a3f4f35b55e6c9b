"""Families and kinds of adapters train on the simulated card: no mix of devices, and the loss and gradients of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.spec import LoraSpec
from lorakeet.memory.spill import HostSpill
from lorakeet.memory.transfer import CudaTransfer
from lorakeet.models.inject import trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text import tiled_loss
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.text.task import TextTask
from tiny.card_steps import LORA, SPEC, rows_behind
from tiny.models import save_tiny_llama
from tiny.simulated_card import simulated_card

FAMILIES = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral")
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"variant": "dora"},
    "pissa": {"start": "pissa"},
    "rslora": {"scale_rule": "alpha/sqrt(rank)"},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head", "q_proj")},
    "norms": {"extra_modules": ("norm",)},
}


def pass_on(
    device: str, folder: Path, lora: LoraSpec, *, method: str = "none", **residence: Any
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step's rows, and the gradient of every trained tensor, in fp32; `residence` is for load_text_model."""
    quantize = QuantSpec(method=method)  # type: ignore[arg-type]
    spec = ModelSpec(path=str(folder), dtype="float32", products="float32", device=device, quantize=quantize)
    text = load_text_model(spec, **residence)
    initialise_adapter(text, plan_for(text.model, lora, text.family), seed=0)
    parameters = trained_parameters(text.model)
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            draw = torch.Generator().manual_seed(number)
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=draw)).to(parameter.device))
    task = TextTask(text, rows_behind(6, 6), held_out=(), spec=replace(SPEC, micro_tokens=40 if residence else 80), together=2)
    if text.streamed is not None and isinstance(text.streamed.stream.transfer, CudaTransfer):
        task.spill = HostSpill(text.streamed.stream.transfer)
    batches = task.batches(0)
    total = task.gradients(batches, 10.0)
    assert not residence or len(batches) > 2, "several that go together, and others"
    return total.item(), {name: parameter.grad.cpu() for name, parameter in parameters.items() if parameter.grad is not None}


def require_equal(folder: Path, lora: LoraSpec, method: str = "none", **residence: Any) -> None:
    """`residence` is that on the card."""
    expected, theirs = pass_on("cpu", folder, lora, method=method)
    with simulated_card():
        found, mine = pass_on("cuda", folder, lora, method=method, **residence)
    assert found == pytest.approx(expected, rel=1e-5)
    assert mine.keys() == theirs.keys()
    for name, grad in mine.items():
        assert (grad - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_gradients_of_the_cpu(family: str, tmp_path: Path) -> None:
    require_equal(save_tiny_llama(tmp_path / family, family=family), LORA)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_has_the_gradients_of_the_cpu(variant: str, tiny_llama_folder: Path) -> None:
    require_equal(tiny_llama_folder, replace(LORA, **VARIANTS[variant]))


@pytest.mark.parametrize(
    ("method", "lora", "ends"),
    [("none", LORA, False), ("none", replace(LORA, extra_modules=("norm",)), False), ("nf4", LORA, False), ("none", LORA, True)],
    ids=["head comes", "last norm trained", "nf4", "head stays"],
)
def test_blocks_head_and_inputs_that_come_and_go_give_the_gradients_of_the_cpu(
    method: str, lora: LoraSpec, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_loss, "TILE", 48)
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=False)
    require_equal(folder, lora, method, store=tmp_path / "store", slots=2, ends=ends)
