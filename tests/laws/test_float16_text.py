"""Text in float16, as on a T4: gradients that would become 0 are those of float32, and a run learns, is certified and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakeet.core.spec import LoraSpec
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.models.inject import trained_parameters
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.train import loop
from lorakeet.train.loss_scale import START, LossScale
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask
from tiny.runs import reviews, run, write_rows
from tiny.streams import loaded, rows

FEW = {"model.products": "float32", "evaluate.drift_texts": "0", "evaluate.answers": "0", "train.steps": "8"}
MANY = 1e6  # targets of a step: each token's gradient is that much smaller


def gradients(folder: Path, dtype: str, scale: LossScale) -> dict[str, Tensor]:
    """The gradients of a pass over a few rows of a step that has many targets, as the loop computes them."""
    text = loaded(folder, dtype=dtype)
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4), text.family), seed=0)
    parameters = trained_parameters(text.model)
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    task = TextTask(text, rows(4), held_out=(), spec=TrainSpec(batch_size=4))
    task.gradients(task.batches(0), MANY / scale.value)
    scale.unscale(task.parameters())
    return {name: parameter.grad for name, parameter in task.parameters().items() if parameter.grad is not None}


def off(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """How far the gradients of all tensors are from the exact ones, relative to these."""
    difference = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return float((difference / sum(float(each.square().sum()) for each in exact.values())) ** 0.5)


def test_the_loss_scale_keeps_what_float16_would_lose(tiny_llama_folder: Path) -> None:
    exact = gradients(tiny_llama_folder, "float32", LossScale())
    scaled = gradients(tiny_llama_folder, "float16", LossScale.of(torch.float16))
    plain = gradients(tiny_llama_folder, "float16", LossScale())
    assert off(scaled, exact) < 0.02
    assert off(plain, exact) > 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(40))


@pytest.mark.slow
def test_a_run_learns_as_in_float32_and_is_certified(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    wide = run(tiny_llama_folder, data, tmp_path / "wide", {**FEW, "model.dtype": "float32"}).outcome
    found = run(tiny_llama_folder, data, tmp_path / "half", {**FEW, "model.dtype": "float16"})
    half = found.outcome
    assert wide is not None and half is not None and wide.base_loss is not None and half.best_loss is not None
    assert half.loss_scale == START and half.skipped_steps == 0 and wide.loss_scale is None
    assert half.best_loss < 0.9 * wide.base_loss and half.best_loss == pytest.approx(wide.best_loss, rel=1e-2)
    certificate = read_certificate(tmp_path / "half" / "certificate.json")
    assert certificate.passed and certificate.facts["dtype"] == "float16"
    assert "own code" in {check.name for check in certificate.checks}


@pytest.mark.slow
def test_a_step_that_overflows_is_left_out_and_halves_the_scale(
    tiny_llama_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, seen = loop.gradients.fault, list[int]()

    def once(*given: object) -> str:
        seen.append(1)
        return "the loss is not finite" if len(seen) == 2 else fault(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.gradients, "fault", once)
    outcome = run(tiny_llama_folder, data, tmp_path / "run", {**FEW, "model.dtype": "float16", "train.steps": "4"}).outcome
    assert outcome is not None and (outcome.skipped_steps, outcome.loss_scale) == (1, START / 2)
