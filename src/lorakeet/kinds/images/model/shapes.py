"""Reads the configurations of a pipeline: shipped with Lorakeet, in a folder, or of a hub id. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, T5Config

from lorakeet.errors import ConfigError, nearest, one_message
from lorakeet.kinds.images.model.diffusers_import import diffusers, quiet_diffusers
from lorakeet.kinds.images.model.kinds import ENCODERS, NOT_LOADED, PIPELINES
from lorakeet.models.files.foreign_code import read_native, require_native_parts
from lorakeet.models.files.validate import require_sizes

Shapes = Mapping[str, Any]  # _class_name of the pipeline, and the configurations of its parts and of its scheduler, by name


@cache
def published_images() -> dict[str, Traversable]:
    """Returns the files of configurations of well-known pipelines that ship with Lorakeet, by hub id."""
    entries = [entry for entry in (files("lorakeet.models") / "shapes" / "images").iterdir() if entry.name.endswith(".json")]
    return {entry.name.removesuffix(".json").replace("--", "/"): entry for entry in entries}


def published_shapes(name: str) -> dict[str, Any]:
    """Returns the shipped configurations of the pipeline with the hub id `name`."""
    found: dict[str, Any] = json.loads(published_images()[name].read_text(encoding="utf-8"))
    return found


def shapes_in(name: str, revision: str | None, say: Callable[[str], None]) -> Shapes:
    """Returns the configurations of a folder, a published shape (without network) or a hub id; ConfigError if there are none."""
    found = {known.lower(): known for known in published_images()}.get(name.lower())
    if found is not None and not Path(name).expanduser().exists():
        return published_shapes(found)
    package = diffusers()
    if not Path(name).expanduser().exists():
        say(f"Fetching the configurations of {name} from the model hub.")
    known = list(published_images())
    advice = (
        "Name a folder that diffusers saved, a hub id, or one of the shapes that need no network: "
        f"{', '.join(known)}.{nearest(name, known)}"
    )
    reading = one_message(f"'{name}' has no configurations of an image model that could be read", advice, ConfigError)
    with reading, quiet_diffusers():
        index = package.DiffusionPipeline.load_config(name, revision=revision)
        require_native_parts(name, index, NOT_LOADED)
        kind = PIPELINES.get(index.get("_class_name", ""))
        if kind is None:
            raise ConfigError(
                f"{name} is a {index.get('_class_name', 'pipeline without a name')}; expected {', '.join(PIPELINES)}."
            )
        read = package.UNet2DConditionModel.load_config  # a dictionary for any class
        scheduler = package.DDPMScheduler.load_config(name, subfolder="scheduler", revision=revision)
        shapes = {part: read(name, subfolder=part, revision=revision) for part in (kind.denoiser, "vae")}
        own = (index.get("scheduler") or [None, scheduler.get("_class_name")])[1]  # the index takes precedence
        shapes["scheduler"] = {**scheduler, "_class_name": own}
        for part in ENCODERS:
            encoder = (index.get(part) or [None, None])[1]
            if encoder is not None:
                owner = T5Config if encoder.startswith("T5") else CLIPTextConfig
                config = read_native(owner, name, subfolder=part, revision=revision or "main")
                shapes[part] = {**config.to_dict(), "_class_name": encoder}
    require_sizes(name, shapes)
    return {**shapes, "_class_name": index["_class_name"]}
