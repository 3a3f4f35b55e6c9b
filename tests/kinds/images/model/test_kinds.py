"""The kinds of image models: their classes are diffusers', and FLUX's order of latents is its pipeline's."""

from __future__ import annotations

import inspect

import torch

from lorakeet.kinds.images.model.kinds import KINDS, PIPELINES, packed_latents, unpacked_latents
from tiny.images import diffusers


def test_every_kind_names_a_pipeline_of_diffusers() -> None:
    for kind in KINDS.values():
        assert hasattr(diffusers(), kind.pipeline) and PIPELINES[kind.pipeline] is kind
    assert [name for name, kind in KINDS.items() if kind.flow] == ["sd3", "flux"]


def test_the_guidance_of_samples_is_that_of_diffusers_pipelines() -> None:
    for kind in KINDS.values():
        call = inspect.signature(getattr(diffusers(), kind.pipeline).__call__)
        assert kind.guidance == call.parameters["guidance_scale"].default, kind.name
    assert KINDS["flux"].guidance == 3.5


def test_flux_lays_latents_out_as_its_pipeline_does() -> None:
    latents = torch.randn(2, 4, 6, 10)
    pipeline = diffusers().FluxPipeline
    assert torch.equal(packed_latents(latents), pipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(unpacked_latents(packed_latents(latents), 6, 10), latents)
