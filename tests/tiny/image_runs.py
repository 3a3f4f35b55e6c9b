"""Settings with which a whole run on pictures over a tiny Stable Diffusion takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.verbs.finetune import FinetuneResult, finetune
from tiny.pictures import album


def image_config(model: Path, folder: Path, **changes: Any) -> RunConfig:
    """A run of 8 steps on 20 pictures, 8 of them held out, in `folder`/run; the pictures are drawn at the first call."""
    if not (folder / "photos").exists():
        album(folder / "photos", 20)
    flags = {
        "kind": "image", "model.path": str(model), "model.dtype": "float32", "model.device": "cpu", "lora.rank": "4",
        "lora.alpha": "12", "lora.target_modules": "attention", "data.train": str(folder / "photos"),
        "data.held_out_fraction": "0.4", "images.cache": str(folder / "cache"), "train.steps": "8", "train.batch_size": "4",
        "train.learning_rate": "5e-3", "evaluate.resamples": "300", "diffusion.sample_steps": "2", "diffusion.prompts": "red box",
        "diffusion.held_out_timesteps": "4", "out": str(folder / "run"),
    }  # fmt: skip
    return read_run(None, {**flags, **{key.replace("__", "."): str(value) for key, value in changes.items()}})


def image_run(model: Path, folder: Path, **changes: Any) -> FinetuneResult:
    """The finished run."""
    return finetune(image_config(model, folder, **changes), console=Console(quiet=True))
