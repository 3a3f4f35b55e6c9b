"""The training task of images: an ImageModel with one injected adapter, encoded training and held-out pictures.

The diffusion loss compares the model's prediction for noisy latents with a target. x are the clean latents, ε is standard normal
noise, a_t and b_t are signal and noise of step t (kinds/images/model/noise):

    noisy      x_t = a_t·x + b_t·ε
    target     ε, or v = a_t·ε − b_t·x (arXiv 2202.00512), or of a flow the velocity ε − x (arXiv 2210.02747, 2403.03206)
    SNR        a_t² / b_t²
    weight     min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v      (arXiv 2303.09556); 1 for flows
    step       u·steps for u uniform; sigmoid(n) for normal n; 1 − u − 1.29·(cos²(πu/2) − 1 + u); 1 − 1/(tan(πu/2) + 1):
               "logit-normal", "mode" and "cosmap" of the SD3 paper (arXiv 2403.03206), which for flows weighs the steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.core.adapter import Adapter
from lorakeet.core.initialise import seed_for
from lorakeet.core.lowrank import LoraPair
from lorakeet.data.batches import StepOrder
from lorakeet.formats.components import with_components, without_component
from lorakeet.formats.peft import peft
from lorakeet.kinds.images.model.latent_cache import Captions, EncodedImage
from lorakeet.kinds.images.model.model import ImageModel, stack
from lorakeet.kinds.images.model.noise import Noising
from lorakeet.kinds.images.spec import DiffusionSpec, ImageSpec
from lorakeet.models import inject
from lorakeet.train.processes import ALONE
from lorakeet.train.pruning import Pruning
from lorakeet.train.spec import TrainSpec
from lorakeet.train.task import NONE_KEPT, HeldOut, KeptTerms, Size, gradients_by_batch

MODE_SCALE = 1.29  # the best value in the SD3 paper
LEARNING_RATE = 1e-4  # what diffusers' and kohya's documentation use for LoRA on Stable Diffusion


@dataclass(frozen=True)
class ImageBatch:
    """n pictures of one size with their random draws."""

    latents: Tensor  # (n, channels, h, w)
    noise: Tensor  # the same shape
    timesteps: Tensor  # (n,): timesteps, least noise first
    captions: tuple[str, ...]
    sizes: Tensor  # (n, 6)
    shares: Tensor | None = None  # (n,): weights of their errors, if there are prior pictures


class ImageTask:
    """Trains the adapter `name`, which must have been injected into `model.parts` and be active.

    With `prior`, pictures of the subject's kind, a step has as many of them as of the subject, and its loss is the mean error of
    the subject's pictures + `diffusion.prior_weight` · that of the prior (DreamBooth, https://arxiv.org/abs/2208.12242).
    `watch` is called with the number of steps taken after each held-out evaluation.
    """

    processes = ALONE
    pruning: Pruning | None = None
    kept_terms: KeptTerms = NONE_KEPT
    prior: Sequence[EncodedImage] = ()
    watch: Callable[[int], None] | None = None

    def __init__(
        self,
        model: ImageModel,
        train: Sequence[EncodedImage],
        *,
        held_out: Sequence[EncodedImage],
        captions: Captions,
        spec: TrainSpec,
        images: ImageSpec,
        diffusion: DiffusionSpec,
        name: str = "default",
    ) -> None:
        self.model, self.train, self.held_out_rows, self.captions = model, list(train), list(held_out), captions
        self.spec, self.images, self.name = spec, images, name
        self.diffusion = diffusion.resolved(model.prediction, model.kind.guidance)
        self.taken = 0
        self.order = StepOrder(len(self.train), spec.batch_size, spec.seed)
        self.steps_per_epoch, self.dtype, self.learning_rate = self.order.steps_per_epoch, model.dtype, LEARNING_RATE
        model.parts.eval()
        named = ((path, module) for path, module in model.parts.named_modules() if f".adapters.{name}." in f"{path}.")
        self.pairs = {path: module for path, module in named if isinstance(module, LoraPair)}
        if diffusion.checkpointing:
            model.denoiser.enable_gradient_checkpointing()

    def halve(self) -> str:
        count = self.diffusion.at_once // 2
        if count < 1:
            return ""
        self.diffusion = replace(self.diffusion, at_once=count)
        return f"diffusion.at_once {count}"

    def parameters(self) -> dict[str, Parameter]:
        return inject.trained_parameters(self.model.parts, self.name)

    def fixed(self) -> dict[str, Tensor]:
        return {f"{path}.{key}": buffer for path, pair in self.pairs.items() for key, buffer in pair.named_buffers(recurse=False)}

    def batches(self, step: int) -> list[ImageBatch]:
        """The step's pictures in batches of one size, at most `at_once` each; noise does not depend on the batching."""
        self.taken = step + 1
        drawn: dict[tuple[int, ...], list[tuple[EncodedImage, Draw, float]]] = {}
        for index, (picture, share) in enumerate(self._pictures(step)):
            shape = tuple(picture.latents.shape[1:])
            chance = draw(
                shape, self.diffusion, seed=self.spec.seed, step=step, index=index, variants=len(picture.latents),
                timesteps=len(self.model.noising), dropout=self.images.caption_dropout,
            )  # fmt: skip
            drawn.setdefault(shape, []).append((picture, chance, share))
        size = self.diffusion.at_once
        return [_batch(same[at : at + size]) for same in drawn.values() for at in range(0, len(same), size)]

    def _pictures(self, step: int) -> list[tuple[EncodedImage, float]]:
        """The pictures of a step and their weights: Σ weight·error / pictures is the step's loss."""
        own = [self.train[number] for number in self.order.indices(step)]
        if not self.prior:
            return [(picture, 1.0) for picture in own]
        generator = torch.Generator().manual_seed(seed_for(self.spec.seed, f"prior of step {step}"))
        others = torch.randint(len(self.prior), (len(own),), generator=generator).tolist()
        weight = 2.0 * self.diffusion.prior_weight
        return [*((picture, 2.0) for picture in own), *((self.prior[number], weight) for number in others)]

    def size(self, batch: ImageBatch) -> Size:
        """A picture is one token and one target: the step's loss is the mean over its pictures."""
        return Size(rows=len(batch.latents), tokens=len(batch.latents), targets=len(batch.latents))

    def gradients(self, batches: Sequence[ImageBatch], targets: float) -> Tensor:
        return gradients_by_batch(self.loss, batches, targets)

    def loss(self, batch: ImageBatch) -> Tensor:
        """The sum of the weighted errors of a batch's pictures, with gradient; dropout in the pairs alone.

        The base is in evaluation mode, as in evaluation and sampling: T5's own dropout would change its captions.
        """
        for pair in self.pairs.values():
            if not pair.training:
                pair.train()
        steps = self.model.noising.at(batch.timesteps)
        weights = weights_of(steps, self.model.prediction, self.diffusion.min_snr_gamma)
        if batch.shares is not None:
            weights = weights * batch.shares
        errors = errors_at(self.model, batch, steps, self.captions, self.diffusion)
        return (errors * weights.to(errors.device)).sum()

    def held_out(self) -> HeldOut | None:
        """For each held-out picture the sum of its unweighted errors at fixed timesteps and noises, and their number."""
        if not self.held_out_rows:
            return None
        found = HeldOut(*denoising_errors(self.model, self.held_out_rows, self.captions, self.diffusion))
        if self.watch is not None:
            self.watch(self.taken)
        return found

    def adapter(self) -> Adapter:
        """The adapter's current value; paths start with the component, as in every format."""
        return with_components(inject.adapter_of(self.model.parts, self.name, base=self.model.name))

    def save(self, folder: Path) -> None:
        """Writes adapter/ in PEFT's layout; an adapter of the denoiser alone has its paths, so that PEFT can load it."""
        peft.write(without_component(self.adapter()), folder)


