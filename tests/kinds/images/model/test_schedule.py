"""Schedulers of each kind against diffusers: prediction, noise, scaling of latents, and pictures of the prior."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.kinds.images.model.diffusers_import import quiet_diffusers
from lorakeet.kinds.images.model.kinds import KINDS
from lorakeet.kinds.images.model.latent_cache import drawn_prior
from lorakeet.kinds.images.model.model import ImageModel, load_image_model, scaled_latents, scaling_note, unscaled
from lorakeet.kinds.images.model.noise import check_betas, noising_of
from lorakeet.kinds.images.model.sample import Sampler, draw_latents
from lorakeet.kinds.images.model.schedule import scheduler_for, with_defaults
from lorakeet.kinds.images.spec import ImageSpec
from lorakeet.models.spec import ModelSpec
from tiny.images import diffusers
from tiny.pipelines import SCHEDULE, VAE


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_prediction_rebuilds_the_scheduler(name: str) -> None:
    scheduler = getattr(diffusers(), name).from_config(SCHEDULE)
    said: list[str] = []
    assert scheduler_for(scheduler, KINDS["sd"], "auto", "m", said.append) is scheduler
    assert scheduler_for(scheduler, KINDS["sd"], "epsilon", "m", said.append) is scheduler and not said
    found = scheduler_for(scheduler, KINDS["sd"], "v_prediction", "m", said.append)
    assert said == ["m is used as predicting v_prediction, though its scheduler says epsilon."]
    assert type(found) is type(scheduler) and scheduler.config.prediction_type == "epsilon"
    own, wanted = ({key: value for key, value in one.config.items() if key[0] != "_"} for one in (found, scheduler))
    assert own == {**wanted, "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("kind", "prediction", "message"),
    [
        ("sdxl", "flow", r"diffusion\.prediction is flow, but m \(StableDiffusionXLPipeline\) predicts no flow; use auto"),
        ("sd3", "epsilon", r"diffusion\.prediction is epsilon, but m \(StableDiffusion3Pipeline\) predicts a flow; use auto"),
        ("sdxl", "auto", r"m is a StableDiffusionXLPipeline with a FlowMatchEulerDiscreteScheduler.*such as EulerDiscrete"),
    ],
)
def test_what_does_not_go_with_the_model(kind: str, prediction: str, message: str) -> None:
    flow = diffusers().FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match=message):
        scheduler_for(flow, KINDS[kind], prediction, "m", print)


def test_a_prediction_that_is_unknown_can_be_said() -> None:
    scheduler = diffusers().DDIMScheduler(**SCHEDULE, prediction_type="sample")
    with pytest.raises(ConfigError, match=r"predicts 'sample'; expected epsilon or v_prediction.*--prediction"):
        scheduler_for(scheduler, KINDS["sd"], "auto", "m", print)
    assert scheduler_for(scheduler, KINDS["sd"], "epsilon", "m", print).config.prediction_type == "epsilon"


def test_a_flow_keeps_its_own() -> None:
    flow = diffusers().FlowMatchEulerDiscreteScheduler()
    assert all(scheduler_for(flow, KINDS["flux"], prediction, "m", print) is flow for prediction in ("auto", "flow"))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_what_a_file_leaves_out_is_its_class_s(name: str) -> None:
    found = with_defaults({"_class_name": name, "prediction_type": "v_prediction"})
    own = getattr(diffusers(), name)().config
    assert found["prediction_type"] == "v_prediction" and own["beta_start"] == found["beta_start"]
    check_betas(found)
    built = getattr(diffusers(), name)()
    for config in (found, built.config):  # LCM's betas are not DDPM's
        assert torch.equal(noising_of(config, flow=False).signal, built.alphas_cumprod.float().sqrt())


def test_edms_class_brings_no_betas_and_an_unknown_one_nothing() -> None:
    with pytest.raises(ConfigError, match="EDMEulerScheduler, has no betas"):
        check_betas(with_defaults({"_class_name": "EDMEulerScheduler"}))
    assert with_defaults({"_class_name": "MineScheduler", "x": 1}) == {"_class_name": "MineScheduler", "x": 1}


def test_diffusion_is_ddpms() -> None:
    found = noising_of(SCHEDULE, flow=False)
    alphas = diffusers().DDPMScheduler.from_config(SCHEDULE).alphas_cumprod
    assert len(found) == 1000 and torch.equal(found.times, torch.arange(1000))
    torch.testing.assert_close(found.signal**2, alphas)
    torch.testing.assert_close(found.signal**2 + found.noise**2, torch.ones(1000))
    torch.testing.assert_close(found.ratio, alphas / (1 - alphas), rtol=1e-4, atol=1e-8)
    assert found.at(torch.tensor([7])).times.tolist() == [7]


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_noise_without_betas_is_not_taken_for_ddpms(name: str) -> None:
    """DDPMScheduler.from_config would take its default, linear betas from 0.0001, without a word."""
    config = {"_class_name": name, **getattr(diffusers(), name)().config}
    with pytest.raises(ConfigError, match=f"{name}, has no betas .* put its own scheduler into"):
        noising_of(config, flow=False)


def test_betas_may_be_given_one_by_one() -> None:
    betas = [0.001 + 0.00002 * step for step in range(100)]
    found = noising_of({"trained_betas": betas, "num_train_timesteps": 100}, flow=False)
    torch.testing.assert_close(found.signal**2, torch.cumprod(1 - torch.tensor(betas), 0))


def test_a_flow_is_the_schedulers() -> None:
    for settings in ({"shift": 3.0}, {"shift": 1.0}, {"shift": 3.0, "use_dynamic_shifting": True}):
        scheduler = diffusers().FlowMatchEulerDiscreteScheduler(**settings)
        found = noising_of(scheduler.config, flow=True)
        torch.testing.assert_close(found.noise, scheduler.sigmas.flip(0))
        torch.testing.assert_close(found.times, scheduler.timesteps.flip(0))
        torch.testing.assert_close(found.signal + found.noise, torch.ones(1000))


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
