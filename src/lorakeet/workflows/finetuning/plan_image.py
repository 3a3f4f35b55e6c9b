"""The forecast of a run on images for `lorakeet plan`: memory by phase, the budget, and what would help."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.memory.budget import larger_than_machine
from lorakeet.models.image.from_config import shapes_of_images
from lorakeet.models.placement import planned_on
from lorakeet.workflows.finetuning.assemble_image import check_settings
from lorakeet.workflows.finetuning.kind import Advice, PlanResult
from lorakeet.workflows.finetuning.terminal import show_advice, show_image_forecast, show_peak
from lorakeet.workflows.planning.image_run import ImageRunPlan, changes_that_help, forecast_images, machine_of, ways


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


def plan_images(config: RunConfig, console: Console) -> ImagePlanResult:
    """Plans a run on images from the pipeline's configurations, and prints the plan.

    Raises ConfigError for an unknown model, and for settings that do not apply to images.
    """
    check_settings(config)
    say = partial(console.print, soft_wrap=True)
    budget, device = config.memory.limit, planned_on(config.model.device)
    if device.type != "cuda" and (warning := larger_than_machine(budget)):
        say(warning)
    if config.diffusion.scorer:
        say(f"Not counted: diffusion.scorer {config.diffusion.scorer}, which is in memory while the samples are evaluated.")
    shapes = shapes_of_images(config.model, say)
    machine = machine_of(config, returning=bool(budget))
    planned = forecast_images(config, shapes, machine)
    result = ImagePlanResult(config=config, device=planned.gpu or torch.device("cpu"), planned=planned)
    if result.peak > budget.bytes:
        last, advice = config, list[Advice]()
        for change, last in ways(config):
            if change:
                advice.append(Advice(change, forecast_images(last, shapes, machine).peak))
        advice += [Advice(change, found.peak) for change, found in changes_that_help(last, shapes, machine)]
        result = replace(result, advice=tuple(advice))
    show_image_forecast(result.planned, console)
    show_peak(result, console)
    show_advice(result, console)
    return result
