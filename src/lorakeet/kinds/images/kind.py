"""Runs on images: a diffusion model trained on pictures with captions, evaluated by its loss and its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.report import Command, Leak, Report
from lorakeet.kinds.images.assemble import ImageAssembly, assemble_images, check_settings, image_task, sampler_of
from lorakeet.kinds.images.certify import certify_images, frozen_image_digests
from lorakeet.kinds.images.data.record import image_record
from lorakeet.kinds.images.evaluate import ImageEvaluator
from lorakeet.kinds.images.model.clip_scorer import load_scorer
from lorakeet.kinds.images.model.from_config import image_model_from_config, shapes_of_images
from lorakeet.kinds.images.model.model import image_plan
from lorakeet.kinds.images.plan import ImageRunPlan, changes_that_help, forecast_images, machine_of, ways
from lorakeet.kinds.images.spec import diffusion_of, images_of
from lorakeet.kinds.images.task import ImageTask
from lorakeet.kinds.images.terminal import show_image_forecast, show_pictures
from lorakeet.kinds.protocol import NO_BOUND, Advice, Digests, PlanResult, RunKind
from lorakeet.kinds.terminal import show_advice, show_peak, show_targets
from lorakeet.kinds.trained_targets import remarks_before
from lorakeet.memory.budget import Budget, enough_for, larger_than_machine
from lorakeet.memory.ledger import Ledger
from lorakeet.models.placement import planned_on
from lorakeet.runs.output_paths import writing
from lorakeet.runs.run_folder import hashes_of_parts
from lorakeet.train.processes import Processes
from lorakeet.train.progress import Words
from lorakeet.train.run import RunFolder

# The version of how latents and conditioning are computed. 2: SDXL's latents are standardised by latents_mean and latents_std,
# mirrored cut-outs know their own offset, and T5 has no dropout while other encoders train.
ARITHMETIC = 2


@dataclass(frozen=True, kw_only=True)
class ImagePlanResult(PlanResult):
    """The forecast of a run on images; `advice` if its budget cannot be kept."""

    planned: ImageRunPlan

    def to_mapping(self) -> dict[str, Any]:
        pictures = self.planned.pictures
        return {
            **super().to_mapping(),
            "micro_batch": {"pictures": pictures.micro_batch, "size": list(pictures.example)},
            "card_tensors": self.planned.tensors,
            "choices": [{"change": item.change, "peak": item.peak} for item in self.advice],
        }


class ImageRunKind(RunKind[ImageAssembly]):
    """A diffusion model on pictures with captions."""

    words = Words("pictures", "pictures")
    peft_adapter = True
    hub_task = "text-to-image"

    def plan(
        self, config: RunConfig, console: Console, free: Budget = NO_BOUND, watch: Callable[[PlanResult], None] | None = None
    ) -> ImagePlanResult:
        check_settings(config)
        say = partial(console.print, soft_wrap=True)
        budget, device = config.memory.limit, planned_on(config.model.device)
        if device.type != "cuda" and (warning := larger_than_machine(budget)):
            say(warning)
        if scorer := diffusion_of(config).scorer:
            say(f"Not counted: diffusion.scorer {scorer}, which is in memory while the samples are evaluated.")
        shapes = shapes_of_images(config.model, say)
        machine = machine_of(config, returning=bool(budget))
        planned = forecast_images(config, shapes, machine)
        result = ImagePlanResult(config=config, device=planned.gpu or torch.device("cpu"), planned=planned, free=free)
        if watch is not None:
            watch(result)
        if result.peak > result.bound.bytes:
            last, advice = config, list[Advice]()
            for change, last in ways(config):
                if change:
                    advice.append(Advice(change, forecast_images(last, shapes, machine).peak))
            kept = len(advice)
            advice += [Advice(change, found.peak) for change, found in changes_that_help(last, shapes, machine)]
            least = min([result.peak, *(one.peak for one in advice[:kept])])
            if least > result.bound.bytes and (budget or device.type == "cuda"):  # nothing else bounds a run on a CPU
                refused = f"it needs at least {enough_for(least)}, one picture at a time and with checkpointing."
                result = replace(result, refused=(refused,))
            result = replace(result, advice=tuple(advice))
        show_image_forecast(result.planned, console)
        show_peak(result, console)
        for why in result.refused:
            say(f"finetune refuses: {why}")
        show_advice(result, console)
        show_targets(planned.plan, remarks_before(planned.plan), console)
        return result

    def assemble(
        self, config: RunConfig, console: Console, *, processes: Processes, resumed: RunFolder | None, dry_run: bool
    ) -> ImageAssembly:
        setup = assemble_images(config, console, forecast=dry_run, resumed=resumed)
        return replace(setup, remarks=tuple(remarks_before(setup.plan)))

    def summary(self, setup: ImageAssembly, *, dry_run: bool) -> dict[str, Any]:
        planned = setup.residency.plan
        return {} if planned is None else {"memory": planned.to_mapping()}

    def show(self, setup: ImageAssembly, console: Console, *, dry_run: bool) -> None:
        show_pictures(setup, console)
        if dry_run and setup.residency.plan is not None:
            show_image_forecast(setup.residency.plan, console)

    def task(self, setup: ImageAssembly, run: RunFolder, console: Console) -> ImageTask:
        return image_task(setup, partial(_draw_progress, setup, run, console) if diffusion_of(setup.config).progress else None)

    def split_record(self, setup: ImageAssembly) -> dict[str, object]:
        return image_record(setup.dataset, setup.config.data)

    def frozen_digests(self, setup: ImageAssembly) -> Digests:
        return frozen_image_digests(setup.model)

    def identity(self, setup: ImageAssembly, digests: Digests) -> dict[str, str | list[str]]:
        config = setup.config
        model = replace(config.model, config=None)  # identified by its digests
        parts = {
            "model settings": model.identity(),
            "lora settings": dataclasses.asdict(config.lora),
            "images settings": {**dataclasses.asdict(images_of(config)), "cache": ""},
            "diffusion settings": dataclasses.asdict(replace(diffusion_of(config), scorer="")),  # measures only
            "pictures": [picture.row.key for picture in (*setup.train, *setup.held_out, *setup.prior)],
            "base model": digests,
            "latents and conditioning": [setup.model.autoencoder_digest, setup.model.encoders_digest],
            "image arithmetic (this version of Lorakeet computes pictures otherwise)": ARITHMETIC,
        }
        return hashes_of_parts(parts, model)

    def evaluate(self, setup: ImageAssembly, run: RunFolder, console: Console) -> Report:
        name = diffusion_of(setup.config).scorer
        scorer = load_scorer(name) if name and diffusion_of(setup.config).seeds else None
        prior = setup.prior if images_of(setup.config).prior else ()  # samples may repeat what the base itself drew
        evaluator = replace(_evaluator(setup, console), scorer=scorer, groups=setup.dataset.groups, prior=prior)
        with writing(f"The samples in {run.path}", f"The adapter is whole. Free some space, then: {run.resume_command}"):
            report = evaluator.report(f"Fine-tuning {setup.name}", run.path / "samples")
        data = setup.dataset
        warnings = [*report.warnings, *data.remarks]
        if not data.test:
            warnings.append(
                "There are no test pictures: the checkpoint was chosen on the same held-out pictures that it is evaluated on."
            )
        found = tuple(Leak(one.evaluated, one.train, 1 - one.apart, one.action, one.caption) for one in data.alike)
        return replace(report, leaks=found, warnings=tuple(warnings))

    def certify(self, setup: ImageAssembly, run: RunFolder, before: Digests) -> Certificate:
        prompts = [picture.row.caption for picture in setup.evaluated[1][:2]]
        return certify_images(
            setup.model, run.adapter, prompts, before=before, sampler=sampler_of(setup.config),
            spec=None if setup.residency.given else setup.config.model,
        )  # fmt: skip

    def model_text(self, setup: ImageAssembly) -> str:
        model = setup.config.model
        method = model.quantize.method
        packed = "" if method == "none" else f", linear layers of the UNet in {method}"
        return f"{setup.name}, {model.dtype} weights{packed}, predicts {diffusion_of(setup.config).prediction}"

    def facts(self, setup: ImageAssembly) -> dict[str, str]:
        config = setup.config
        timesteps = diffusion_of(config).held_out_timesteps
        found, prior = super().facts(setup), ""
        if setup.prior:
            source = images_of(config).prior or f"drawn by the base of '{images_of(config).prior_caption}'"
            prior = f"; {len(setup.prior)} of the subject's class ({source}), weight {diffusion_of(config).prior_weight:g}"
        found = {name: counts + prior for name, counts in found.items()}
        found["Evaluated at"] = f"{timesteps} fixed timesteps with fixed noise for each picture, unweighted"
        if diffusion_of(config).scorer and diffusion_of(config).seeds:
            found["Samples scored by"] = f"{diffusion_of(config).scorer}; the seeds of one prompt count as one group"
        else:
            missing = "draw samples (diffusion.seeds)" if diffusion_of(config).scorer else "name a CLIP model as diffusion.scorer"
            found["Not run"] = f"prompt-following and style scores; to have them, {missing}"
        return found

    def next_commands(self, setup: ImageAssembly, run: RunFolder) -> tuple[Command, ...]:
        prompt, folder = quote(setup.evaluated[1][0].row.caption), quote(str(run.path))
        pictures = quote(f"{run.path.name}-pictures")
        to, programs = ("diffusers", "diffusers and ComfyUI") if setup.model.kind.flow else ("kohya", "ComfyUI and A1111")
        return (
            Command(f"lorakeet generate --adapter {folder} --prompt {prompt} --out {pictures}", "draw with it"),
            Command(f"lorakeet convert {folder} {quote(f'{run.path.name}.safetensors')} --to {to}", f"for {programs}"),
        )


    def usage(self, *, loads: bool) -> tuple[str, ...]:
        return ("lorakeet generate --adapter THIS_FOLDER --prompt '…' --out pictures",)

    def planned_pairs(self, config: RunConfig, say: Callable[[str], None]) -> tuple[Plan, bool]:
        shapes = shapes_of_images(config.model, say)
        with torch.random.fork_rng(devices=[]), Ledger():
            model = image_model_from_config(shapes, name=config.model.path, dtype=torch.float32, quantize=config.model.quantize)
            return image_plan(model, config.lora, text_encoder=diffusion_of(config).text_encoder), False


KIND = ImageRunKind()


def _evaluator(setup: ImageAssembly, console: Console) -> ImageEvaluator:
    return ImageEvaluator(setup.config, setup.model, setup.captions, setup.evaluated[1], setup.train, console)


def _draw_progress(setup: ImageAssembly, run: RunFolder, console: Console, step: int) -> None:
    """Draws the prompts of the run with the adapter as it is after `step` steps, into RUN/progress."""
    with writing(f"The samples in {run.path}", f"Free some space, then: {run.resume_command}"):
        _evaluator(setup, console).draw_progress(run.path / "progress" / f"step-{step:06}")
