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
from lorakeet.models.recomputed import recompute_blocks
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text import tiled_loss
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.text.task import TextTask
from tiny.card_steps import LORA, SPEC, rows_behind, training_on_card
from tiny.models import LAYERS, save_tiny_llama
from tiny.simulated_card import simulated_card


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_attention_drops_is_dropped_again_where_a_block_is_computed_again(tmp_path: Path) -> None:
    """Blocks of queries draw from the host's generator, whose state a block that may drop keeps (models/recomputed)."""
    folder = save_tiny_llama(tmp_path / "model", attention_dropout=0.3)
    found = []
    for again in (False, True):
        with simulated_card():
            training = training_on_card(folder, rows_behind(6, 6), dtype="float32")
            text = training.task.text
            if again:
                assert recompute_blocks(text.model, text.family, keep=0) == LAYERS
            torch.manual_seed(5)
            loss = training.task.gradients(training.task.batches(0), 10.0).item()
            found.append((loss, {name: each.grad.cpu() for name, each in training.parameters.items() if each.grad is not None}))
    (loss, grads), (loss_again, grads_again) = found
    assert loss == loss_again and len(grads) > 10
    assert all(torch.equal(grad, grads_again[name]) for name, grad in grads.items())
