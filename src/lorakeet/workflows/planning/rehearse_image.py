"""A run on pictures rehearsed on shapes: encoding, steps, evaluation, checkpoint and sampling, entered in a ledger.

As in workflows/planning/rehearse_text, the real code runs on tensors without memory: what is planned is what is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.data.images.folder import ImageRow
from lorakeet.data.images.spec import ImageSpec
from lorakeet.memory.ledger import Ledger, Work
from lorakeet.memory.usage import Usage
from lorakeet.models.image.kinds import ENCODERS, Conditioning, predicted
from lorakeet.models.image.latent_cache import Captions, EncodedImage
from lorakeet.models.image.model import ImageModel, image_plan
from lorakeet.models.inject import inject
from lorakeet.quant.construct import weights_in
from lorakeet.train.image.task import ImageBatch, ImageTask, errors_at
from lorakeet.train.loop import Training
from lorakeet.train.spec import DiffusionSpec, TrainSpec
from lorakeet.workflows.planning.rehearse_text import (
    BEGIN,
    CHECKPOINT,
    EVALUATE,
    FINAL,
    STEP,
    copy_for_checkpoint,
    matrix_sizes,
    on_shapes,
    silent_training,
    step_in_account,
)

ENCODE = "encode"  # pictures to latents, captions to embeddings


@dataclass(frozen=True)
class Pictures:
    """The largest pictures of a run: (height, width) in pixels of an example, and of what is drawn at once with guidance."""

    example: tuple[int, int]
    micro_batch: int
    micro_batches: int
    drawn: tuple[int, int]
    drawn_at_once: int


@dataclass(frozen=True)
class ImageRehearsal:
    """The memory and the work of a rehearsed run. `peaks` in bytes by phase, `base` the frozen pipeline, `work` that of one
    micro-batch of a step.
    """

    plan: Plan
    base: int
    peaks: Mapping[str, Usage]
    work: Work
    other_part: int  # numbers in the largest part beside the denoiser
    largest: int  # numbers in the denoiser's largest tensor, packed ones counted one by one


def rehearse_images(
    build: Callable[[], ImageModel], lora: LoraSpec, train: TrainSpec, diffusion: DiffusionSpec, pictures: Pictures
) -> ImageRehearsal:
    """Runs `build`, then encodes, trains, evaluates, saves and draws, on shapes alone.

    Raises ConfigError if `lora` does not fit, NotPlanned for a model whose arithmetic cannot be followed.
    """
    with on_shapes() as ledger:
        model = build()
        ledger.name("base", [*model.parts.parameters(), *model.parts.buffers(), *model.vae.parameters()])
        base = ledger.in_use["base"]
        others = [model.vae, *(part for name, part in model.parts.items() if name != model.kind.denoiser)]
        other_part, largest = max(map(weights_in, others)), matrix_sizes(model.denoiser)[0]
        plan = image_plan(model, lora, text_encoder=diffusion.text_encoder)
        go_through(model, plan, train, diffusion, pictures, ledger)
        ledger.close()
        step = ledger.work[STEP]
        work = Work(step.flops // pictures.micro_batches, step.written // pictures.micro_batches)
        return ImageRehearsal(plan, base, ledger.peaks, work, other_part, largest)


def go_through(
    model: ImageModel, plan: Plan, train: TrainSpec, diffusion: DiffusionSpec, pictures: Pictures, ledger: Ledger | None = None
) -> None:
    """Everything that a run does with `model`, once, on made-up pictures; entered in `ledger`, or really computed without one."""
    account = ledger or _NoLedger()
    height, width = pictures.example
    model.stage()
    with account.phase(ENCODE):
        latents = model.encode(torch.zeros(1, 3, height, width)).cpu()
        with torch.no_grad():
            embeddings = model.describe(["a picture"]).to(torch.device("cpu"), torch.float32)
    model.stage(model.kind.denoiser, *(ENCODERS if diffusion.text_encoder else ()))
    account.name("base", _on_device(model))
    with account.phase(BEGIN):
        inject(model.parts, plan, on_pair=lambda pair: account.name("adapter", [*pair.parameters(), *pair.buffers()]))
    training = _training(model, latents, embeddings, train, diffusion, pictures)
    best = step_in_account(training, account)
    task = cast(_MadeUp, training.task)
    with account.phase(EVALUATE):
        task.evaluate(diffusion.at_once)
    with account.phase(CHECKPOINT):
        copy_for_checkpoint(training)
    with account.phase(FINAL), torch.no_grad():
        model.parts.eval()
        count, place = 2 * pictures.drawn_at_once, tuple(side // model.factor for side in pictures.drawn)
        model.stage(model.kind.denoiser, "vae")  # as ImageModel.drawing does
        account.name("base", _on_device(model))
        noisy, times = torch.zeros(count, *latents.shape[1:2], *place), torch.ones(count)
        wide = (model.device, model.dtype)
        sizes = task.train[0].sizes.expand(count, 6).to(*wide)
        predicted(model.kind, model.denoiser, noisy.to(*wide), times, _repeated(embeddings, count).to(*wide), sizes)
        model.decode(noisy[:1])
    del best


def _on_device(model: ImageModel) -> list[Tensor]:
    """The frozen tensors of the parts that are where the model computes; on a GPU they are others after each `stage`."""
    every = (*model.parts.parameters(), *model.parts.buffers(), *model.vae.parameters())
    return [tensor for tensor in every if tensor.device == model.device and not tensor.requires_grad]


def _training(
    model: ImageModel, latents: Tensor, embeddings: Conditioning, train: TrainSpec, diffusion: DiffusionSpec, pictures: Pictures
) -> Training[Any]:
    """A Training on made-up pictures, ready to `step`, that writes nothing."""
    height, width = pictures.example
    row = ImageRow(Path(), "a picture", width, height, "0", 0, "made up")
    picture = EncodedImage(row, latents, torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32))
    spec = replace(train, batch_size=pictures.micro_batch * pictures.micro_batches)
    task = _MadeUp(
        model,
        [picture],
        held_out=[],
        captions=cast(Captions, _Embeddings(embeddings)),
        spec=spec,
        images=ImageSpec(),
        diffusion=diffusion,
    )
    task.cut = pictures
    return silent_training(task, spec)


class _MadeUp(ImageTask):
    """Batches whose draws need no numbers."""

    cut: Pictures

    def batches(self, step: int) -> list[ImageBatch]:
        return [self._batch(self.cut.micro_batch) for _ in range(self.cut.micro_batches)]

    def evaluate(self, count: int) -> None:
        """The errors of `count` timesteps of a picture, as held-out evaluation computes them."""
        self.model.parts.eval()
        with torch.no_grad():
            batch = self._batch(count)
            errors_at(self.model, batch, self.model.noising.at(batch.timesteps), self.captions, self.diffusion)

    def _batch(self, count: int) -> ImageBatch:
        [picture] = self.train
        latents = picture.latents.expand(count, *picture.latents.shape[1:])
        timesteps, captions = torch.full((count,), 500), (picture.row.caption,) * count
        return ImageBatch(latents, torch.randn_like(latents), timesteps, captions, picture.sizes.expand(count, 6))


class _Embeddings:
    """The embeddings of every caption."""

    def __init__(self, embeddings: Conditioning) -> None:
        self.embeddings = embeddings

    def of(self, caption: str) -> Conditioning:
        return self.embeddings


class _NoLedger(Ledger):  # type: ignore[no-untyped-call]
    """Keeps no account: what is named and bracketed is really computed."""

    def watch_gradients(self, parameters: Any) -> None:
        return None


def _repeated(embeddings: Conditioning, count: int) -> Conditioning:
    pooled = None if embeddings.pooled is None else embeddings.pooled.expand(count, *embeddings.pooled.shape[1:])
    return Conditioning(embeddings.states.expand(count, *embeddings.states.shape[1:]), pooled)
