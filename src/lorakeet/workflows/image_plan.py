"""`lorakeet plan` for kind: image: how much memory a run on pictures will take, phase by phase, before anything is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import Budget, larger_than_machine
from lorakeet.models.image.from_config import shapes_of_images
from lorakeet.models.placement import planned_on
from lorakeet.workflows.finetuning import image as _run  # noqa: F401 - what a run has in memory is in memory here, to be counted
from lorakeet.workflows.finetuning.assemble_image import check_settings
from lorakeet.workflows.finetuning.terminal import show_image_forecast
from lorakeet.workflows.planning.image_run import ImageRunPlan, changes_that_help, forecast_images, machine_of, ways


@dataclass(frozen=True)
class ImagePlanResult:
    """What a run will take; where that is more than its budget, `choices` (change, peak) are what it can do about it."""

    config: RunConfig
    planned: ImageRunPlan
    budget: Budget
    choices: tuple[tuple[str, int], ...] = ()

    @property
    def peak(self) -> int:
        """The most bytes that `lorakeet finetune` will hold with the settings as they are."""
        return self.planned.peak

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        work, pictures = self.planned.work, self.planned.pictures
        return {
            "model": self.config.model.path,
            "device": "cpu" if self.planned.gpu is None else str(self.planned.gpu),
            "trained_parameters": self.planned.plan.parameters,
            "micro_batch": {"pictures": pictures.micro_batch, "size": list(pictures.example)},
            **self.planned.to_mapping(),
            "budget": self.budget.limit,
            "fits": self.peak <= self.budget.bytes if self.budget else None,
            "choices": [{"change": change, "peak": peak} for change, peak in self.choices],
            "speed": dataclasses.asdict(work),
        }


def plan_images(config: RunConfig, console: Console) -> ImagePlanResult:
    """Plans the run of `config` from the pipeline's configurations; needs neither weights nor pictures, and writes nothing.

    ConfigError for a model that is not known and for settings that do not fit it.
    """
    check_settings(config)
    budget = config.memory.limit
    on_gpu = planned_on(config.model.device).type == "cuda"
    if not on_gpu and (warning := larger_than_machine(budget)):
        console.print(warning, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    if config.diffusion.scorer:
        say(f"Not counted: diffusion.scorer {config.diffusion.scorer}, in memory while the samples are judged.")
    shapes = shapes_of_images(config.model, say)
    machine = machine_of(config, returning=bool(budget))
    planned = forecast_images(config, shapes, machine)
    choices: list[tuple[str, int]] = []
    if planned.peak > budget.bytes:
        last = config
        for change, last in ways(config):
            if change:
                choices.append((change, forecast_images(last, shapes, machine).peak))
        choices += [(change, found.peak) for change, found in changes_that_help(last, shapes, machine)]
    result = ImagePlanResult(config, planned, budget, tuple(choices))
    show_image_forecast(planned, console)
    _show_against(result, console)
    return result


def _show_against(result: ImagePlanResult, console: Console) -> None:
    against = ""
    if result.budget:
        left = result.budget.bytes - result.peak
        said = f"{bytes_text(left)} less than" if left >= 0 else f"{bytes_text(-left)} more than"
        against = f", {said} the budget of {result.budget}"
    console.print(f"Peak of the run: {bytes_text(result.peak)}{against}.", soft_wrap=True)
    for change, peak in result.choices:
        fits = "fits" if peak <= result.budget.bytes else "is still too much"
        console.print(f"  {change}: {bytes_text(peak)}, {fits}", soft_wrap=True)
