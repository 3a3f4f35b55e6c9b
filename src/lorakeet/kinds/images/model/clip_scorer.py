"""CLIP embeddings of images and prompts for evaluating samples: their cosines are CLIP-T and CLIP-I."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kinds.images.data.folder import Pixels
from lorakeet.models.files.foreign_code import read_native
from lorakeet.models.files.quiet import quiet_transformers

AT_ONCE = 8  # images or prompts in one batch
Vectors = NDArray[np.float64]


@dataclass(frozen=True)
class ImageScorer:
    """A CLIP model in fp32 with its processor."""

    name: str
    model: Any
    processor: Any

    def pictures(self, pictures: Iterable[Pixels]) -> Vectors:
        """Returns unit vectors (n, width) of images (height, width, 3), uint8, of any sizes; the iterable is read in batches."""
        found, waiting = [], iter(pictures)
        while part := list(itertools.islice(waiting, AT_ONCE)):
            given = self.processor(images=part, return_tensors="pt")
            with torch.no_grad():
                found.append(self.model.get_image_features(pixel_values=given.pixel_values.to(self.model.device)).pooler_output)
        return _unit(torch.cat(found))

    def prompts(self, prompts: Sequence[str]) -> Vectors:
        """Returns unit vectors (n, width) of prompts, which are cut to CLIP's length."""
        found = []
        for start in range(0, len(prompts), AT_ONCE):
            part = list(prompts[start : start + AT_ONCE])
            given = self.processor(text=part, return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                found.append(self.model.get_text_features(**given.to(self.model.device)).pooler_output)
        return _unit(torch.cat(found))


def load_scorer(path: str, device: torch.device | None = None) -> ImageScorer:
    """Loads the CLIP model of the folder or hub id `path`.

    Raises ConfigError for another kind of model, EnvironmentProblem if it cannot be loaded.
    """
    with quiet_transformers():
        try:
            kind = read_native(transformers.AutoConfig, path).model_type
            if kind != "clip":
                raise ConfigError(
                    f"diffusion.scorer is '{path}', a {kind} model; expected CLIP, such as openai/clip-vit-large-patch14."
                )
            model, report = read_native(
                transformers.CLIPModel, path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if lacking := sorted(report["missing_keys"]):  # transformers would initialise them at random
                raise ValueError(f"it lacks {len(lacking)} of its weights ({', '.join(lacking[:3])}, …).")
            processor = read_native(transformers.CLIPProcessor, path)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:  # from broken files
            raise EnvironmentProblem(
                f"diffusion.scorer '{path}' cannot be loaded: {error} Expected a folder of a CLIP model with its tokenizer and "
                "preprocessor_config.json, or a hub id that this machine can reach; leave it out to do without."
            ) from error
    return ImageScorer(path, model.to(device or torch.device("cpu")).eval().requires_grad_(False), processor)


def _unit(vectors: torch.Tensor) -> Vectors:
    wide = vectors.double().cpu()
    return np.asarray((wide / wide.norm(dim=1, keepdim=True)).numpy())
