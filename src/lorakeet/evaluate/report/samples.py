"""Samples side by side, and their distances from training pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorakeet.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One picture as base64 of a PNG; `column` names the adapter weight it was drawn with."""

    column: str
    png: str


@dataclass(frozen=True)
class SampleRow:
    """Samples of one prompt and seed, one for each weight."""

    prompt: str
    seed: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class SampleGrid:
    """Prompts × adapter weights, at equal seeds."""

    columns: tuple[str, ...]
    rows: tuple[SampleRow, ...]
    detail: str = ""  # sampler, steps, guidance


@dataclass(frozen=True)
class Near:
    """A sample and its nearest training picture."""

    prompt: str
    seed: int
    column: str
    source: str  # of the training picture
    distance: float
    suspicious: bool


@dataclass(frozen=True)
class Memorisation:
    """Checks samples for repeated training pictures, with the evaluation pictures as reference.

    `floor` is the least distance of an evaluation picture (not trained on) from a training picture; a nearer sample is
    suspicious. `typical` is the median of the evaluation pictures' nearest distances.
    """

    nearest: tuple[Near, ...]
    floor: float
    typical: float
    evaluated: int = field(metadata={"key": "judged"})
    space: str  # the space of the distance

    @property
    def suspicious(self) -> int:
        return sum(near.suspicious for near in self.nearest)


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
