"""Drawn samples side by side, and how near each one comes to a picture that was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorakeet.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One picture as base64 of a PNG; `column` says with which weight of the adapter it was drawn."""

    column: str
    png: str


@dataclass(frozen=True)
class SampleRow:
    """The same prompt and seed, drawn with each weight."""

    prompt: str
    seed: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class SampleGrid:
    """Prompts × weights of the adapter, at equal seeds."""

    columns: tuple[str, ...]
    rows: tuple[SampleRow, ...]
    detail: str = ""  # sampler, steps, guidance


@dataclass(frozen=True)
class Near:
    """A sample and the training picture that is nearest to it."""

    prompt: str
    seed: int
    column: str
    source: str  # of the training picture
    distance: float
    suspicious: bool


@dataclass(frozen=True)
class Memorisation:
    """Whether samples repeat training pictures: each sample's nearest one, against how near judged pictures come.

    `floor` is the distance at which a judged picture, which was not trained on, comes nearest to a training picture: a sample
    that is nearer than that is suspicious. `typical` is the median of the judged pictures' nearest distances.
    """

    nearest: tuple[Near, ...]
    floor: float
    typical: float
    evaluated: int = field(metadata={"key": "judged"})
    space: str  # what the distance is measured in

    @property
    def suspicious(self) -> int:
        return sum(near.suspicious for near in self.nearest)


def nearest_distances(pictures: Floats, training: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """For each of `pictures` (n, features) the cosine distance 1 − cos to its nearest of `training` (m, features), and its place.

    All features have the mean of `training` taken off, so that what every picture shares does not count.
    """
    if not len(training) or pictures.shape[1:] != training.shape[1:]:
        raise DataError(f"{pictures.shape} features cannot be compared with {training.shape}; expected as many for each picture.")
    centre = training.mean(0)
    distance = 1 - _unit(pictures - centre) @ _unit(training - centre).T
    place = distance.argmin(1)
    return distance[np.arange(len(place)), place], place.astype(np.int64)


def _unit(rows: Floats) -> Floats:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(length, np.finfo(np.float64).tiny))
