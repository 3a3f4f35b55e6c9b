"""Latents are scaled as diffusers' own pipelines and its SDXL training script do it, means and deviations included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakeet.models.image.diffusers_import import quiet_diffusers
from lorakeet.models.image.kinds import KINDS
from lorakeet.models.image.model import ImageModel, load_image_model
from lorakeet.models.image.sample import Sampler, draw_latents
from lorakeet.models.image.scaling import scaled_latents, scaling_note, unscaled
from lorakeet.models.spec import ModelSpec
from tiny.images import diffusers
from tiny.pipelines import VAE

MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]  # those of Playground v2.5


def load(folder: Path) -> ImageModel:
    return load_image_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda _: None)


@pytest.fixture(scope="module")
def standardised(tiny_sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL with means and deviations of latents."""
    folder = tmp_path_factory.mktemp("standardised") / "sdxl"
    shutil.copytree(tiny_sdxl_folder, folder)
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}))
    return folder


def test_sdxl_with_means_is_encoded_and_decoded_as_diffusers_does(standardised: Path) -> None:
    model = load(standardised)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = torch.tensor(MEAN).view(1, 4, 1, 1), torch.tensor(STD).view(1, 4, 1, 1)
    with torch.no_grad():
        wanted = (model.vae.encode(pixels).latent_dist.mean - mean) * 0.5 / std  # train_dreambooth_lora_sdxl.py
    assert torch.allclose(model.encode(pixels), wanted, atol=1e-5)
    latents = draw_latents(model, ["ab"], [3], Sampler(steps=2, guidance=3.0))
    noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(3))[None]
    with quiet_diffusers():
        picture = model.pipeline(
            "ab", latents=noise, num_inference_steps=2, guidance_scale=3.0, height=16, width=16, output_type="pt"
        ).images
    ours = model.decode(latents).permute(0, 3, 1, 2)
    assert (ours.float() - 255 * picture).abs().max() <= 1


def test_latents_of_other_means_are_not_taken_from_the_cache(standardised: Path, tiny_sdxl_folder: Path) -> None:
    digests = [load(standardised).autoencoder_digest, load(tiny_sdxl_folder).autoencoder_digest]
    file = standardised / "vae" / "config.json"
    kept = file.read_text()
    file.write_text(json.dumps({**json.loads(kept), "latents_mean": [0.0, *MEAN[1:]]}))
    digests.append(load(standardised).autoencoder_digest)
    file.write_text(kept)
    assert len(set(digests)) == 3 and load(standardised).autoencoder_digest == digests[0]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_only_sdxl_looks_at_means(kind: str) -> None:
    config = diffusers().AutoencoderKL(**VAE, latents_mean=MEAN, latents_std=STD, shift_factor=0.1).config
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    found = scaled_latents(latents, config, KINDS[kind])
    assert torch.allclose(unscaled(found, config, KINDS[kind]), latents, atol=1e-5)
    assert torch.allclose(found, (latents - 0.1) * 0.18215, atol=1e-6) == (kind != "sdxl")
    assert (str(MEAN) in scaling_note(config, KINDS[kind])) == (kind == "sdxl")
