"""Pictures that the base draws of a kind: once, and the same ones."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakeet.data.images.spec import ImageSpec
from lorakeet.models.image.model import load_image_model
from lorakeet.models.image.prior import drawn_prior
from lorakeet.models.image.sample import Sampler, draw_latents
from lorakeet.models.spec import ModelSpec
from tiny.images import diffusers

SAMPLER = Sampler(steps=2, guidance=3.0)


def test_they_are_drawn_once_from_seeds(tiny_sd_folder: Path, tmp_path: Path) -> None:
    model = load_image_model(ModelSpec(path=str(tiny_sd_folder), dtype="float32", device="cpu"), say=lambda _: None)
    spec = ImageSpec(prior_caption="a box", prior_count=3, cache=str(tmp_path))
    said: list[str] = []
    first = drawn_prior(model, spec, SAMPLER, say=said.append)
    again = drawn_prior(model, spec, SAMPLER, say=said.append)
    assert len(said) == 1 and "samples 3 images of 'a box'" in said[0]
    wanted = draw_latents(model, ["a box"] * 3, [0, 1, 2], SAMPLER)
    for number, (one, other) in enumerate(zip(first, again, strict=True)):
        assert torch.equal(one.latents[0], wanted[number]) and torch.equal(one.latents, other.latents)
        assert one.row.key == other.row.key and one.row.caption == "a box" and one.sizes.tolist() == [[16, 16, 0, 0, 16, 16]]
    assert len({one.row.key for one in first}) == 3
    drawn_prior(model, spec, Sampler(steps=1, guidance=3.0), say=said.append)
    assert len(said) == 2


def test_another_scheduler_draws_anew(tiny_sd_folder: Path, tmp_path: Path) -> None:
    model = load_image_model(ModelSpec(path=str(tiny_sd_folder), dtype="float32", device="cpu"), say=lambda _: None)
    spec = ImageSpec(prior_caption="a box", prior_count=1, cache=str(tmp_path))
    config = model.pipeline.scheduler.config
    found = []
    for scheduler in (model.pipeline.scheduler, diffusers().EulerDiscreteScheduler.from_config(config),
                      diffusers().DDIMScheduler.from_config(config, timestep_spacing="trailing")):  # fmt: skip
        model.pipeline.scheduler = scheduler
        found += drawn_prior(model, spec, SAMPLER, say=print)
    assert len({one.row.key for one in found}) == 3 and not torch.equal(found[0].latents, found[1].latents)
