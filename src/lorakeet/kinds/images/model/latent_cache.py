"""Caches latents of images and embeddings of captions on disk, by a hash of everything that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors
from lorakeet.kernels.cache import cache_folder
from lorakeet.kinds.images.data.folder import (
    ImageRow,
    Pixels,
    bucket_of,
    bucket_sizes,
    crop_to_cover,
    open_pixels,
    scaled_to_cover,
)
from lorakeet.kinds.images.model.kinds import Conditioning
from lorakeet.kinds.images.model.model import ImageModel
from lorakeet.kinds.images.model.sample import Sampler, draw_latents, require_finite_latents
from lorakeet.kinds.images.spec import ImageSpec

AT_ONCE = 4  # captions, or crops of an image, encoded in one batch
Progress = Callable[[int], None]  # called with the number of pictures or captions just done


@dataclass(frozen=True)
class EncodedImage:
    """The crops of an image as latents (variants, channels, h, w), fp32 on the CPU; the first is the centre crop, not mirrored.

    sizes (variants, 6) in pixels: the image's height and width, top and left of the crop (in the mirrored image if it is
    mirrored), the example's height and width.
    """

    row: ImageRow
    latents: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Sizes:
    """The sizes (height, width) of examples, in pixels, that a model and the settings allow."""

    allowed: list[tuple[int, int]]

    @classmethod
    def of(cls, model: ImageModel, spec: ImageSpec) -> Sizes:
        """Returns the sizes; ConfigError if the settings have one that the denoiser cannot halve or cut into patches."""
        step = model.multiple
        resolution = spec.resolution or model.resolution
        wanted = spec.bucket_step or max(step, resolution // 8 // step * step)
        for name, value in (("resolution", resolution), ("bucket_step", wanted)):
            if value % step:
                raise ConfigError(
                    f"images.{name} is {value}, but {model.name} works on {step} pixels at a time; use a multiple of {step}."
                )
        found = bucket_sizes(resolution, wanted) if spec.buckets else [(resolution, resolution)]
        if not found:
            raise ConfigError(
                f"images.bucket_step is {wanted}, but no size of it has at most {resolution}×{resolution} pixels "
                f"(images.resolution). Lower it to at most {resolution}, or leave it out."
            )
        return cls(found)


def encode_images(
    model: ImageModel, rows: Sequence[ImageRow], spec: ImageSpec, *, say: Callable[[str], None], progress: Progress | None = None
) -> list[EncodedImage]:
    """Returns every row's latents, from the cache if possible. EnvironmentProblem if the cache cannot be written."""
    folder = cache_in(spec, "latents")
    sizes = Sizes.of(model, spec)
    found = []
    for row in rows:
        size = bucket_of(row, sizes.allowed)
        mirrored = "mirrored at their own left" if spec.flip else "False"
        key = f"{row.pixels_key} {model.autoencoder_digest} {size} {spec.crops} {mirrored}"
        tensors = cached_tensors(folder, key, lambda row=row, size=size: _variants(model, row, size, spec), say)  # type: ignore[misc]
        found.append(EncodedImage(row, tensors["latents"], tensors["sizes"]))
        if progress:
            progress(1)
    return found


class Captions:
    """The conditioning of captions, each computed once; a dropped caption becomes the empty one."""

    def __init__(self, model: ImageModel, spec: ImageSpec, *, say: Callable[[str], None]) -> None:
        self.model, self.say = model, say
        self.folder = cache_in(spec, "texts")
        self.known: dict[str, Conditioning] = {}

    def of(self, caption: str) -> Conditioning:
        """Returns the conditioning of one caption, (1, tokens, width), fp32 on the CPU."""
        if caption not in self.known:
            key = f"{self.model.kind.name} {self.model.encoders_digest}\n{caption}"
            tensors = cached_tensors(self.folder, key, lambda: self._describe(caption), self.say)
            self.known[caption] = Conditioning(tensors["states"], tensors.get("pooled"))
        return self.known[caption]

    def _describe(self, caption: str) -> dict[str, Tensor]:
        with torch.no_grad():
            embedded = self.model.describe([caption])
        found = {"states": embedded.states.float().cpu()}
        return found if embedded.pooled is None else {**found, "pooled": embedded.pooled.float().cpu()}


