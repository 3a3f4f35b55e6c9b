"""`lorakeet finetune` with kind: image: trains an adapter of a diffusion model and proves it on pictures that it never saw.

assemble (pictures, model, plan, latents) → inject → train → judge (loss, samples, memorisation) → certify → report.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.errors import RunStopped
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report import Command, Leak, MemoryUse, Report, write_report
from lorakeet.evaluate.values import encode
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import Outcome, train
from lorakeet.train.progress import reporter_for
from lorakeet.train.run import RunFolder
from lorakeet.workflows import facts
from lorakeet.workflows.begin import begin_run
from lorakeet.workflows.image_assemble import ImageAssembly, assemble_images, ready_to_train, show_image_plan
from lorakeet.workflows.image_certify import certify_images, image_digests
from lorakeet.workflows.image_judge import ImageJudge
from lorakeet.workflows.page import curves
from lorakeet.workflows.place import writing
from lorakeet.workflows.show import show_certificate, show_results


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
        if self.outcome is None or self.report is None:
            return {**found, "dry_run": True, "plan": self.setup.plan.to_mapping()}
        return {**found, "outcome": encode(self.outcome), "report": encode(self.report)}


def finetune_images(config: RunConfig, run: RunFolder, *, resume: bool, dry_run: bool, console: Console) -> ImageResult:
    """Trains, judges and certifies; everything is in the run folder. Errors as in workflows/finetune."""
    setup = assemble_images(config, console)
    show_image_plan(setup, console)
    if dry_run:
        return ImageResult(setup, run)
    before = image_digests(setup.model)
    task = ready_to_train(setup)
    begin_run(run, setup.config, setup.dataset.split_record(), resume=resume)
    outcome = train(
        task, setup.config.train, run=run, identity=_identity(setup, before), resume=resume, report=reporter_for(console)
    )
    try:
        report = _prove(setup, outcome, run, before, console)
    except KeyboardInterrupt:
        raise RunStopped(
            f"Ctrl-C: the training is done and {run.adapter} is whole, but it was not judged to the end. "
            f"Judge it with: {run.resume_command}"
        ) from None
    return ImageResult(setup, run, outcome, report)


def _identity(setup: ImageAssembly, digests: dict[str, str]) -> dict[str, str]:
    """What must be equal for a run to be resumed, besides the training settings."""
    config = setup.config
    images = {**dataclasses.asdict(config.images), "cache": ""}
    parts = {
        "model settings": dataclasses.asdict(config.model),
        "lora settings": dataclasses.asdict(config.lora),
        "images settings": images,
        "diffusion settings": dataclasses.asdict(config.diffusion),
        "pictures": [picture.row.key for picture in (*setup.train, *setup.held_out)],
        "base model": digests,
    }
    return {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in parts.items()}


def _prove(setup: ImageAssembly, outcome: Outcome, run: RunFolder, before: dict[str, str], console: Console) -> Report:
    """Judges, certifies and reports; VerificationFailed when the certificate fails."""
    _, pictures = setup.judged
    judge = ImageJudge(setup.config, setup.model, setup.captions, pictures, setup.train, console)
    with writing(f"The samples in {run.path}", f"The adapter is whole. Free some space, then: {run.resume_command}"):
        measured = judge.report(f"Fine-tuning {setup.model.name}", run.path / "samples")
    prompts = [picture.row.caption for picture in pictures[:2]]
    certificate = certify_images(
        setup.model, run.adapter, prompts, before=before, spec=setup.config.model, guidance=setup.config.diffusion.guidance
    )
    report = _complete(measured, setup, outcome, run, certificate)
    with writing(f"The report in {run.path}", f"The adapter is whole. Free some space, then: {run.resume_command}"):
        certificate.write(run.certificate)
        write_report(report, run.path)
    show_results(report, console)
    if report.memorisation is not None:
        near, count = report.memorisation, len(report.memorisation.nearest)
        console.print(f"{near.suspicious} of {count} samples are nearer to a training picture than any judged picture is")
    show_certificate(certificate, console)
    console.print(f"Report: {run.page}   Adapter: {run.adapter}   Certificate: {run.certificate}", soft_wrap=True)
    certificate.raise_if_failed()
    return report


def _complete(measured: Report, setup: ImageAssembly, outcome: Outcome, run: RunFolder, certificate: Certificate) -> Report:
    """`measured` with everything else that the page shows."""
    config, data, metrics = setup.config, setup.dataset, read_metrics(run.metrics)
    part, pictures = setup.judged
    lora = config.lora
    alike = tuple(
        Leak(one.judged.source, one.train.source, 1 - one.bits / 256, one.action, one.train.caption) for one in data.alike
    )
    warnings = [*measured.warnings, *data.remarks]
    if not data.test:
        warnings.append("There are no test pictures: the checkpoint was chosen on the held-out pictures that it is judged on.")
    return replace(
        measured,
        subtitle=f"{setup.model.name} on {Path(config.data.train).name}, judged on {len(pictures)} {part} pictures",
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        facts={
            "Model": f"{setup.model.name}, {config.model.dtype} weights, predicts {config.diffusion.prediction}",
            "Adapter": f"{lora.variant}, rank {lora.rank}, alpha {lora.alpha:g} ({lora.scale_rule}), {setup.plan.summary()}",
            "Pictures": f"{len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test",
            "Judged at": f"{config.diffusion.held_out_timesteps} fixed timesteps with fixed noise for each picture, unweighted",
            "Not run": "prompt-following and style scores, which need an encoder that is not part of the model",
            "Seeds": f"training {config.train.seed}, split {config.data.split_seed}, evaluation {config.evaluate.seed}",
            "Versions": facts.versions(),
            "Machine": facts.machine(setup.model.device),
            "Run folder": str(run.path),
        },
        curves=curves(metrics, outcome),
        leaks=alike,
        memory=(MemoryUse("training, whole process", None, outcome.peak_bytes),),
        speed=_speed(metrics, outcome),
        certificate=certificate,
        warnings=tuple(warnings),
        next_commands=_next(setup, run),
    )


def _speed(metrics: list[dict[str, Any]], outcome: Outcome) -> dict[str, str]:
    rates = sorted(record["tokens_per_second"] for record in metrics if record.get("tokens_per_second"))
    found = {
        "Training time": f"{outcome.seconds:.0f} s, held-out evaluations included",
        "Pictures trained on": f"{outcome.tokens:,}, each as often as it was drawn",
        "Steps": f"{outcome.steps} of {outcome.planned_steps} ({outcome.reason})",
        "Learning rate": f"{outcome.learning_rate:.2e} at its highest",
    }
    return {**found, "Pictures a second": f"{rates[len(rates) // 2]:,.2f} (median over steps)"} if rates else found


def _next(setup: ImageAssembly, run: RunFolder) -> tuple[Command, ...]:
    prompt = setup.judged[1][0].row.caption
    return (
        Command(f"lorakeet generate --model {setup.model.name} --adapter {run.path} --prompt '{prompt}'", "draw with it"),
        Command(f"lorakeet convert {run.path} {run.path.name}.safetensors --to kohya", "for ComfyUI, A1111 and their relatives"),
    )
