"""From the settings of a run on images to all it works with: pictures, model, plan, latents; writes nothing but caches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.data.batches import StepOrder
from lorakeet.data.image_split import ImageDataset, load_images
from lorakeet.data.images import ImageRow
from lorakeet.errors import ConfigError, Problems
from lorakeet.models.image import ImageModel, image_plan, load_image_model
from lorakeet.models.image_cache import Captions, EncodedImage, encode_images
from lorakeet.models.inject import inject
from lorakeet.train.image_task import ImageTask


@dataclass(frozen=True)
class ImageAssembly:
    """What a run on images works with. `config` is resolved: dtype, device and prediction are what this machine chose."""

    config: RunConfig
    dataset: ImageDataset
    model: ImageModel
    plan: Plan
    captions: Captions
    train: list[EncodedImage]
    held_out: list[EncodedImage]
    test: list[EncodedImage]

    @property
    def judged(self) -> tuple[str, list[EncodedImage]]:
        """The pictures that the verdict is about, and what they are called."""
        return ("test", self.test) if self.test else ("held-out", self.held_out)

    @property
    def steps(self) -> int:
        order = StepOrder(len(self.train), self.config.train.batch_size, self.config.train.seed)
        return self.config.train.total_steps(order.steps_per_epoch)


def assemble_images(config: RunConfig, console: Console) -> ImageAssembly:
    """Pictures first (quick to fail), then the model, the plan and the latents; ConfigError and DataError as they arise."""
    _check_settings(config)
    say = partial(console.print, markup=False, soft_wrap=True)
    dataset = load_images(config.data, config.images)
    for remark in dataset.remarks:
        say(remark)
    for alike in dataset.alike:
        say(f"{alike.train.source} is nearly {alike.judged.source} ({alike.bits} of 256 bits differ): {alike.action}.")
    model = load_image_model(config.model, say=say)
    if model.dtype == torch.float16:
        raise ConfigError(
            "model.dtype is float16, in which small gradients become 0 without a word; train with bfloat16 or float32."
        )
    plan = image_plan(model, config.lora, text_encoder=config.diffusion.text_encoder)
    rows = (*dataset.train, *dataset.held_out, *dataset.test)
    for caption in model.cut_off(sorted({row.caption for row in rows})):
        say(f"A caption is longer than the text encoder reads, so its end does not count: {caption[:60]}…")
    encoded = _encoded(model, rows, config, console)
    first, second = len(dataset.train), len(dataset.train) + len(dataset.held_out)
    captions = Captions(model, config.images, say=say)
    return ImageAssembly(
        _resolved(config, model), dataset, model, plan, captions, encoded[:first], encoded[first:second], encoded[second:]
    )


def ready_to_train(setup: ImageAssembly) -> ImageTask:
    """The task that `train` runs: the plan's pairs are now in the model, begun from the run's seed."""
    inject(setup.model.parts, setup.plan, seed=setup.config.train.seed)
    return ImageTask(
        setup.model, setup.train, held_out=setup.held_out, captions=setup.captions, spec=setup.config.train,
        images=setup.config.images, diffusion=setup.config.diffusion,
    )  # fmt: skip


def show_image_plan(setup: ImageAssembly, console: Console) -> None:
    """How many pictures there are, of which sizes, and which matrices get which rank."""
    data = setup.dataset
    counts = f": {len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test"
    console.print(Text.assemble(("Pictures", "bold"), counts))
    factor = setup.model.factor
    sizes = sorted({(int(p.latents.shape[2]) * factor, int(p.latents.shape[3]) * factor) for p in setup.train})
    console.print(f"Examples of {', '.join(f'{width}×{height}' for height, width in sizes)} pixels")
    table = Table("module", "pairs", "rank", "scale", "parameters", title="Plan", title_justify="left")
    for row in _by_module(setup.plan):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print(Text(setup.plan.summary()))
    config = setup.config
    console.print(
        f"{setup.steps} steps of {config.train.batch_size} pictures; {config.model.dtype} weights on {config.model.device}; "
        f"the model predicts {config.diffusion.prediction}"
    )


def _by_module(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    """Table rows: a UNet has too many places to list, so modules of one name, rank and scale share a row."""
    groups: dict[tuple[str, int, float], list[int]] = {}
    for entry in plan.entries:
        parts = entry.path.split(".")
        name = ".".join([parts[0], "…", *[part for part in parts[-3:] if not part.isdigit()]])
        groups.setdefault((name, entry.rank, entry.scale), []).append(entry.parameters)
    return [
        (name, str(len(counts)), str(rank), f"{scale:g}", f"{sum(counts):,}") for (name, rank, scale), counts in groups.items()
    ]


def _check_settings(config: RunConfig) -> None:
    """ConfigError for every setting that a run on images does not have."""
    problems = Problems("These settings do not go with kind: image")
    if config.memory.budget:
        problems.add("memory.budget is set, but runs on images are not planned; leave it out. diffusion.checkpointing saves.")
    if config.lora.new_tokens or config.lora.extra_modules:
        problems.add("lora.new_tokens and lora.extra_modules are for text models; leave them out.")
    if config.ranks.choose == "auto":
        problems.add("ranks.choose is auto, which is for text models; use given.")
    for name in ("train", "held_out", "test"):
        value = getattr(config.data, name)
        if value and (value.startswith("hub:") or value.endswith(".parquet")):
            problems.add(f"data.{name} is {value}; pictures are read from a folder.")
    problems.raise_if_any()


def _encoded(model: ImageModel, rows: tuple[ImageRow, ...], config: RunConfig, console: Console) -> list[EncodedImage]:
    say = partial(console.print, markup=False, soft_wrap=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"latents of {len(rows)} pictures", total=len(rows))
        return encode_images(model, rows, config.images, say=say, progress=partial(bar.advance, task))


def _resolved(config: RunConfig, model: ImageModel) -> RunConfig:
    dtype: Any = str(model.dtype).removeprefix("torch.")
    spec = dataclasses.replace(config.model, dtype=dtype, device=str(model.device))
    diffusion = config.diffusion
    if diffusion.prediction == "auto":
        diffusion = dataclasses.replace(diffusion, prediction=model.prediction)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=spec, diffusion=diffusion)