def denoising_errors(
    model: ImageModel,
    rows: Sequence[EncodedImage],
    captions: Captions,
    spec: DiffusionSpec,
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """For each picture, the sum of its squared errors at `spec.held_out_timesteps` fixed timesteps, and their number.

    Timesteps and noises depend on the picture alone, so that models and steps are comparable. Errors are unweighted, so that
    runs with and without min-SNR are comparable.
    """
    model.parts.eval()
    sums = np.zeros(len(rows))
    with torch.no_grad():
        for number, picture in enumerate(rows):
            latents = picture.latents[0]
            timesteps, noises = fixed_draws(
                tuple(latents.shape), picture.row.key, count=spec.held_out_timesteps, timesteps=len(model.noising)
            )
            for at in range(0, len(timesteps), spec.at_once):
                some = timesteps[at : at + spec.at_once]
                count = len(some)
                batch = ImageBatch(
                    latents.expand(count, *latents.shape), noises[at : at + count], some, (picture.row.caption,) * count,
                    picture.sizes[:1].expand(count, 6),
                )  # fmt: skip
                sums[number] += float(errors_at(model, batch, model.noising.at(some), captions, spec).double().sum())
            if progress:
                progress(1)
    return sums, np.full(len(rows), float(spec.held_out_timesteps))


def errors_at(model: ImageModel, batch: ImageBatch, steps: Noising, captions: Captions, spec: DiffusionSpec) -> Tensor:
    """The mean squared error of each picture of `batch` (n,), in fp32, at its `steps`."""
    latents, noise = batch.latents.to(model.device), batch.noise.to(model.device)
    noisy = add_noise(latents, noise, steps)
    predicted = model.predict(  # the conditioning has no name here, which would keep it until the end
        noisy,
        steps.times,
        model.describe(batch.captions) if spec.text_encoder else stack([captions.of(text) for text in batch.captions]),
        batch.sizes,
    )
    return errors_of(predicted, target_of(latents, noise, steps, model.prediction))


def _batch(drawn: Sequence[tuple[EncodedImage, Draw, float]]) -> ImageBatch:
    shares = torch.tensor([share for *_, share in drawn])
    return ImageBatch(
        latents=torch.stack([picture.latents[chance.variant] for picture, chance, _ in drawn]),
        noise=torch.stack([chance.noise for _, chance, _ in drawn]),
        timesteps=torch.tensor([chance.timestep for _, chance, _ in drawn]),
        captions=tuple("" if chance.dropped else picture.row.caption for picture, chance, _ in drawn),
        sizes=torch.stack([picture.sizes[chance.variant] for picture, chance, _ in drawn]),
        shares=None if bool((shares == 1).all()) else shares,
    )


@dataclass(frozen=True)
class Draw:
    """The random draw for one picture of one step."""

    timestep: int
    variant: int
    dropped: bool  # true if the caption is left out
    noise: Tensor  # (channels, h, w)


def draw(
    shape: tuple[int, ...],
    spec: DiffusionSpec,
    *,
    seed: int,
    step: int,
    index: int,
    variants: int,
    timesteps: int,
    dropout: float,
) -> Draw:
    """The draw for picture `index` of step `step`: a function of these and `seed` alone.

    `shape` is that of one latent, `variants` the number of crops, `timesteps` the number of timesteps.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, f"picture {index} of step {step}"))
    chance = torch.rand(3, generator=generator, dtype=torch.float64)
    position = float(chance[0])
    if spec.timesteps == "logit-normal":
        position = float(torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64)))
    elif spec.timesteps == "mode":
        position = 1 - position - MODE_SCALE * (math.cos(math.pi * position / 2) ** 2 - 1 + position)
    elif spec.timesteps == "cosmap":
        position = 1 - 1 / (math.tan(math.pi * position / 2) + 1)
    noise = torch.randn(shape, generator=generator)
    if spec.noise_offset:
        noise = noise + spec.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    return Draw(
        timestep=min(max(int(position * timesteps), 0), timesteps - 1),
        variant=min(int(chance[1] * variants), variants - 1),
        dropped=bool(chance[2] < dropout),
        noise=noise,
    )


def fixed_draws(shape: tuple[int, ...], key: str, *, count: int, timesteps: int) -> tuple[Tensor, Tensor]:
    """Evenly spread timesteps (count,) and noises (count, channels, h, w), both functions of `key`."""
    generator = torch.Generator().manual_seed(seed_for(0, f"held-out {key}"))
    spread = ((torch.arange(count, dtype=torch.float64) + 0.5) * timesteps / count).long()
    return spread, torch.randn((count, *shape), generator=generator)


def add_noise(latents: Tensor, noise: Tensor, at: Noising) -> Tensor:
    """x_t of the table above; latents and noise (n, channels, h, w), `at` the step of each."""
    return _wide(at.signal, latents) * latents + _wide(at.noise, latents) * noise


def target_of(latents: Tensor, noise: Tensor, at: Noising, prediction: str) -> Tensor:
    """The target of the model at x_t: ε, v for `v_prediction`, the velocity for `flow`. Shapes as in `add_noise`."""
    if prediction == "epsilon":
        return noise
    if prediction == "flow":
        return noise - latents
    return _wide(at.signal, latents) * noise - _wide(at.noise, latents) * latents


def weights_of(at: Noising, prediction: str, gamma: float) -> Tensor:
    """The weight (n,) of each example; all 1 where `gamma` is 0.

    Without signal (SNR 0, a schedule that ends in pure noise), ε's weight is its limit, 1.
    """
    snr = at.ratio
    if not gamma:
        return torch.ones_like(snr)
    capped = snr.clamp(max=gamma)
    if prediction == "v_prediction":
        return capped / (snr + 1)
    return torch.where(snr > 0, capped / snr.clamp(min=torch.finfo(snr.dtype).tiny), torch.ones_like(snr))


def errors_of(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each example (n,), over channels and pixels, in fp32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def _wide(factors: Tensor, like: Tensor) -> Tensor:
    return factors.to(like.device, like.dtype).view(-1, 1, 1, 1)
