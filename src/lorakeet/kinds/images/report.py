"""The measured sections of a report on images: denoising losses, distances of samples, and the nearest training pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lorakeet.errors import DataError
from lorakeet.evaluate.compare import compare_losses
from lorakeet.evaluate.intervals import FEWEST, Floats
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.report.compose import largest_changes
from lorakeet.evaluate.report.report import Report, Role, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.verdict import verdict_of
from lorakeet.kinds.images.wording import METRIC


def denoising_report(
    title: str, *, adapter: RowLosses, base: RowLosses, captions: Sequence[str], sources: Sequence[str], spec: EvaluateSpec
) -> Report:
    """The loss of each system with its interval, the paired difference and the verdict; a row is a picture.

    `losses` are sums of squared errors over fixed timesteps, `tokens` the number of timesteps.
    """
    roles: tuple[tuple[RowLosses, Role], ...] = ((adapter, "adapter"), (base, "base"))
    comparison = replace(compare_losses(adapter, base, spec), metric=METRIC)
    independent = len(captions) if adapter.groups is None else len(set(adapter.groups))
    return Report(
        title,
        task="image",
        systems=tuple(SystemResult(rows.system, role, {METRIC: measure_losses(rows, spec)["loss"]}) for rows, role in roles),
        comparisons=(comparison,),
        verdict=verdict_of((comparison,)),
        rows=largest_changes(adapter, base, captions, sources, sources, spec),
        rows_of=len(captions),
        warnings=too_few(len(captions), independent),
    )


def with_distances(report: Report, distances: Mapping[str, tuple[RowLosses, RowLosses]], spec: EvaluateSpec) -> Report:
    """Adds metrics by name, each of (adapter, base) on the same samples; lower is better.

    The verdict stays that of the denoising loss: samples are few, and the encoder is only a second opinion.
    """
    adapter, base = report.systems
    comparisons = list(report.comparisons)
    for name, (mine, other) in distances.items():
        adapter = replace(adapter, metrics={**adapter.metrics, name: measure_losses(mine, spec)["loss"]})
        base = replace(base, metrics={**base.metrics, name: measure_losses(other, spec)["loss"]})
        comparisons.append(replace(compare_losses(mine, other, spec), metric=name))
    return replace(report, systems=(adapter, base), comparisons=tuple(comparisons))


def too_few(pictures: int, groups: int | None = None) -> tuple[str, ...]:
    """A warning if there are too few evaluation pictures to show any difference.

    `groups` is the number of pictures without copies of each other.
    """
    count = pictures if groups is None else groups
    if count >= FEWEST:
        return ()
    said = f"Only {count} pictures are held out"
    if count < pictures:
        said = f"The {pictures} held-out pictures are {count} and copies of these"
    return (
        f"{said}: too few for an interval, so no difference can be shown. "
        f"Hold out {FEWEST} or more (data.held_out_fraction, or a folder as data.held_out).",
    )


def nearest_distances(pictures: Floats, training: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """For each of `pictures` (n, features), the cosine distance to its nearest of `training` (m, features), and the index.

    The mean of `training` is subtracted from all features.
    """
    if not len(training) or pictures.shape[1:] != training.shape[1:]:
        raise DataError(f"{pictures.shape} features cannot be compared with {training.shape}; expected as many for each picture.")
    centre = training.mean(0)
    distance = 1 - _unit(pictures - centre) @ _unit(training - centre).T
    nearest = distance.argmin(1)
    return distance[np.arange(len(nearest)), nearest], nearest.astype(np.int64)


def _unit(rows: Floats) -> Floats:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(length, np.finfo(np.float64).tiny))
