"""What a run on pictures will hold, against what it holds, and how a budget is kept or refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.kinds.images import plan as image_forecast
from lorakeet.kinds.images.model.from_config import ShapeImageModel, image_model_from_config, shapes_of_images
from lorakeet.kinds.images.model.shapes import Shapes
from lorakeet.kinds.images.plan import (
    ENCODE,
    ImageRehearsal,
    Pictures,
    fit_images,
    forecast_images,
    machine_of,
    rehearse_images,
    ways,
)
from lorakeet.kinds.images.spec import DiffusionSpec
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.free import MARGIN
from lorakeet.models.spec import ModelSpec
from lorakeet.planning import fit
from lorakeet.planning.rehearse_text import BEGIN, CHECKPOINT, EVALUATE, FINAL, STEP, NotPlanned
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.spec import TrainSpec
from tiny.image_runs import image_config, image_run
from tiny.made_up_card import card


@pytest.fixture(autouse=True)
def heap_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order to the C library would outlast the test."""
    monkeypatch.setattr(fit, "return_freed_memory", lambda: True)


@pytest.mark.slow
def test_a_budget_is_kept_reported_and_certified_with_one_base(tiny_sd_folder: Path, tmp_path: Path) -> None:
    found = image_run(tiny_sd_folder, tmp_path, memory__budget="8GiB", diffusion__seeds=0, train__steps=2)
    assert found.report is not None
    [whole] = [use for use in found.report.memory if use.what.endswith("evaluation and certificate")]
    [against] = [use for use in found.report.memory if use.what.endswith("against memory.budget")]
    assert whole.planned is not None and against.planned == 8 * 2**30
    certificate = read_certificate(found.run.certificate)
    names = [check.name for check in certificate.checks]
    assert certificate.passed and names == ["adapter on disk", "frozen weights", "trained = saved = loaded"]
    assert found.to_mapping()["memory"]["peak"] == whole.planned


@pytest.mark.slow
def test_what_takes_less_is_chosen_and_said(tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = image_config(tiny_sd_folder, tmp_path, memory__budget="1GiB")
    monkeypatch.setattr(image_forecast, "image_runtime_bytes", lambda config, dtype: 0)
    monkeypatch.setattr(image_forecast, "INTERVALS", 0)
    machine, shapes = machine_of(config, returning=True), shapes_of_images(config.model, print)
    peaks = [forecast_images(other, shapes, machine).peak for _, other in ways(config)]
    assert len(peaks) == 3 and peaks[0] > peaks[1] >= peaks[2]
    said: list[str] = []
    between = image_config(tiny_sd_folder, tmp_path, memory__budget=f"{(peaks[0] + peaks[1]) / 2e6:.3f}MB")
    chosen, _ = fit_images(between, said.append)
    assert chosen.diffusion.at_once == 1 and not chosen.diffusion.checkpointing and "at_once 1" in said[-1]
    with pytest.raises(ConfigError, match=r"takes at least .* in phase '[\w ]+'[\s\S]*model\.quantize\.method nf4"):
        fit_images(image_config(tiny_sd_folder, tmp_path, memory__budget=f"{peaks[2] / 4e6:.3f}MB"), said.append)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, int]]:
    """As if there were a CUDA device; the limits that torch is held to."""
    found: list[tuple[torch.device, int]] = []
    monkeypatch.setattr(image_forecast, "device_for", torch.device)
    monkeypatch.setattr(image_forecast, "planned_on", torch.device)
    monkeypatch.setattr(fit, "gpu_warning", lambda device, budget: "")
    monkeypatch.setattr(fit, "limit_gpu_memory", lambda device, budget: found.append((device, budget)))
    return found


@pytest.mark.slow
def test_on_a_cuda_device_the_budget_is_that_of_its_memory(
    tiny_sd_folder: Path, tmp_path: Path, limited: list[tuple[torch.device, int]]
) -> None:
    said: list[str] = []
    place = torch.device("cuda", 0)
    on_gpu = image_config(tiny_sd_folder, tmp_path, memory__budget="8GiB", model__device="cuda:0")
    _, whole = fit_images(on_gpu, said.append)
    assert whole.gpu == place and limited.pop() == (place, 8 << 30) and "on cuda:0" in said[-1] and whole.plan is not None
    assert all(phase.kinds["runtime"] == CONTEXT for phase in whole.plan.forecast.phases)
    with pytest.raises(ConfigError, match="this run takes at least"):
        fit_images(image_config(tiny_sd_folder, tmp_path, memory__budget="500MiB", model__device="cuda:0"), said.append)
    assert limited == []
    with pytest.raises(EnvironmentProblem, match="kept on the CPU and on CUDA devices"):
        fit_images(image_config(tiny_sd_folder, tmp_path, memory__budget="8GiB", model__device="mps"), said.append)


@pytest.mark.slow
def test_without_a_budget_pictures_are_planned_within_what_is_free_on_a_card(
    tiny_sd_folder: Path, tmp_path: Path, limited: list[tuple[torch.device, int]]
) -> None:
    config, said = image_config(tiny_sd_folder, tmp_path, model__device="cuda:0"), list[str]()
    with card(8 << 30):
        same, whole = fit_images(config, said.append)
    assert same == config and whole.plan is not None and not whole.given and "free on cuda:0" in said[0]
    with card(whole.plan.peak - 1 - CONTEXT + MARGIN, taken=0):
        fewer, less = fit_images(config, said.append)
    assert fewer.diffusion.at_once == 1 and less.plan is not None and less.plan.peak < whole.plan.peak
    assert "diffusion.at_once 1" in said[-1] and "With nothing saved it would be" in said[-1]
    with card(1 << 20, taken=0), pytest.raises(ConfigError, match=r"free on cuda:0, but .* Close other programs .* Set a mem"):
        fit_images(config, said.append)
    assert limited == [], "torch may take what others leave"


