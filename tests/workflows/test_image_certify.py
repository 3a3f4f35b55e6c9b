"""The certificate of a run on pictures: it passes for what was trained and fails for anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lorakeet.formats import peft
from lorakeet.formats.sd_names import without_component
from lorakeet.models.image_sample import Sampler
from lorakeet.workflows.image_certify import certify_images, image_digests, latent_check
from tiny.image_runs import image_run


def test_a_run_passes_and_what_was_changed_fails(tiny_sd_folder: Path, tmp_path: Path) -> None:
    result = image_run(tiny_sd_folder, tmp_path, diffusion__seeds=0)
    setup, run = result.setup, result.run
    model, spec = setup.model, setup.config.model
    before = image_digests(model)

    def names(**changes: object) -> list[str]:
        given = {"before": before, "spec": spec, "sampler": Sampler(guidance=3.0), **changes}
        return [check.name for check in certify_images(model, run.adapter, ["red box"], **given).checks if not check.passed]  # type: ignore[arg-type]

    assert names() == [] and names(spec=None) == []
    held = peft.read(run.adapter)
    path = next(path for path, pair in held.pairs.items() if pair.B.abs().max() > 0)
    other = replace(held, pairs={**held.pairs, path: replace(held.pairs[path], B=held.pairs[path].B * 1.5)})
    for file in run.adapter.iterdir():
        file.unlink()
    peft.write(without_component(other), run.adapter)
    assert names() == ["adapter on disk"] and names(spec=None) == ["adapter on disk"]
    with torch.no_grad():
        model.denoiser.conv_in.weight.add_(0.01)
    assert names() == ["adapter on disk", "base untouched", "frozen weights"]


def test_latents_that_differ_or_are_no_numbers_fail() -> None:
    same = torch.ones(2, 4, 8, 8)
    sides = ("a", "b")
    assert latent_check("x", same, same * (1 + 5e-5), between=sides, dtype=torch.float32).passed
    assert not latent_check("x", same, same * 1.001, between=sides, dtype=torch.float32).passed
    assert latent_check("x", same, same * 1.001, between=sides, dtype=torch.bfloat16).passed
    assert not latent_check("x", same * float("nan"), same * float("nan"), between=sides, dtype=torch.float32).passed
