"""Samples depend on prompt, seed and adapters alone, also where every picture of a batch has its own adapters."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.kinds.images.model.diffusers_import import quiet_diffusers
from lorakeet.kinds.images.model.model import ImageModel, image_plan, load_image_model, put_image_adapter
from lorakeet.kinds.images.model.sample import Sampler, draw_latents, why_not_mixed
from lorakeet.models.inject import activate, adapter_of, inject, selection_of, trained_parameters
from lorakeet.models.spec import ModelSpec

SAMPLER = Sampler(steps=3, guidance=3.0)
PROMPTS, SEEDS = ["red box", "blue disc", "x"], [1, 2, 3]


@pytest.fixture(params=["sd", "sdxl"])
def model(request: pytest.FixtureRequest) -> ImageModel:
    """With adapters a (text encoders too) and b (the UNet alone) on all linear layers."""
    folder = request.getfixturevalue(f"tiny_{request.param}_folder")
    found = load_image_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda _: None)
    for number, name in enumerate("ab"):
        add(found, name, ("all-linear",), text_encoder=name == "a", seed=number)
    return found


def add(model: ImageModel, name: str, targets: tuple[str, ...], *, text_encoder: bool = False, seed: int = 0) -> None:
    inject(model.parts, image_plan(model, LoraSpec(rank=4, alpha=12.0, target_modules=targets), text_encoder=text_encoder), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in trained_parameters(model.parts, name).items():
            if key.endswith(".B"):
                parameter.normal_(0, 0.05, generator=generator)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return float((left - right).abs().max()) < 1e-5 * float(right.abs().max())


@pytest.mark.slow
def test_each_picture_has_its_own_adapters(model: ImageModel) -> None:
    alone = {}
    for name in ("a", "b", None):
        activate(model.parts, name)
        alone[name] = draw_latents(model, PROMPTS, SEEDS, SAMPLER)
    assert not close(alone["a"], alone[None]) and not close(alone["a"], alone["b"])
    mixed = draw_latents(model, PROMPTS, SEEDS, SAMPLER, mixes=[{"a": 1.0}, {}, {"b": 1.0}])
    assert close(mixed[0], alone["a"][0]) and close(mixed[1], alone[None][1]) and close(mixed[2], alone["b"][2])
    assert selection_of(model.parts).active is None
    one = Sampler(steps=3, guidance=3.0, at_once=1)
    assert close(draw_latents(model, PROMPTS, SEEDS, one, mixes=[{"a": 1.0}] * 3), alone["a"])


def test_weights_scale_and_add_up(model: ImageModel) -> None:
    some = draw_latents(model, PROMPTS[:1], [1], SAMPLER, mixes=[{"a": 0.5, "b": 2.0}])
    for name, factor in (("a", 0.5), ("b", 2.0)):
        adapter = adapter_of(model.parts, name)
        pairs = {path: replace(pair, B=pair.B * factor) for path, pair in adapter.pairs.items()}
        put_image_adapter(model, replace(adapter, pairs=pairs), f"{name}-changed")
    changed = draw_latents(model, PROMPTS[:1], [1], SAMPLER, mixes=[{"a-changed": 1.0, "b-changed": 1.0}])
    assert close(some, changed) and not close(some, draw_latents(model, PROMPTS[:1], [1], SAMPLER, mixes=[{"a": 1.0, "b": 1.0}]))


def test_a_seed_is_the_same_noise_in_every_company(model: ImageModel) -> None:
    activate(model.parts, "a")
    alone = draw_latents(model, ["blue disc"], [2], SAMPLER)
    assert close(draw_latents(model, PROMPTS, SEEDS, SAMPLER)[1:2], alone)
    assert not close(draw_latents(model, ["blue disc"], [3], SAMPLER), alone)
    unguided = Sampler(steps=3, guidance=1.0)
    assert not close(draw_latents(model, ["blue disc"], [2], unguided), alone)
    assert selection_of(model.parts).active == "a"


def test_the_pipeline_itself_draws_the_same(model: ImageModel) -> None:
    activate(model.parts, None)
    ours = draw_latents(model, ["blue disc"], [2], Sampler(steps=3, guidance=3.0, size=(16, 24)))
    noise = torch.randn((4, 8, 12), generator=torch.Generator().manual_seed(2))[None]
    with quiet_diffusers():
        theirs = model.pipeline(
            "blue disc", latents=noise, num_inference_steps=3, guidance_scale=3.0, height=16, width=24, output_type="latent"
        ).images
    assert close(ours, theirs)


def test_a_switch_takes_as_much_whatever_is_loaded(model: ImageModel) -> None:
    """Counted in calls of functions, so that no clock decides."""

    def calls() -> int:
        count = 0

        def counted(frame: FrameType, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            for name in ("b", None, "a"):
                activate(model.parts, name)
        finally:
            sys.setprofile(None)
        return count

    few = calls()
    held = adapter_of(model.parts, "b")
    for number in range(20):
        put_image_adapter(model, held, f"more{number}")
    assert calls() == few
    assert selection_of(model.parts).active == "a"


@pytest.mark.parametrize(("kind", "guidance"), [("sdxl", 5.0), ("flux", 3.5)])
def test_without_a_guidance_it_is_the_kinds(kind: str, guidance: float, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    model = load_image_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda _: None)
    plain, said, other = (
        draw_latents(model, ["ab"], [1], Sampler(steps=2, guidance=strength, size=(16, 16))) for strength in (None, guidance, 7.5)
    )
    assert torch.equal(plain, said) and not torch.equal(plain, other)


def test_what_cannot_be_mixed_is_said(tiny_sd_folder: Path) -> None:
    model = load_image_model(ModelSpec(path=str(tiny_sd_folder), dtype="float32", device="cpu"), say=lambda _: None)
    add(model, "linear", ("attention",))
    add(model, "conv", ("conv",), seed=1)
    assert why_not_mixed(model, [{"conv": 1.0}] * 2) == "" and why_not_mixed(model, [{"linear": 1.0}, {}]) == ""
    assert "a convolution has one adapter for a whole batch" in why_not_mixed(model, [{"conv": 1.0}, {}])
    with pytest.raises(ConfigError, match="one mix at a time"):
        draw_latents(model, PROMPTS[:2], [1, 2], SAMPLER, mixes=[{"conv": 1.0}, {"linear": 1.0}])
    with pytest.raises(ConfigError, match="No adapter other is on the model"):
        draw_latents(model, PROMPTS[:1], [1], SAMPLER, mixes=[{"other": 1.0}])