def test_without_a_budget_nothing_is_planned(tiny_sd_folder: Path, tmp_path: Path) -> None:
    config = image_config(tiny_sd_folder, tmp_path)
    assert fit_images(config, print)[1].plan is None


LORA = LoraSpec(rank=4, alpha=12, target_modules=("attention",))
PICTURES = Pictures((16, 24), 2, 2, (16, 16), 2)


@pytest.fixture(scope="module")
def shapes(tiny_sdxl_folder: Path) -> Shapes:
    return shapes_of_images(ModelSpec(path=str(tiny_sdxl_folder)), print)


def built(shapes: Shapes, quantize: str = "none") -> ShapeImageModel:
    return image_model_from_config(shapes, name="tiny", dtype=torch.float32, quantize=QuantSpec(method=quantize))  # type: ignore[arg-type]


def rehearsed(shapes: Shapes, pictures: Pictures = PICTURES, quantize: str = "none", **changes: object) -> ImageRehearsal:
    diffusion = DiffusionSpec(at_once=pictures.micro_batch, **changes)  # type: ignore[arg-type]
    return rehearse_images(partial(built, shapes, quantize), LORA, TrainSpec(), diffusion, pictures)


@pytest.mark.slow
def test_what_is_kept_all_along_is_counted_exactly(shapes: Shapes) -> None:
    found, real = rehearsed(shapes), built(shapes)
    tensors = {id(t): t for t in (*real.parts.parameters(), *real.parts.buffers(), *real.vae.parameters())}
    assert found.base == sum(tensor.nbytes for tensor in tensors.values())
    encoder, vae = (sum(one.numel() for one in part.parameters()) for part in (real.parts["text_encoder"], real.vae))
    assert found.other_part >= max(encoder, vae)
    assert found.largest == max(parameter.numel() for parameter in real.denoiser.parameters())
    adapter, step = 4 * found.plan.parameters, found.peaks[STEP].kinds
    assert step["adapter"] == 2 * adapter and 2 * adapter <= step["moments"] <= 2 * adapter + 16 * len(found.plan.entries)
    assert step["gradients"] <= adapter and set(found.peaks) >= {ENCODE, BEGIN, STEP, EVALUATE, CHECKPOINT, FINAL}


@pytest.mark.slow
def test_more_pictures_keep_more_and_checkpointing_keeps_less(shapes: Shapes) -> None:
    def kept(found: ImageRehearsal) -> int:
        return found.peaks[STEP].kinds["saved activations"]

    two, one = rehearsed(shapes), rehearsed(shapes, Pictures((16, 24), 1, 2, (16, 16), 2))
    assert 1.8 * kept(one) < kept(two) < 2.2 * kept(one) and one.work.flops < two.work.flops
    assert kept(rehearsed(shapes, checkpointing=True)) < kept(two)
    assert rehearsed(shapes, text_encoder=True).plan.parameters > two.plan.parameters


@pytest.mark.slow
def test_a_gpu_has_a_shard_only_while_it_computes(shapes: Shapes) -> None:
    all_along, card = rehearsed(shapes), rehearse_images(
        partial(image_model_from_config, shapes, name="tiny", dtype=torch.float32, gpu=True), LORA, TrainSpec(),
        DiffusionSpec(at_once=2),
        PICTURES,
    )  # fmt: skip
    real = built(shapes)
    parts = {name: sum(tensor.nbytes for tensor in part.state_dict().values()) for name, part in real.parts.items()}
    vae = sum(tensor.nbytes for tensor in real.vae.state_dict().values())
    encoders = parts["text_encoder"] + parts["text_encoder_2"]
    apart = {
        name: all_along.peaks[name].bytes - card.peaks[name].bytes for name in (STEP, EVALUATE, CHECKPOINT, FINAL)
    }
    for name in (STEP, EVALUATE, CHECKPOINT):
        assert abs(apart[name] - encoders - vae) < 2000, name
    assert apart[FINAL] > encoders and all_along.peaks[ENCODE].bytes - card.peaks[ENCODE].bytes >= parts["unet"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_are_rehearsed_too(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    flow = shapes_of_images(ModelSpec(path=str(folder)), print)
    dense, packed = rehearsed(flow), rehearsed(flow, quantize="nf4")
    assert dense.plan.parameters == packed.plan.parameters > 0 and packed.base < dense.base
    assert dense.peaks[STEP].kinds["saved activations"] > 0


def test_a_model_that_cannot_be_followed_is_no_plan(shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose shapes depend on its numbers: that is said as for text, and a budget is refused with what to do."""

    def chosen_by_numbers(*_: object) -> None:
        numbers = torch.ones(4)
        numbers[numbers > 0].sum()

    monkeypatch.setattr(ShapeImageModel, "encode", chosen_by_numbers)
    with pytest.raises(NotPlanned, match="cannot be planned: what it computes depends on its numbers"):
        rehearsed(shapes)