def as_pixels(pictures: Sequence[Pixels]) -> Tensor:
    """Returns uint8 images (height, width, 3) of one size as the autoencoder's input (n, 3, height, width) in [−1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1


def _variants(model: ImageModel, row: ImageRow, size: tuple[int, int], spec: ImageSpec) -> dict[str, Tensor]:
    try:
        pixels, _ = open_pixels(row.path)
    except (OSError, ValueError) as error:
        raise DataError(f"{row.path} could be read when the run started and cannot be read now: {error}.") from error
    pictures, sizes = [], []
    for crop in range(spec.crops):
        piece, (top, left) = crop_to_cover(pixels, size, crop=crop, key=row.pixels_key)
        pictures.append(piece)
        sizes.append([row.height, row.width, top, left, *size])
        if spec.flip:
            pictures.append(piece[:, ::-1].copy())
            width = scaled_to_cover((row.height, row.width), size)[1]
            sizes.append([row.height, row.width, top, width - size[1] - left, *size])  # its position in the mirrored image
    parts = [as_pixels(pictures[start : start + AT_ONCE]) for start in range(0, len(pictures), AT_ONCE)]
    return {"latents": torch.cat([model.encode(part).cpu() for part in parts]), "sizes": torch.tensor(sizes, dtype=torch.float32)}


def cache_in(spec: ImageSpec, name: str) -> Path:
    """Returns the cache folder of one kind of tensors, made if missing; EnvironmentProblem if it cannot be made."""
    folder = (Path(spec.cache).expanduser() if spec.cache else cache_folder() / "images") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"The cache folder {folder} cannot be made: {error.strerror}. Set images.cache.") from error
    return folder


def cached_tensors(
    folder: Path, key: str, make: Callable[[], Mapping[str, Tensor]], say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Returns the cached tensors of `key`, or those of `make`, which are then cached."""
    path = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}.safetensors"
    if path.is_file():
        try:
            file = open_safetensors(path)
            return {name: file.read(name) for name in file.tensors}
        except DataError as error:
            say(f"A file of the cache is damaged and is made again: {error}")
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    try:
        save_tensors(path, made, metadata={})
    except OSError as error:
        raise EnvironmentProblem(f"The cache {folder} cannot be written ({error}). Free space or set images.cache.") from error
    return made


def drawn_prior(
    model: ImageModel,
    spec: ImageSpec,
    sampler: Sampler,
    *,
    say: Callable[[str], None],
    progress: Callable[[int], None] | None = None,
) -> list[EncodedImage]:
    """Returns `spec.prior_count` samples of `spec.prior_caption` as latents, seeds 0, 1, …, cached. No adapter may be active.

    They are images of the subject's class by the base, for DreamBooth's prior preservation.
    """
    caption, count = spec.prior_caption, spec.prior_count
    height, width = sampler.size or (model.resolution, model.resolution)
    scheduler = model.pipeline.scheduler
    settings = sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))
    steps = f"{type(scheduler).__name__} {settings}"
    drawn = (height, width, sampler.steps, sampler.strength(model), count, steps)
    key = " ".join(map(str, (model.denoiser_digest, model.encoders_digest, model.dtype, *drawn))) + f"\n{caption}"

    def make() -> dict[str, Tensor]:
        say(f"The base samples {count} images of '{caption}'; they are cached for other runs.")
        latents = draw_latents(model, [caption] * count, list(range(count)), sampler, progress=progress)
        return {"latents": require_finite_latents(model, latents).cpu()}

    latents = cached_tensors(cache_in(spec, "prior"), key, make, say)["latents"]
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    names = [hashlib.sha256(f"{key}\n{seed}".encode()).hexdigest() for seed in range(count)]
    rows = [ImageRow(Path(), caption, width, height, name, 0, f"drawn with seed {seed}") for seed, name in enumerate(names)]
    return [EncodedImage(row, one[None], sizes) for row, one in zip(rows, latents, strict=True)]
