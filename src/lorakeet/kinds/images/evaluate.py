"""Evaluates an image model with and without its adapter: denoising loss, samples side by side, memorisation."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.disk import write_new
from lorakeet.errors import DataError
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.report import Memorisation, Near, Report, Sample, SampleGrid, SampleRow
from lorakeet.kinds.images.assemble import sampler_of
from lorakeet.kinds.images.data.folder import Pixels, open_pixels, png_of
from lorakeet.kinds.images.model.clip_scorer import ImageScorer
from lorakeet.kinds.images.model.latent_cache import Captions, EncodedImage
from lorakeet.kinds.images.model.model import ImageModel
from lorakeet.kinds.images.model.sample import draw_latents
from lorakeet.kinds.images.report import denoising_report, nearest_distances, with_distances
from lorakeet.kinds.images.spec import diffusion_of
from lorakeet.kinds.images.task import denoising_errors
from lorakeet.kinds.images.wording import PROMPT_DISTANCE, STYLE_DISTANCE
from lorakeet.models.inject import activate, adapter_of, attach, eject
from lorakeet.train import durable, rng
from lorakeet.train.progress import counted

BASE, ADAPTER = "base", "adapter"
WEIGHTS = (0.5, 1.0, 1.5)
SHOWN = 256  # pixels: the larger side of a sample in the report; the files have all
POOLED = 16  # latents are compared as at most POOLED × POOLED averages
SPACE = "1 − cosine of the autoencoder's latents, averaged to at most 16×16 positions, minus the mean of the training pictures"


@dataclass(frozen=True)
class Drawn:
    """Samples of one column: latents (prompts × seeds, channels, h, w)."""

    column: str
    latents: Tensor


@dataclass(frozen=True)
class ImageEvaluator:
    """Measures `model` on pictures with the adapter `name` on and off; with a `scorer` also its samples."""

    config: RunConfig
    model: ImageModel
    captions: Captions
    pictures: Sequence[EncodedImage]  # to evaluate on
    train: Sequence[EncodedImage]
    console: Console
    name: str = "default"
    scorer: ImageScorer | None = None
    prior: Sequence[EncodedImage] = ()  # of the subject's class, from a folder; they were trained on too
    groups: tuple[int, ...] | None = None  # of `pictures`: copies of each other have the same

    def report(self, title: str, folder: Path) -> Report:
        """The measured sections; writes the samples to `folder` as PNG files, all or none."""
        base, adapter = self.losses(BASE), self.losses(ADAPTER)
        rows = [picture.row for picture in self.pictures]
        report = denoising_report(
            title, adapter=adapter, base=base, captions=[row.caption for row in rows], sources=[row.source for row in rows],
            spec=self.config.evaluate,
        )  # fmt: skip
        if not diffusion_of(self.config).seeds:
            return report
        drawn = self.samples()
        pictures = [self.model.decode(one.latents).numpy() for one in drawn]
        self._write(folder, drawn, pictures)
        if self.scorer is not None:
            by_column = {one.column: column for one, column in zip(drawn, pictures, strict=True)}
            report = self._scored(report, self.scorer, base=by_column[BASE], adapter=by_column[f"{ADAPTER} × 1"])
        return replace(report, samples=self._grid(drawn, pictures), memorisation=self.memorisation(drawn))

    def losses(self, system: str) -> RowLosses:
        """The denoising loss of each picture, summed over its fixed timesteps."""
        activate(self.model.parts, None if system == BASE else self.name)
        with counted(self.console, f"{system} sees {len(self.pictures)} pictures", len(self.pictures)) as advance:
            sums, counts = denoising_errors(self.model, self.pictures, self.captions, diffusion_of(self.config), progress=advance)
        return RowLosses(system, sums, counts.astype(np.int64), self.groups)

    @property
    def requests(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each row of samples."""
        spec, first = diffusion_of(self.config), self.config.evaluate.seed
        found = spec.prompts or tuple(dict.fromkeys(picture.row.caption for picture in self.pictures))[:3]
        return [(prompt, first + number) for prompt in found for number in range(spec.seeds)]

    def draw_progress(self, folder: Path) -> None:
        """Draws every prompt with the adapter as it is into `folder`, all or none; uses no random numbers of the run."""
        prompts, seeds = [prompt for prompt, _ in self.requests], [seed for _, seed in self.requests]
        with torch.random.fork_rng(devices=rng.cuda_devices(self.model.device)):
            latents = draw_latents(self.model, prompts, seeds, sampler_of(self.config))
        self._write(folder, [Drawn(ADAPTER, latents)], [self.model.decode(latents).numpy()])

    def samples(self) -> list[Drawn]:
        """The base's samples, and the adapter's at each weight, all from the same noise."""
        adapter = adapter_of(self.model.parts, self.name)
        sampler = sampler_of(self.config)
        prompts, seeds = [prompt for prompt, _ in self.requests], [seed for _, seed in self.requests]
        found = []
        with counted(self.console, "samples", len(prompts) * (1 + len(WEIGHTS))) as advance:
            for weight in (0.0, *WEIGHTS):
                column = f"{ADAPTER} × {weight:g}" if weight else BASE
                if weight:
                    attach(self.model.parts, scaled_adapter(adapter, weight), "sampled")
                else:
                    activate(self.model.parts, None)
                try:
                    latents = draw_latents(self.model, prompts, seeds, sampler, progress=advance)
                finally:
                    if weight:
                        eject(self.model.parts, "sampled")
                found.append(Drawn(column, latents))
        activate(self.model.parts, self.name)
        return found

    def memorisation(self, drawn: Sequence[Drawn]) -> Memorisation:
        """Each sample's nearest training picture, over all its cut-outs, and how near the evaluated pictures come."""
        trained = [(picture, latents) for picture in (*self.train, *self.prior) for latents in picture.latents]
        own, given = [latents for _, latents in trained], [picture.latents[0] for picture in self.pictures]
        side = pooled_side([*own, *given, *(latents for one in drawn for latents in one.latents)])
        training = features_of(own, side)
        reference, _ = nearest_distances(features_of(given, side), training)
        floor = float(reference.min())
        found = []
        for one in drawn:
            distances, indices = nearest_distances(features_of(list(one.latents), side), training)
            for (prompt, seed), distance, index in zip(self.requests, distances, indices, strict=True):
                source = trained[int(index)][0].row.source
                found.append(Near(prompt, seed, one.column, source, float(distance), bool(distance < floor)))
        return Memorisation(tuple(found), floor, float(np.median(reference)), len(self.pictures), SPACE)

    def _scored(self, report: Report, scorer: ImageScorer, *, base: np.ndarray, adapter: np.ndarray) -> Report:
        """Adds the distances of samples from their prompts and from the pictures; the seeds of a prompt are one group."""
        prompts = tuple(prompt for prompt, _ in self.requests)
        texts = scorer.prompts(prompts)
        real = scorer.pictures(_pixels_of(picture.row.path) for picture in self.pictures)
        ones = np.ones(len(prompts), np.int64)
        found: dict[str, list[RowLosses]] = {PROMPT_DISTANCE: [], STYLE_DISTANCE: []}
        for system, pictures in ((ADAPTER, adapter), (BASE, base)):
            drawn = scorer.pictures(list(pictures))
            found[PROMPT_DISTANCE].append(RowLosses(system, 1 - (drawn * texts).sum(1), ones, prompts))
            found[STYLE_DISTANCE].append(RowLosses(system, 1 - (drawn @ real.T).mean(1), ones, prompts))
        return with_distances(report, {name: (left, right) for name, (left, right) in found.items()}, self.config.evaluate)

    def _grid(self, drawn: Sequence[Drawn], pictures: Sequence[np.ndarray]) -> SampleGrid:
        rows = []
        for number, (prompt, seed) in enumerate(self.requests):
            cells = [
                Sample(one.column, base64.b64encode(png_of(column[number], largest=SHOWN)).decode())
                for one, column in zip(drawn, pictures, strict=True)
            ]
            rows.append(SampleRow(prompt, seed, tuple(cells)))
        scheduler = type(self.model.pipeline.scheduler).__name__
        detail = f"{scheduler}, {diffusion_of(self.config).sample_steps} steps, guidance {diffusion_of(self.config).guidance:g}"
        return SampleGrid(tuple(one.column for one in drawn), tuple(rows), detail)

    def _write(self, folder: Path, drawn: Sequence[Drawn], pictures: Sequence[np.ndarray]) -> None:
        with durable.new_folder(folder) as made:
            for one, column in zip(drawn, pictures, strict=True):
                for number, (_, seed) in enumerate(self.requests):
                    name = one.column.replace(" × ", "-")
                    prompt = number // diffusion_of(self.config).seeds
                    write_new(made / f"{prompt}-seed{seed}-{name}.png", png_of(column[number]))


def scaled_adapter(adapter: Adapter, weight: float) -> Adapter:
    """The adapter with its scale times `weight`."""
    pairs = {path: dataclasses.replace(pair, alpha=pair.alpha * weight) for path, pair in adapter.pairs.items()}
    return dataclasses.replace(adapter, pairs=pairs)


def pooled_side(latents: Sequence[Tensor]) -> int:
    """The largest side, at most POOLED, that all of these latents (channels, h, w) can be averaged to."""
    return min(POOLED, *(min(one.shape[1:]) for one in latents))


def features_of(latents: Sequence[Tensor], side: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Latents (channels, h, w) of any size averaged to `side` × `side`: (n, features)."""
    pooled = [torch.nn.functional.adaptive_avg_pool2d(one.float().cpu()[None], side).flatten() for one in latents]
    return torch.stack(pooled).double().numpy()


def _pixels_of(path: Path) -> Pixels:
    """As `open_pixels`; raises DataError for a picture that was removed or broken during the run."""
    try:
        return open_pixels(path)[0]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} was read at the start of the run, and cannot be read now: {error}. Restore it, then resume the run."
        ) from error
