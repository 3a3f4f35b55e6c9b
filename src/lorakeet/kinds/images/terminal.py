"""Prints the pictures and the plan of a run on images before it trains, and its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from lorakeet.evaluate.wording import bytes_text
from lorakeet.kinds.images.spec import diffusion_of
from lorakeet.kinds.terminal import memory_table, show_counts, show_plan, show_targets

if TYPE_CHECKING:
    from lorakeet.kinds.images.assemble import ImageAssembly
    from lorakeet.kinds.images.plan import ImageRunPlan


def show_pictures(setup: ImageAssembly, console: Console) -> None:
    """Prints the pictures, their sizes and the plan."""
    show_counts("Pictures", setup.dataset, console)
    factor = setup.model.factor
    sizes = sorted({(int(p.latents.shape[2]) * factor, int(p.latents.shape[3]) * factor) for p in setup.train})
    console.print(f"Examples of {', '.join(f'{width}×{height}' for height, width in sizes)} pixels")
    groups: dict[tuple[str, int, float], list[int]] = {}  # by name, rank and scale: a UNet has too many modules to list
    for entry in setup.plan.entries:
        parts = entry.path.split(".")
        name = ".".join([parts[0], "…", *[part for part in parts[-3:] if not part.isdigit()]])
        groups.setdefault((name, entry.rank, entry.scale), []).append(entry.parameters)
    rows = ((name, str(len(own)), str(rank), f"{scale:g}", f"{sum(own):,}") for (name, rank, scale), own in groups.items())
    show_plan(("module", "pairs"), rows, setup.plan, console)
    show_targets(setup.plan, setup.remarks, console)
    config = setup.config
    console.print(
        f"{setup.steps} steps of {config.train.batch_size} pictures; {config.model.dtype} weights on {config.model.device}; "
        f"the model predicts {diffusion_of(config).prediction}"
    )


def show_image_forecast(planned: ImageRunPlan, console: Console) -> None:
    """Prints the memory of an image run by phase, and the size of its micro-batches."""
    console.print(memory_table(planned.forecast, None if planned.gpu is None else str(planned.gpu)))
    pictures = planned.pictures
    height, width = pictures.example
    console.print(
        f"{planned.plan.parameters:,} trained parameters; micro-batches of {pictures.micro_batch} × {width}×{height} pixels, "
        f"{planned.work.flops / 1e9:,.0f} GFLOP each. On a GPU, where unused parts are offloaded, at most "
        f"{bytes_text(planned.tensors)} of tensors.",
        soft_wrap=True,
    )
