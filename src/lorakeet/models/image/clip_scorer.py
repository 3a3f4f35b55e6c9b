"""CLIP as a judge of drawn pictures: its vectors of pictures and of prompts, whose cosines are the field's CLIP-T and CLIP-I."""

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

from lorakeet.data.images.folder import Pixels
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models.files.quiet import quiet_transformers

AT_ONCE = 8  # pictures or prompts that go through CLIP together
Vectors = NDArray[np.float64]


@dataclass(frozen=True)
class ImageScorer:
    """A CLIP model in fp32 on the CPU, or wherever `load_scorer` put it, with what prepares its inputs."""

    name: str
    model: Any
    processor: Any

    def pictures(self, pictures: Iterable[Pixels]) -> Vectors:
        """Vectors (n, width) of length 1 of pictures (height, width, 3), uint8, of any sizes; a few are asked for at a time."""
        found, waiting = [], iter(pictures)
        while part := list(itertools.islice(waiting, AT_ONCE)):
            given = self.processor(images=part, return_tensors="pt")
            with torch.no_grad():
                found.append(self.model.get_image_features(pixel_values=given.pixel_values.to(self.model.device)).pooler_output)
        return _unit(torch.cat(found))

    def prompts(self, prompts: Sequence[str]) -> Vectors:
        """Vectors (n, width) of length 1; what is longer than CLIP reads is cut off."""
        found = []
        for start in range(0, len(prompts), AT_ONCE):
            part = list(prompts[start : start + AT_ONCE])
            given = self.processor(text=part, return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                found.append(self.model.get_text_features(**given.to(self.model.device)).pooler_output)
        return _unit(torch.cat(found))


def load_scorer(path: str, device: torch.device | None = None) -> ImageScorer:
    """The CLIP model in the folder, or under the hub id, `path`.

    ConfigError where it is another model; EnvironmentProblem where it cannot be loaded.
    """
    with quiet_transformers():
        try:
            kind = transformers.AutoConfig.from_pretrained(path).model_type
            if kind != "clip":
                raise ConfigError(
                    f"diffusion.scorer is '{path}', a {kind} model; expected CLIP, such as openai/clip-vit-large-patch14."
                )
            model, report = transformers.CLIPModel.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if lacking := sorted(report["missing_keys"]):  # transformers makes them up
                raise ValueError(f"it lacks {len(lacking)} of its weights ({', '.join(lacking[:3])}, …).")
            processor = transformers.CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:  # what is broken
            raise EnvironmentProblem(
                f"diffusion.scorer '{path}' cannot be loaded: {error} Expected a folder of a CLIP model with its tokenizer and "
                "preprocessor_config.json, or a hub id that this machine can reach; leave it out to do without."
            ) from error
    return ImageScorer(path, model.to(device or torch.device("cpu")).eval().requires_grad_(False), processor)


def _unit(vectors: torch.Tensor) -> Vectors:
    wide = vectors.double().cpu()
    return np.asarray((wide / wide.norm(dim=1, keepdim=True)).numpy())
