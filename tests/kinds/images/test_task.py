"""Pictures in the loop: what a step sees, what it costs, and that a resumed run ends in the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.errors import RunStopped
from lorakeet.formats.detect import read_adapter
from lorakeet.kinds.images.data.folder import read_album
from lorakeet.kinds.images.model.latent_cache import Captions, encode_images
from lorakeet.kinds.images.model.model import ImageModel, image_plan, load_image_model, stack
from lorakeet.kinds.images.model.noise import Noising, noising_of
from lorakeet.kinds.images.spec import DiffusionSpec, ImageSpec
from lorakeet.kinds.images.task import ImageTask, add_noise, denoising_errors, draw, errors_of, fixed_draws, target_of, weights_of
from lorakeet.models.inject import activate, inject
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from lorakeet.train import loss_scale
from lorakeet.train.interrupt import Interrupt
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import train
from lorakeet.train.progress import Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from tiny.images import diffusers
from tiny.pictures import album
from tiny.pipelines import SCHEDULE, save_tiny_sd

TRAIN = TrainSpec(steps=6, batch_size=3, learning_rate=3e-3, seed=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    album(folder / "wide", 5, size=(24, 32))
    album(folder / "square", 7, first=5)
    return folder


def new_task(
    folder: Path, cache: Path, *, spec: TrainSpec = TRAIN, diffusion: DiffusionSpec | None = None, dropout: float = 0.0,
    targets: tuple[str, ...] = ("attention", "conv"), dtype: Literal["float32", "float16"] = "float32", quantize: str = "none",
) -> ImageTask:  # fmt: skip
    diffusion = diffusion or DiffusionSpec()
    held = ModelSpec(path=str(folder), dtype=dtype, device="cpu", quantize=QuantSpec(method=quantize))  # type: ignore[arg-type]
    model: ImageModel = load_image_model(held, say=lambda _: None)
    images = ImageSpec(cache=str(cache / "kept"), flip=True, smallest=8, resolution=16)
    rows = encode_images(model, read_album(cache, images).rows, images, say=print)
    lora = LoraSpec(rank=4, alpha=12.0, target_modules=targets, dropout=dropout)
    inject(model.parts, image_plan(model, lora, text_encoder=diffusion.text_encoder), seed=1)
    return ImageTask(
        model,
        rows[:9],
        held_out=rows[9:],
        captions=Captions(model, images, say=print),
        spec=spec,
        images=images,
        diffusion=diffusion,
    )


@pytest.mark.slow
def test_a_step_is_cut_by_size_and_its_noise_is_not(tiny_sd_folder: Path, cache: Path) -> None:
    one, four = (
        new_task(tiny_sd_folder, cache, diffusion=DiffusionSpec(at_once=n), spec=replace(TRAIN, batch_size=9)) for n in (1, 4)
    )
    apart, together = one.batches(2), four.batches(2)
    assert len(apart) == 9 and 2 < len(together) < 6
    assert all(len(batch.latents) == 1 for batch in apart)
    noises = [{float(noise.sum()) for batch in batches for noise in batch.noise} for batches in (apart, together)]
    assert noises[0] == noises[1] and len(noises[0]) == 9
    sums = []
    for task, batches in ((one, apart), (four, together)):
        total = task.gradients(batches, 9)
        sums.append(
            (float(total), [parameter.grad.clone() for parameter in task.parameters().values() if parameter.grad is not None])
        )
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-5)
    assert all(torch.allclose(left, right, atol=1e-6) for left, right in zip(sums[0][1], sums[1][1], strict=True))


def test_the_loss_counts_pictures_and_min_snr_lowers_it(tiny_sd_folder: Path, cache: Path) -> None:
    plain, weighted = (new_task(tiny_sd_folder, cache, diffusion=DiffusionSpec(min_snr_gamma=gamma)) for gamma in (0.0, 0.5))
    for left, right in zip(plain.batches(0), weighted.batches(0), strict=True):
        assert 0 < weighted.loss(right).item() < plain.loss(left).item()
        assert plain.size(left).targets == len(left.latents)


def test_pictures_of_the_kind_are_trained_beside_the_subject(tiny_sd_folder: Path, cache: Path) -> None:
    plain, task = new_task(tiny_sd_folder, cache), new_task(tiny_sd_folder, cache, diffusion=DiffusionSpec(prior_weight=0.5))
    task.prior = task.held_out_rows
    others = {picture.row.caption for picture in task.prior}
    batches = task.batches(1)
    count = sum(len(batch.latents) for batch in batches)
    assert count == 6 and task.size(batches[0]).targets == len(batches[0].latents) and others
    noises = {float(noise.sum()) for batch in plain.batches(1) for noise in batch.noise}
    own = other = 0.0
    for batch in batches:
        shares = torch.ones(len(batch.latents)) if batch.shares is None else batch.shares
        for place, share in enumerate(shares.tolist()):
            one = replace(batch, latents=batch.latents[place][None], noise=batch.noise[place][None], shares=None,
                          timesteps=batch.timesteps[place][None], captions=(batch.captions[place],),
                          sizes=batch.sizes[place][None])  # fmt: skip
            error = float(task.loss(one).detach())
            own, other = (own + error, other) if share == 2 else (own, other + error)
            assert (share == 2) == (float(one.noise.sum()) in noises)
    loss = float(task.gradients(batches, count)) / count
    assert loss == pytest.approx(own / 3 + 0.5 * other / 3, rel=1e-4)


@pytest.mark.slow
def test_the_watcher_gets_the_step(tiny_sd_folder: Path, cache: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    task = new_task(tiny_sd_folder, cache)
    task.watch = seen.append
    train(task, replace(TRAIN, evaluate_every=2), run=RunFolder.create(tmp_path / "run"))
    assert seen == [0, 2, 4, 6]


def test_checkpointing_changes_memory_not_gradients(tiny_sd_folder: Path, cache: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        task = new_task(tiny_sd_folder, cache, diffusion=DiffusionSpec(checkpointing=checkpointing))
        task.gradients(task.batches(0), 3)
        gradients.append({name: parameter.grad for name, parameter in task.parameters().items()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_text_encoders_read_in_training_what_they_read_in_judging(kind: str, request: pytest.FixtureRequest, cache: Path) -> None:
    """T5 has dropout of its own, which its pre-training needed and diffusers' pipelines never use."""
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    task = new_task(folder, cache, diffusion=DiffusionSpec(text_encoder=True), targets=("attention",))
    judged = task.model.describe(["red box", ""])
    task.loss(task.batches(0)[0])
    trained = task.model.describe(["red box", ""])
    assert torch.equal(trained.states, judged.states)
    assert (trained.pooled is None and judged.pooled is None) or torch.equal(trained.pooled, judged.pooled)  # type: ignore[arg-type]


