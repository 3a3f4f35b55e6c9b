"""`lorakeet finetune` with kind: image: trains an adapter of a diffusion model and proves it on pictures that it never saw.

assemble (pictures, model, plan, latents) → inject → train → judge (loss, samples, memorisation) → certify → report.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.images.record import image_record
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.report import Command, Leak, MemoryUse, Report
from lorakeet.evaluate.values import encode
from lorakeet.memory.cuda import card_peak
from lorakeet.memory.measure import peak_bytes
from lorakeet.models.image.clip_scorer import load_scorer
from lorakeet.models.spec import ModelSpec
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import Outcome, train
from lorakeet.train.progress import PICTURES, reporter_for
from lorakeet.train.run import RunFolder
from lorakeet.workflows.finetuning import report as page
from lorakeet.workflows.finetuning.assemble_image import ImageAssembly, assemble_images, ready_to_train
from lorakeet.workflows.finetuning.certify_image import certify_images, image_digests
from lorakeet.workflows.finetuning.evaluate_image import ImageJudge
from lorakeet.workflows.finetuning.finish import conclude, judging
from lorakeet.workflows.finetuning.image_terminal import show_forecast, show_image_plan
from lorakeet.workflows.runs import facts
from lorakeet.workflows.runs.output_paths import writing
from lorakeet.workflows.runs.run_folder import begin_run, hashes_of_parts


@dataclass(frozen=True)
class ImageResult:
    """What a run on images gave; a dry run has no outcome."""

    setup: ImageAssembly
    run: RunFolder
    outcome: Outcome | None = None
    report: Report | None = None

    @property
    def exit_code(self) -> int:
        return 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        data = self.setup.dataset
        found: dict[str, Any] = {
            "run": str(self.run.path),
            "trained_parameters": self.setup.plan.parameters,
            "pairs": len(self.setup.plan.entries),
            "steps": self.setup.steps,
            "pictures": {"train": len(data.train), "held_out": len(data.held_out), "test": len(data.test)},
        }
        if self.setup.residency.plan is not None:
            found["memory"] = self.setup.residency.plan.to_mapping()
        if self.outcome is None or self.report is None:
            return {**found, "dry_run": True, "plan": self.setup.plan.to_mapping()}
        return {**found, "outcome": encode(self.outcome), "report": encode(self.report)}


def finetune_images(config: RunConfig, run: RunFolder, *, resume: bool, dry_run: bool, console: Console) -> ImageResult:
    """Trains, judges and certifies; everything is in the run folder. Errors as in workflows/finetune."""
    setup = assemble_images(config, console, asked=dry_run, resumed=run if resume else None)
    show_image_plan(setup, console)
    if dry_run:
        if setup.residency.plan is not None:
            show_forecast(setup.residency.plan, console)
        return ImageResult(setup, run)
    before = image_digests(setup.model)
    task = ready_to_train(setup, partial(_watch, setup, run, console) if setup.config.diffusion.progress else None)
    begin_run(run, setup.config, image_record(setup.dataset, setup.config.data), resume=resume)
    outcome = train(
        task, setup.config.train, run=run, identity=_identity(setup, before), resume=resume,
        report=reporter_for(console, words=PICTURES), budget=setup.residency.budget.limit,
    )  # fmt: skip
    with judging(run):
        report = _prove(setup, outcome, run, before, console)
    return ImageResult(setup, run, outcome, report)


# What pictures and captions become is computed otherwise where this is another number: 2 since SDXL's latents are standardised by
# latents_mean and latents_std, mirrored cut-outs are told where they lie, and T5 has no dropout while others are trained.
_ARITHMETIC = 2


def _identity(setup: ImageAssembly, digests: dict[str, str]) -> dict[str, str | list[str]]:
    """What must be equal for a run to be resumed, besides the training settings."""
    config = setup.config
    model = replace(config.model, config=None)  # known by its numbers
    images = {**dataclasses.asdict(config.images), "cache": ""}
    parts = {
        "model settings": model.identity(),
        "lora settings": dataclasses.asdict(config.lora),
        "images settings": images,
        "diffusion settings": dataclasses.asdict(replace(config.diffusion, scorer="")),  # it looks on
        "pictures": [picture.row.key for picture in (*setup.train, *setup.held_out, *setup.prior)],
        "base model": digests,
        "latents and conditioning": [setup.model.autoencoder_digest, setup.model.encoders_digest],
        "image arithmetic (this version of Lorakeet computes pictures otherwise)": _ARITHMETIC,
    }
    return hashes_of_parts(parts, model)


def _watch(setup: ImageAssembly, run: RunFolder, console: Console, step: int) -> None:
    """Draws the run's prompts as the adapter is after `step` steps, into RUN/progress."""
    judge = ImageJudge(setup.config, setup.model, setup.captions, setup.judged[1], setup.train, console)
    with writing(f"The samples in {run.path}", f"Free some space, then: {run.resume_command}"):
        judge.draw_progress(run.path / "progress" / f"step-{step:06}")


