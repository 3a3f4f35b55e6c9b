"""A rehearsed run on pictures: what its ledger says of a tiny model, and that the real one does the same things."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.models.image.from_config import ShapeImageModel, image_model_from_config, shapes_of_images
from lorakeet.models.image.model import image_plan
from lorakeet.models.image.shapes import Shapes
from lorakeet.models.inject import adapter_names
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.spec import DiffusionSpec, TrainSpec
from lorakeet.workflows.planning.rehearse_image import ENCODE, ImageRehearsal, Pictures, go_through, rehearse_images
from lorakeet.workflows.planning.rehearse_text import BEGIN, CHECKPOINT, EVALUATE, FINAL, STEP, NotPlanned

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


def test_more_pictures_keep_more_and_checkpointing_keeps_less(shapes: Shapes) -> None:
    def kept(found: ImageRehearsal) -> int:
        return found.peaks[STEP].kinds["saved activations"]

    two, one = rehearsed(shapes), rehearsed(shapes, Pictures((16, 24), 1, 2, (16, 16), 2))
    assert 1.8 * kept(one) < kept(two) < 2.2 * kept(one) and one.work.flops < two.work.flops
    assert kept(rehearsed(shapes, checkpointing=True)) < kept(two)
    assert rehearsed(shapes, text_encoder=True).plan.parameters > two.plan.parameters


def test_a_packed_unet_takes_less(shapes: Shapes) -> None:
    dense, packed = rehearsed(shapes), rehearsed(shapes, quantize="int8")
    assert packed.base < dense.base and packed.other_part == dense.other_part and packed.largest == dense.largest


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


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_are_rehearsed_too(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    flow = shapes_of_images(ModelSpec(path=str(folder)), print)
    dense, packed = rehearsed(flow), rehearsed(flow, quantize="nf4")
    assert dense.plan.parameters == packed.plan.parameters > 0 and packed.base < dense.base
    assert dense.peaks[STEP].kinds["saved activations"] > 0


def test_moments_of_8_bits_are_counted(shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.train.optimizer.SMALLEST", 1)  # no tensor of a tiny model is large
    full, quarter = (
        rehearse_images(
            partial(built, shapes), LORA, TrainSpec(moments=moments), DiffusionSpec(at_once=2), PICTURES
        ).peaks[STEP].kinds["moments"]
        for moments in ("float32", "8bit")
    )  # fmt: skip
    assert 0.25 < quarter / full < 0.5


def test_the_same_code_runs_on_numbers(shapes: Shapes) -> None:
    model = built(shapes)
    go_through(model, image_plan(model, LORA, text_encoder=False), TrainSpec(), DiffusionSpec(at_once=2), PICTURES)
    assert adapter_names(model.parts) == ["default"]
    assert any(p.abs().max() > 0 for name, p in model.parts.named_parameters() if name.endswith(".B"))


def test_a_model_that_cannot_be_followed_is_no_plan(shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose shapes depend on its numbers: that is said as for text, and a budget is refused with what to do."""

    def chosen_by_numbers(*_: object) -> None:
        numbers = torch.ones(4)
        numbers[numbers > 0].sum()

    monkeypatch.setattr(ShapeImageModel, "encode", chosen_by_numbers)
    with pytest.raises(NotPlanned, match="cannot be planned: what it computes depends on its numbers"):
        rehearsed(shapes)
