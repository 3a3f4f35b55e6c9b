"""What a run on images prints before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.kinds.images.assemble import assemble_images
from lorakeet.kinds.images.terminal import show_image_forecast, show_pictures
from tiny.image_runs import image_config
from tiny.runs import quiet
from tiny.terminal import printed


@pytest.mark.slow
def test_pictures_plan_and_memory(tiny_sd_folder: Path, tmp_path: Path) -> None:
    setup = assemble_images(image_config(tiny_sd_folder, tmp_path), quiet(), forecast=True)
    assert setup.residency.plan is not None and not setup.residency.budget
    text = printed(show_pictures, setup) + printed(show_image_forecast, setup.residency.plan)
    assert "12 training, 8 held-out" in text and "16×16 pixels" in text and "8 steps of 4 pictures" in text
    for word in ("encode", "train step", "saved: activations kept", "certify", "micro-batches of 4 × 16×16 pixels", "On a GPU"):
        assert word in text
