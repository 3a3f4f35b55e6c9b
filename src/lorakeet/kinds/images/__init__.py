"""Runs on images: a diffusion model that learns from pictures with captions."""

from __future__ import annotations

from typing import Any

from lorakeet.kinds.images.drawing_options import GenerateOptions
from lorakeet.kinds.images.spec import ENDINGS, DiffusionSpec, ImageSpec
from lorakeet.kinds.images.wording import METRICS
from lorakeet.registry import AddedVerb, KindDeclaration, Section


def _conflicts(config: Any) -> list[str]:
    if config.kind == DECLARATION.name or not config.model.config:
        return []
    return [f"model.config is for single files of image models, but kind is {config.kind}. Leave it out or set kind: image."]


DECLARATION = KindDeclaration(
    name="image",
    help="a diffusion model",
    module="lorakeet.kinds.images.kind",
    sections={
        "images": Section(ImageSpec, "Image data, for kind image."),
        "diffusion": Section(DiffusionSpec, "Noise, loss and samples, for kind image."),
    },
    instead="Draw with it by lorakeet generate, or write it for other programs by lorakeet convert.",
    lacks={"seeds": "Image runs are compared on few pictures, and their seeds are not. Start a run for each train.seed."},
    taken_as=("kohya", "diffusers", "push"),
    rows_page="lorakeet.kinds.images.album:show_album",
    try_page="strengths",
    rows_called="pictures",
    rows_help="with kind image, a folder of pictures with captions",
    rows_settings=("images.caption", "images.resolution", "images.near_duplicates"),
    described=ENDINGS,
    read_paths=("images.prior", "diffusion.scorer"),
    written_paths=("images.cache",),
    metrics=METRICS,
    row_unit="",
    verbs=(
        AddedVerb(
            "generate", "Draw pictures with an image model and its adapters.", GenerateOptions,
            "lorakeet.kinds.images.generate:generate", checks="lorakeet.kinds.images.early:require_drawable",
            record="pictures.json", prompts="diffusion.prompts",
        ),
    ),
    conflicts=_conflicts,
    require_rows="lorakeet.kinds.images.early:require_pictures",
)
