"""What a run on pictures works with is checked before anything is written."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kinds.images import assemble as assemble_image
from lorakeet.kinds.images.assemble import assemble_images, check_settings, image_task
from tiny.image_runs import image_config
from tiny.images import diffusers


def test_everything_is_there_and_resolved(tiny_sd_folder: Path, tmp_path: Path) -> None:
    setup = assemble_images(image_config(tiny_sd_folder, tmp_path), Console(quiet=True))
    assert (len(setup.train), len(setup.held_out), setup.test) == (12, 8, []) and setup.steps == 8
    assert setup.config.diffusion.prediction == "epsilon" and setup.config.model.device == "cpu"
    assert setup.evaluated == ("held-out", setup.held_out) and setup.residency.plan is None
    task = image_task(setup)
    assert len(task.parameters()) == 2 * len(setup.plan.entries) and not (tmp_path / "run").exists()


def test_settings_of_text_models_are_refused_together(tiny_sd_folder: Path, tmp_path: Path) -> None:
    config = image_config(tiny_sd_folder, tmp_path, lora__new_tokens="<a>", ranks__choose="auto")
    with pytest.raises(ConfigError, match=r"2 problems[\s\S]*new_tokens[\s\S]*ranks\.choose"):
        assemble_images(config, Console(quiet=True))


def test_a_gpu_that_torch_does_not_use_is_said_before_anything_is_read(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble_image, "why_not_cuda", lambda _: "Training runs on the CPU. Install another torch.")
    screen = io.StringIO()
    config = image_config(tiny_sd_folder, tmp_path, diffusion__scorer=tmp_path / "none")
    with pytest.raises(EnvironmentProblem):
        assemble_images(config, Console(file=screen, width=200))
    assert screen.getvalue().startswith("Training runs on the CPU. Install another torch.\n")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("data.text_column", "caption_de", "metadata.jsonl"), ("data.label_column", "kind", "Leave it out"),
        ("data.group_column", "author", r"data\.held_out"), ("data.near_duplicates", "0", r"images\.near_duplicates"),
        ("data.supervise", "all", r"caption_dropout"), ("train.keep_prefix_states", "true", r"images\.cache"),
        ("train.shard", "true", r"memory\.budget"),
        ("model.products", "float32", r"model\.dtype"),
        ("model.attention", "eager", "Leave it out"),
    ],
)  # fmt: skip
def test_a_setting_of_text_models_is_refused_by_name(
    tiny_sd_folder: Path, tmp_path: Path, name: str, value: str, remedy: str
) -> None:
    config = image_config(tiny_sd_folder, tmp_path, **{name.replace(".", "__"): value})
    with pytest.raises(ConfigError, match=f"{name} is .*{remedy}"):
        check_settings(config)


def test_it_is_said_before_training_when_nothing_can_be_shown(tiny_sd_folder: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    assemble_images(image_config(tiny_sd_folder, tmp_path, data__held_out_fraction="0.2"), console)
    assert "Only 4 pictures are held out" in (said := console.export_text()) and "Hold out 10 or more" in said
    assemble_images(image_config(tiny_sd_folder, tmp_path, data__held_out_fraction="0.5"), console)
    assert "are held out" not in console.export_text()


def test_a_scorer_is_requested_before_the_training(tiny_sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"diffusion\.scorer '.*none' cannot be loaded"):
        assemble_images(image_config(tiny_sd_folder, tmp_path, diffusion__scorer=tmp_path / "none"), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"not counted in memory\.budget"):
        assemble_images(image_config(tiny_sd_folder, tmp_path, diffusion__scorer="x", memory__budget="8GiB"), Console(quiet=True))


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
