"""Pictures in the loop: what a step sees, what it costs, and that a resumed run ends in the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.data.images.folder import read_album
from lorakeet.data.images.spec import ImageSpec
from lorakeet.errors import RunStopped
from lorakeet.formats.detect import read_adapter
from lorakeet.models.image.latent_cache import Captions, encode_images
from lorakeet.models.image.model import ImageModel, image_plan, load_image_model, stack
from lorakeet.models.inject import activate, inject
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from lorakeet.train import loss_scale
from lorakeet.train.image.task import ImageTask, denoising_errors
from lorakeet.train.interrupt import Interrupt
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import train
from lorakeet.train.progress import Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import DiffusionSpec, TrainSpec
from tiny.pictures import album
from tiny.pipelines import save_tiny_sd

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


@pytest.mark.parametrize(("kind", "text_encoder"), [("sd", False), ("sd", True), ("sdxl", True)])
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


@pytest.mark.parametrize(
    ("kind", "quantize", "text_encoder", "targets"),
    [
        ("sd", "nf4", True, ("all-linear", "conv")),
        ("flux", "none", False, ("attention", "mlp")),
    ],
)
def test_float16_trains_as_float32_does(
    kind: str, quantize: str, text_encoder: bool, targets: tuple[str, ...], request: pytest.FixtureRequest, cache: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder, losses = request.getfixturevalue(f"tiny_{kind}_folder"), []
    for dtype in ("float32", "float16"):
        task = new_task(
            folder, cache, dtype=dtype, quantize=quantize, targets=targets,  # type: ignore[arg-type]
            diffusion=DiffusionSpec(text_encoder=text_encoder),
        )  # fmt: skip
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
