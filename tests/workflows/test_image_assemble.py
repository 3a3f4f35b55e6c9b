"""What a run on pictures works with is checked before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.workflows.image_assemble import assemble_images, ready_to_train
from tiny.image_runs import image_config
from tiny.images import diffusers


def test_everything_is_there_and_resolved(tiny_sd_folder: Path, tmp_path: Path) -> None:
    setup = assemble_images(image_config(tiny_sd_folder, tmp_path), Console(quiet=True))
    assert (len(setup.train), len(setup.held_out), setup.test) == (12, 8, []) and setup.steps == 8
    assert setup.config.diffusion.prediction == "epsilon" and setup.config.model.device == "cpu"
    assert setup.judged == ("held-out", setup.held_out) and setup.arrangement.planned is None
    task = ready_to_train(setup)
    assert len(task.parameters()) == 2 * len(setup.plan.entries) and not (tmp_path / "run").exists()


def test_settings_of_text_models_are_refused_together(tiny_sd_folder: Path, tmp_path: Path) -> None:
    config = image_config(tiny_sd_folder, tmp_path, lora__new_tokens="<a>", ranks__choose="auto")
    with pytest.raises(ConfigError, match=r"2 problems[\s\S]*new_tokens[\s\S]*ranks\.choose"):
        assemble_images(config, Console(quiet=True))


def test_a_scorer_is_asked_for_before_the_training(tiny_sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"diffusion\.scorer '.*none' cannot be loaded"):
        assemble_images(image_config(tiny_sd_folder, tmp_path, diffusion__scorer=tmp_path / "none"), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"not counted in memory\.budget"):
        assemble_images(
            image_config(tiny_sd_folder, tmp_path, diffusion__scorer="x", memory__budget="8GiB"), Console(quiet=True)
        )


def test_a_scheduler_without_betas_is_refused_before_pictures_are_encoded(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "edm"
    shutil.copytree(tiny_sdxl_folder, model)
    diffusers().EDMEulerScheduler().save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    for changes in ({}, {"memory__budget": "8GiB"}):
        with pytest.raises(ConfigError, match="EDMEulerScheduler, has no betas"):
            assemble_images(image_config(model, tmp_path, **changes), Console(quiet=True))
    assert not (tmp_path / "cache" / "latents").exists()


def test_float16_is_refused(tiny_sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float16"):
        assemble_images(image_config(tiny_sd_folder, tmp_path, model__dtype="float16"), Console(quiet=True))
