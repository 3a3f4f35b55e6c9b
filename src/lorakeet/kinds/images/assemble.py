"""Assembles a run on images from its settings: pictures, model, plan and latents. Writes nothing but caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.split import read_split_record
from lorakeet.errors import Problems
from lorakeet.kinds.images.data.folder import fit_remarks
from lorakeet.kinds.images.data.record import recorded_images
from lorakeet.kinds.images.data.split import ImageDataset, load_images
from lorakeet.kinds.images.model.clip_scorer import load_scorer
from lorakeet.kinds.images.model.kinds import ENCODERS
from lorakeet.kinds.images.model.latent_cache import Captions, EncodedImage, Sizes, cache_in, drawn_prior, encode_images
from lorakeet.kinds.images.model.model import ImageModel, image_plan, load_image_model
from lorakeet.kinds.images.model.noise import check_betas
from lorakeet.kinds.images.model.sample import Sampler
from lorakeet.kinds.images.plan import ImageRunPlan, fit_images
from lorakeet.kinds.images.report import too_few
from lorakeet.kinds.images.spec import diffusion_of, images_of
from lorakeet.kinds.images.task import ImageTask
from lorakeet.kinds.protocol import Assembly
from lorakeet.models.inject import inject
from lorakeet.models.placement import why_not_cuda
from lorakeet.runs.residency import Residency
from lorakeet.train.progress import counted
from lorakeet.train.run import RunFolder


@dataclass(frozen=True, kw_only=True)
class ImageAssembly(Assembly):
    """What a run on images works with."""

    dataset: ImageDataset
    model: ImageModel
    captions: Captions
    train: list[EncodedImage]
    held_out: list[EncodedImage]
    test: list[EncodedImage]
    prior: list[EncodedImage]  # of the subject's class
    residency: Residency[ImageRunPlan]

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def evaluated(self) -> tuple[str, list[EncodedImage]]:
        return ("test", self.test) if self.test else ("held-out", self.held_out)


def assemble_images(
    config: RunConfig, console: Console, *, forecast: bool = False, resumed: RunFolder | None = None
) -> ImageAssembly:
    """Reads the pictures first (quick to fail), then plans memory, loads the model, and makes plan and latents.

    `forecast` plans memory without a budget too. Raises ConfigError and DataError. A `resumed` run keeps the pictures that it
    started with, and may have settings of text models (`check_settings`).
    """
    say = partial(console.print, markup=False, soft_wrap=True)
    check_settings(config, ignored=say if resumed else None)
    if why := why_not_cuda(config.model.device):
        say(why)
    recorded = _recorded(config, resumed, say)
    dataset = recorded or load_images(config.data, images_of(config), tables=cache_in(images_of(config), "tables"))
    for remark in dataset.remarks:
        say(remark)
    for alike in dataset.alike:
        say(f"{alike.train} is nearly {alike.evaluated} ({alike.words}): {alike.action}.")
    count = len(dataset.evaluation[1])
    for warning in too_few(count, len(set(dataset.groups or range(count)))):
        say(warning)
    if diffusion_of(config).scorer:
        load_scorer(diffusion_of(config).scorer)  # used at the end only, but raises now if it is missing
    config, residency = fit_images(config, say, forecast=forecast)
    model = load_image_model(config.model, prediction=diffusion_of(config).prediction, say=say)
    if not model.kind.flow:
        check_betas(model.pipeline.scheduler.config)
    problems = Problems("These settings do not go with the model")
    for message in diffusion_of(config).why_not(model.prediction):
        problems.add(message)
    problems.raise_if_any()
    plan = image_plan(model, config.lora, text_encoder=diffusion_of(config).text_encoder)
    every = (*dataset.train, *dataset.held_out, *dataset.test, *dataset.prior)
    for caption in model.cut_off(sorted({row.caption for row in every})):
        say(f"A caption is longer than the text encoder reads, so its end does not count: {caption[:60]}…")
    fit = () if recorded else fit_remarks(every, Sizes.of(model, images_of(config)).allowed)
    for remark in fit:
        say(remark)
    dataset = dataclasses.replace(dataset, remarks=(*dataset.remarks, *fit))
    with counted(console, f"latents of {len(every)} pictures", len(every)) as advance:
        encoded = iter(encode_images(model, every, images_of(config), say=say, progress=advance))
    parts = (dataset.train, dataset.held_out, dataset.test, dataset.prior)
    train, held_out, test, prior = (list(islice(encoded, len(part))) for part in parts)
    if images_of(config).prior_caption and not images_of(config).prior:
        with counted(console, "pictures of the subject's class", images_of(config).prior_count) as advance:
            prior = drawn_prior(model, images_of(config), sampler_of(config), say=say, progress=advance)
    captions = Captions(model, images_of(config), say=say)
    config = config.changed(model={"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)})
    config = config.changed(diffusion=vars(diffusion_of(config).resolved(model.prediction, model.kind.guidance)))
    return ImageAssembly(
        config=config, plan=plan, dataset=dataset, model=model, captions=captions, train=train, held_out=held_out, test=test,
        prior=prior, residency=residency,
    )  # fmt: skip


def _recorded(config: RunConfig, resumed: RunFolder | None, say: Callable[[str], None]) -> ImageDataset | None:
    """The pictures that a resumed run started with; None for a new run, and for one of a version that did not record them."""
    if resumed is None or not resumed.split.exists():
        return None
    spec, record = images_of(config), read_split_record(resumed.split)
    found = recorded_images(record, config.data, spec, tables=cache_in(spec, "tables"), run=resumed.path)
    if found is not None:
        say(f"The pictures are those of {resumed.split}; pictures added to their folders since are not part of this run.")
    return found


def image_task(setup: ImageAssembly, watch: Callable[[int], None] | None = None) -> ImageTask:
    """The task that `train` runs; adds the pairs of the plan to the model, initialised from the run's seed.

    `watch` is called with the number of steps done, as in ImageTask.
    """
    trained = diffusion_of(setup.config).text_encoder
    rows = (*setup.train, *setup.held_out, *setup.test, *setup.prior)
    for caption in sorted({"", *(picture.row.caption for picture in rows)}) if not trained else ():
        setup.captions.of(caption)  # before the text encoders are moved off the device
    setup.model.stage(setup.model.kind.denoiser, *(ENCODERS if trained else ()))
    inject(setup.model.parts, setup.plan, seed=setup.config.train.seed)
    task = ImageTask(
        setup.model, setup.train, held_out=setup.held_out, captions=setup.captions, spec=setup.config.train,
        images=images_of(setup.config), diffusion=diffusion_of(setup.config),
    )  # fmt: skip
    task.prior, task.watch = setup.prior, watch
    return task


def check_settings(config: RunConfig, *, ignored: Callable[[str], None] | None = None) -> None:
    """Raises ConfigError that names every setting of text models.

    Earlier versions accepted some of them without effect. A run that was started with them goes on with them: then `ignored` is
    given, and called with a message for each.
    """
    problems = Problems("These settings do not go with kind: image")
    if config.lora.new_tokens or config.lora.extra_modules:
        problems.add("lora.new_tokens and lora.extra_modules are for text models; leave them out.")
    if config.ranks.choose != "given":
        problems.add(f"ranks.choose is {config.ranks.choose}, which is for text models; use given.")
    if diffusion_of(config).scorer and config.memory.limit:
        problems.add("diffusion.scorer is not counted in memory.budget; leave one of them out.")
    for name, instead in TEXT_SETTINGS.items():
        part, key = name.split(".")
        given = getattr(getattr(config, part), key)
        if given != getattr(getattr(RunConfig(), part), key):
            if ignored is None:
                problems.add(f"{name} is {given}, which is for text models. {instead}")
            else:
                ignored(f"{name} is {given}, which is for text models and has no effect here; the run goes on as it started.")
    problems.raise_if_any()


TEXT_SETTINGS = {
    "data.text_column": "Give captions in NAME.txt, or as text, caption or prompt in metadata.jsonl or the table.",
    "data.label_column": "Leave it out.",
    "data.group_column": "Give the held-out pictures as a folder of their own (data.held_out).",
    "data.near_duplicates": "Set images.near_duplicates.",
    "data.supervise": "Leave it out; images.caption_dropout is the share of captions left out.",
    "train.keep_prefix_states": "Leave it out; latents and captions are always cached (images.cache).",
    "train.shard": "Leave it out; to save memory, set memory.budget or model.quantize.",
    "model.products": "Leave it out; set model.dtype.",
    "model.attention": "Leave it out; diffusers chooses torch's own.",
}


def sampler_of(config: RunConfig) -> Sampler:
    """The sampler of the settings."""
    spec, side = diffusion_of(config), images_of(config).resolution
    return Sampler(spec.sample_steps, spec.guidance, size=None if side is None else (side, side), at_once=spec.at_once)