def test_the_pairs_own_dropout_is_on_in_training_alone(tiny_sd_folder: Path, cache: Path) -> None:
    task = new_task(tiny_sd_folder, cache, dropout=0.5, targets=("attention",))
    with torch.no_grad():
        for name, parameter in task.parameters().items():
            if name.endswith(".B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    [batch, *_] = task.batches(0)
    first, second = task.loss(batch).item(), task.loss(batch).item()
    assert first != second
    one, other = task.held_out(), task.held_out()
    assert one is not None and other is not None and np.array_equal(one.sums, other.sums)
    assert task.loss(batch).item() not in (first, second)


def test_held_out_losses_are_the_same_at_any_time(tiny_sd_folder: Path, cache: Path) -> None:
    task = new_task(tiny_sd_folder, cache)
    first = task.held_out()
    torch.manual_seed(7)
    second = task.held_out()
    assert first is not None and second is not None and np.array_equal(first.sums, second.sums)
    assert (first.weights == 8).all() and len(first.sums) == 3
    activate(task.model.parts, None)
    base, _ = denoising_errors(task.model, task.held_out_rows, task.captions, task.diffusion)
    assert np.allclose(base, first.sums, rtol=1e-6)  # B is 0: the adapter is the base, on the same timesteps and noises


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text_encoder"), [("sd", False), ("sdxl", True)])
def test_training_lowers_the_loss_and_the_saved_adapter_is_the_trained_one(
    request: pytest.FixtureRequest, cache: Path, tmp_path: Path, kind: str, text_encoder: bool
) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    task = new_task(folder, cache, diffusion=DiffusionSpec(text_encoder=text_encoder), targets=("attention",))
    outcome = train(task, replace(TRAIN, steps=10), run=RunFolder.create(tmp_path / "run"))
    assert outcome.best_loss is not None and outcome.base_loss is not None and outcome.best_loss < outcome.base_loss
    held = task.adapter()
    on_disk = read_adapter(tmp_path / "run" / "adapter")
    assert any(path.startswith("text_encoder.text_model.") for path in held.pairs) == text_encoder
    assert len(on_disk.pairs) == len(held.pairs)
    for path, pair in held.pairs.items():
        other = on_disk.pairs[path if text_encoder else path.removeprefix("unet.")]
        assert torch.equal(pair.B, other.B) and pair.scale == other.scale == 3.0


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(tiny_sdxl_folder: Path, cache: Path, tmp_path: Path) -> None:
    spec = replace(TRAIN, evaluate_every=2)
    whole = new_task(tiny_sdxl_folder, cache, spec=spec, dropout=0.2)
    train(whole, spec, run=RunFolder.create(tmp_path / "whole"))

    class AfterThree(Reporter):
        def step(self, record: object) -> None:
            if record["step"] == 3:  # type: ignore[index]
                stop.requested = "Ctrl-C"

    stop = Interrupt()
    cut = RunFolder.create(tmp_path / "cut")
    with pytest.raises(RunStopped):
        train(new_task(tiny_sdxl_folder, cache, spec=spec, dropout=0.2), spec, run=cut, report=AfterThree(), interrupt=stop)
    resumed = new_task(tiny_sdxl_folder, cache, spec=spec, dropout=0.2)
    train(resumed, spec, run=cut, resume=True)
    assert all(torch.equal(value, resumed.parameters()[name]) for name, value in whole.parameters().items())
    file = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (cut.path / file).read_bytes()


@pytest.mark.slow
def test_float16_trains_as_float32_does(tiny_flux_folder: Path, cache: Path, tmp_path: Path) -> None:
    losses = []
    for dtype in ("float32", "float16"):
        task = new_task(tiny_flux_folder, cache, dtype=dtype, targets=("attention", "mlp"))  # type: ignore[arg-type]
        outcome = train(task, replace(TRAIN, steps=4), run=RunFolder.create(tmp_path / dtype))
        assert outcome.best_loss is not None and outcome.base_loss is not None and outcome.best_loss < outcome.base_loss
        assert all(parameter.dtype == torch.float32 for parameter in task.parameters().values())
        records = read_metrics(tmp_path / dtype / "metrics.jsonl")
        losses.append([record.get("loss", record.get("held_out_loss")) for record in records])
    assert outcome.skipped_steps == 0 and task.model.dtype == torch.float16
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[1] != losses[0]


def test_small_gradients_are_lost_without_the_scale(tiny_sd_folder: Path, cache: Path) -> None:
    """Those of a loss that is small: a tenth of a thousandth, as an almost perfect model has it."""
    found = {}
    for name, dtype, scale in (("right", "float32", 1.0), ("scaled", "float16", 2.0**16), ("plain", "float16", 1.0)):
        task = new_task(tiny_sd_folder, cache, dtype=dtype, targets=("attention",))  # type: ignore[arg-type]
        task.gradients(task.batches(0), 3 * 1e4 / scale)
        grads = [p.grad for path, p in task.parameters().items() if p.grad is not None and path.endswith(".B")]
        found[name] = torch.cat([grad.flatten() for grad in grads]) / scale
    scaled, plain = (
        float((found[name] - found["right"]).norm() / found["right"].norm()) for name in ("scaled", "plain")
    )  # fmt: skip
    assert scaled < 0.01 and plain > 0.1


@pytest.mark.slow
def test_a_true_overflow_is_left_out_and_a_resumed_run_ends_in_the_same_bits(
    tiny_sd_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale begins where float16 cannot follow, and comes down step by step."""
    monkeypatch.setattr(loss_scale, "START", 2.0**23)
    spec = replace(TRAIN, steps=9, evaluate_every=9, checkpoint_every=9)
    whole = new_task(tiny_sd_folder, cache, spec=spec, dtype="float16")
    outcome = train(whole, spec, run=RunFolder.create(tmp_path / "whole"))
    assert 2 <= outcome.skipped_steps <= 8 and outcome.loss_scale == 2.0 ** (23 - outcome.skipped_steps)
    assert outcome.best_loss is not None and outcome.base_loss is not None and outcome.best_loss < outcome.base_loss

    class AfterOne(Reporter):
        def step(self, record: object) -> None:
            if record["step"] == 1:  # type: ignore[index]
                stop.requested = "Ctrl-C"

    stop, cut = Interrupt(), RunFolder.create(tmp_path / "cut")
    with pytest.raises(RunStopped):
        first = new_task(tiny_sd_folder, cache, spec=spec, dtype="float16")
        train(first, spec, run=cut, report=AfterOne(), interrupt=stop)
    resumed = new_task(tiny_sd_folder, cache, spec=spec, dtype="float16")
    assert train(resumed, spec, run=cut, resume=True).skipped_steps == outcome.skipped_steps
    assert all(torch.equal(value, resumed.parameters()[name]) for name, value in whole.parameters().items())


@pytest.mark.slow
def test_a_model_that_predicts_v_is_trained_on_v(cache: Path, tmp_path: Path) -> None:
    task = new_task(save_tiny_sd(tmp_path / "v", prediction="v_prediction"), cache, targets=("attention",))
    assert task.diffusion.prediction == "v_prediction"
    [batch] = [one for one in task.batches(0) if len(one.latents)][:1]
    steps = task.model.noising.at(batch.timesteps)
    signal, share = steps.signal.view(-1, 1, 1, 1), steps.noise.view(-1, 1, 1, 1)
    wanted = signal * batch.noise - share * batch.latents
    noisy = signal * batch.latents + share * batch.noise
    with torch.no_grad():
        told = stack([task.captions.of(caption) for caption in batch.captions])
        predicted = task.model.predict(noisy, batch.timesteps, told, batch.sizes)
        loss = task.loss(batch)
    assert loss.item() == pytest.approx((predicted - wanted).square().flatten(1).mean(1).sum().item(), rel=1e-5)
    outcome = train(task, replace(TRAIN, steps=8), run=RunFolder.create(tmp_path / "run"))
    assert outcome.best_loss is not None and outcome.base_loss is not None and outcome.best_loss < outcome.base_loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_flow_is_trained_on_its_velocity(kind: str, cache: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    task = new_task(request.getfixturevalue(f"tiny_{kind}_folder"), cache, targets=("attention", "mlp"))
    assert (task.diffusion.prediction, task.diffusion.timesteps) == ("flow", "logit-normal")
    [batch] = [one for one in task.batches(0) if len(one.latents)][:1]
    steps = task.model.noising.at(batch.timesteps)
    sigmas = steps.noise.view(-1, 1, 1, 1)
    with torch.no_grad():
        told = stack([task.captions.of(caption) for caption in batch.captions])
        noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
        predicted = task.model.predict(noisy, 1000 * steps.noise, told, batch.sizes)
        loss = task.loss(batch)
    wanted = (predicted - (batch.noise - batch.latents)).square().flatten(1).mean(1).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    outcome = train(task, replace(TRAIN, steps=8), run=RunFolder.create(tmp_path / "run"))
    assert outcome.best_loss is not None and outcome.base_loss is not None and outcome.best_loss < outcome.base_loss


SHAPE = (4, 6, 5)


def drawn(step: int = 3, index: int = 1, spec: DiffusionSpec | None = None, seed: int = 0, **changes: object):  # type: ignore[no-untyped-def]
    given = {"variants": 4, "timesteps": 1000, "dropout": 0.5, **changes}
    return draw(SHAPE, spec or DiffusionSpec(), seed=seed, step=step, index=index, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_diffusers(prediction: str) -> None:
    schedule = {key: SCHEDULE[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler = diffusers().DDPMScheduler(**schedule, prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((3, *SHAPE), generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 400, 999])
    steps = noising_of(schedule, flow=False).at(timesteps)
    assert torch.allclose(add_noise(latents, noise, steps), scheduler.add_noise(latents, noise, timesteps), atol=1e-6)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    assert torch.allclose(target_of(latents, noise, steps, prediction), wanted, atol=1e-6)


def test_noise_of_a_flow_is_diffusers_and_its_target_leads_back() -> None:
    scheduler = diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = (torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(number)) for number in range(2))
    steps = noising_of(scheduler.config, flow=True).at(torch.tensor([0, 400, 999]))
    noisy = add_noise(latents, noise, steps)
    assert torch.allclose(noisy, scheduler.scale_noise(latents, steps.times, noise), atol=1e-6)
    velocity = target_of(latents, noise, steps, "flow")
    assert torch.allclose(noisy - steps.noise.view(-1, 1, 1, 1) * velocity, latents, atol=1e-5)
    assert torch.equal(weights_of(steps, "flow", 0.0), torch.ones(3))


def at(*alphas: float) -> Noising:
    shares = torch.tensor(alphas)
    return Noising(shares.sqrt(), (1 - shares).sqrt(), torch.zeros(len(alphas)))


def test_min_snr_weights_by_hand() -> None:
    steps = at(0.9, 0.5, 0.1)  # SNR 9, 1, 1/9
    assert torch.allclose(weights_of(steps, "epsilon", 5.0), torch.tensor([5 / 9, 1.0, 1.0]))
    assert torch.allclose(weights_of(steps, "v_prediction", 5.0), torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9)]))
    assert torch.equal(weights_of(steps, "epsilon", 0.0), torch.ones(3))


def test_a_timestep_of_pure_noise_has_a_finite_weight() -> None:
    nothing = at(0.0)
    assert weights_of(nothing, "epsilon", 5.0).tolist() == [1.0] and weights_of(nothing, "v_prediction", 5.0).tolist() == [0.0]


def test_errors_are_means_over_each_example() -> None:
    predicted, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert errors_of(predicted, target).tolist() == [1.0, 4.0]


def test_a_draw_depends_on_seed_step_and_place_alone() -> None:
    first = drawn()
    torch.manual_seed(99)
    again = drawn()
    assert torch.equal(first.noise, again.noise) and first.timestep == again.timestep and first.variant == again.variant
    for other in (drawn(step=4), drawn(index=2), drawn(seed=1)):
        assert not torch.equal(first.noise, other.noise)


def test_draws_cover_what_they_should() -> None:
    many = [drawn(step=step) for step in range(400)]
    timesteps = torch.tensor([one.timestep for one in many], dtype=torch.float64)
    assert timesteps.min() >= 0 and timesteps.max() < 1000 and 450 < timesteps.mean() < 550
    assert {one.variant for one in many} == {0, 1, 2, 3}
    assert 0.4 < sum(one.dropped for one in many) / 400 < 0.6
    assert not any(drawn(step=step, dropout=0.0).dropped for step in range(50))
    middle = [drawn(step=step, spec=DiffusionSpec(timesteps="logit-normal")).timestep for step in range(400)]
    assert torch.tensor(middle, dtype=torch.float64).std() < timesteps.std()


@pytest.mark.parametrize(
    ("timesteps", "density"),
    [
        ("uniform", torch.ones_like),
        ("cosmap", lambda share: 2 / (math.pi * (1 - 2 * share + 2 * share**2))),
        (
            "logit-normal",
            lambda share: torch.exp(-(torch.logit(share) ** 2) / 2) / (math.sqrt(2 * math.pi) * share * (1 - share)),
        ),
    ],
)
def test_timesteps_have_the_densities_of_the_sd3_paper(timesteps: Any, density: Callable[[torch.Tensor], torch.Tensor]) -> None:
    spec = DiffusionSpec(timesteps=timesteps)
    found = torch.tensor([drawn(step=step, spec=spec).timestep for step in range(3000)]) / 1000
    edges = torch.linspace(0, 1, 6)
    counts = torch.histc(found, bins=5, min=0, max=1) / len(found)
    middles = torch.linspace(0.0005, 0.9995, 1000)
    wanted = torch.stack([density(middles[(middles > low) & (middles < high)]).sum() for low, high in pairwise(edges)]) / 1000
    assert (counts - wanted).abs().max() < 0.03


def test_mode_prefers_the_middle_and_stays_within() -> None:
    found = torch.tensor([drawn(step=step, spec=DiffusionSpec(timesteps="mode")).timestep for step in range(1500)]) / 1000
    middle = ((found > 0.3) & (found < 0.7)).float().mean()
    assert middle > 0.5 and found.min() < 0.1 and found.max() > 0.9


def test_noise_offset_shifts_whole_channels() -> None:
    plain, shifted = drawn(), drawn(spec=DiffusionSpec(noise_offset=0.5))
    apart = (shifted.noise - plain.noise).flatten(1)
    assert torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-6) and (apart[:, 0].abs() > 0).all()


def test_fixed_draws_are_spread_and_depend_on_the_key() -> None:
    timesteps, noises = fixed_draws(SHAPE, "a", count=4, timesteps=1000)
    assert timesteps.tolist() == [125, 375, 625, 875] and noises.shape == (4, *SHAPE)
    assert torch.equal(noises, fixed_draws(SHAPE, "a", count=4, timesteps=1000)[1])
    assert not torch.equal(noises, fixed_draws(SHAPE, "b", count=4, timesteps=1000)[1])
