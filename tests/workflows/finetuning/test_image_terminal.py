"""What is printed before a run on pictures begins."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lorakeet.workflows.finetuning.assemble_image import assemble_images
from lorakeet.workflows.finetuning.image_terminal import show_forecast, show_image_plan
from tiny.image_runs import image_config


def test_pictures_plan_and_memory(tiny_sd_folder: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    setup = assemble_images(image_config(tiny_sd_folder, tmp_path), console, asked=True)
    show_image_plan(setup, console)
    assert setup.residency.plan is not None and not setup.residency.budget
    show_forecast(setup.residency.plan, console)
    said = console.export_text()
    assert "12 training, 8 held-out" in said and "16×16 pixels" in said and "8 steps of 4 pictures" in said
    for word in ("encode", "train step", "saved: activations kept", "certify", "micro-batches of 4 × 16×16 pixels", "On a card"):
        assert word in said
