"""What a run on pictures prints before it begins: its pictures and plan, and what memory it will take."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakeet.core.plan import Plan
from lorakeet.evaluate.wording import bytes_text
from lorakeet.workflows.finetuning.assemble_image import ImageAssembly
from lorakeet.workflows.finetuning.terminal import memory_table
from lorakeet.workflows.planning.image_run import ImageRunPlan


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


def show_forecast(planned: ImageRunPlan, console: Console) -> None:
    """The table of phases and kinds, and what was planned."""
    console.print(memory_table(planned.forecast, None if planned.card is None else str(planned.card)))
    pictures = planned.pictures
    height, width = pictures.example
    console.print(
        f"{planned.plan.parameters:,} trained parameters; micro-batches of {pictures.micro_batch} × {width}×{height} pixels, "
        f"{planned.work.flops / 1e9:,.0f} GFLOP each. On a card, where parts wait aside while others compute, "
        f"{bytes_text(planned.tensors)} of tensors at most.",
        soft_wrap=True,
    )