def _prove(setup: ImageAssembly, outcome: Outcome, run: RunFolder, before: dict[str, str], console: Console) -> Report:
    """Judges, certifies and reports; VerificationFailed when the certificate fails."""
    _, pictures = setup.judged
    named = setup.config.diffusion.scorer
    scorer = load_scorer(named) if named and setup.config.diffusion.seeds else None
    judge = ImageJudge(
        setup.config, setup.model, setup.captions, pictures, setup.train, console, scorer=scorer, groups=setup.dataset.groups,
        prior=setup.prior if setup.config.images.prior else (),  # the base's own drawings it may repeat
    )  # fmt: skip
    with writing(f"The samples in {run.path}", f"The adapter is whole. Free some space, then: {run.resume_command}"):
        measured = judge.report(f"Fine-tuning {setup.model.name}", run.path / "samples")
    prompts = [picture.row.caption for picture in pictures[:2]]
    certificate = certify_images(
        setup.model, run.adapter, prompts, before=before, sampler=judge.sampler,
        spec=setup.config.model if not setup.residency.budget else None,  # a budget has room for one base
    )  # fmt: skip
    report = _complete(measured, setup, outcome, run, certificate)
    remarks = []
    if report.memorisation is not None:
        near, count = report.memorisation, len(report.memorisation.nearest)
        remarks.append(f"{near.suspicious} of {count} samples are nearer to a training picture than any judged picture is")
    conclude(report, certificate, run, console, remarks=remarks)
    return report


def _complete(measured: Report, setup: ImageAssembly, outcome: Outcome, run: RunFolder, certificate: Certificate) -> Report:
    """`measured` with everything else that the page shows."""
    config, data, metrics = setup.config, setup.dataset, read_metrics(run.metrics)
    part, pictures = setup.judged
    alike = tuple(Leak(one.evaluated, one.train, 1 - one.apart, one.action, one.caption) for one in data.alike)
    warnings = [*measured.warnings, *data.remarks]
    if not data.test:
        warnings.append("There are no test pictures: the checkpoint was chosen on the held-out pictures that it is judged on.")
    timesteps = config.diffusion.held_out_timesteps
    return replace(
        measured,
        subtitle=f"{setup.model.name} on {Path(config.data.train).name}, judged on {len(pictures)} {part} pictures",
        created=facts.now(),
        facts=page.run_facts(
            config,
            setup.plan,
            run,
            setup.model.device,
            model=f"{setup.model.name}, {_weights(config.model)}, predicts {config.diffusion.prediction}",
            about={
                "Pictures": f"{len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test{_beside(setup)}",
                "Judged at": f"{timesteps} fixed timesteps with fixed noise for each picture, unweighted",
                **_scores(config),
            },
        ),
        curves=page.curves(metrics, outcome),
        leaks=alike,
        memory=_memory(setup, outcome),
        speed=page.speed(metrics, outcome, unit="Pictures", drawn=", each as often as it was drawn", digits=2),
        certificate=certificate,
        warnings=tuple(warnings),
        next_commands=_next(setup, run),
    )


def _memory(setup: ImageAssembly, outcome: Outcome) -> tuple[MemoryUse, ...]:
    """Planned and used bytes since training began, where the run was planned, and against a budget: of the process, or of the
    card that it bounds.
    """
    planned, budget, card = setup.residency.plan, setup.residency.budget, setup.residency.gpu
    if planned is None:
        return (MemoryUse("training, whole process", None, outcome.peak_bytes),)
    whole = peak_bytes() if card is None else card_peak(card)
    found = (
        MemoryUse(f"training, {'whole process' if card is None else f'on {card}'}", planned.training_peak, outcome.peak_bytes),
        MemoryUse("training, judging and certificate", planned.peak, whole),
    )
    against = (*found, MemoryUse("training and judging, against memory.budget", budget.limit, whole)) if budget else found
    return against if card is None else (*against, *page.beside_a_card(card))


def _scores(config: RunConfig) -> dict[str, str]:
    """By which encoder prompt-following and style were measured, or that they were not, and what would do it."""
    if config.diffusion.scorer and config.diffusion.seeds:
        return {"Samples scored by": f"{config.diffusion.scorer}; the seeds of one prompt count as one group"}
    missing = "draw samples (diffusion.seeds)" if config.diffusion.scorer else "name a CLIP model as diffusion.scorer"
    return {"Not run": f"prompt-following and style scores; to have them, {missing}"}


def _beside(setup: ImageAssembly) -> str:
    """The pictures of the subject's kind, where there are any."""
    spec = setup.config.images
    if not setup.prior:
        return ""
    whence = spec.prior or f"drawn by the base of '{spec.prior_caption}'"
    return f"; {len(setup.prior)} of the subject's kind ({whence}), weight {setup.config.diffusion.prior_weight:g}"


def _weights(spec: ModelSpec) -> str:
    """How the frozen weights are kept, in words."""
    method = spec.quantize.method
    return f"{spec.dtype} weights" + ("" if method == "none" else f", linear layers of the UNet in {method}")


def _next(setup: ImageAssembly, run: RunFolder) -> tuple[Command, ...]:
    prompt, folder = quote(setup.judged[1][0].row.caption), quote(str(run.path))
    pictures = quote(f"{run.path.name}-pictures")
    to, where = ("diffusers", "for diffusers and ComfyUI") if setup.model.kind.flow else ("kohya", "for ComfyUI and A1111")
    return (
        Command(f"lorakeet generate --adapter {folder} --prompt {prompt} --out {pictures}", "draw with it"),
        Command(f"lorakeet convert {folder} {quote(f'{run.path.name}.safetensors')} --to {to}", where),
    )
