"""How near samples are to training pictures, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.report.samples import Memorisation, Near, nearest_distances


def test_distances_are_cosines_around_the_mean_of_training() -> None:
    training = np.array([[3.0, 1.0], [1.0, 3.0], [-1.0, 1.0], [1.0, -1.0]])  # their mean is (1, 1)
    distances, places = nearest_distances(np.array([[5.0, 1.0], [1.0, 1.5], [2.0, 2.0]]), training)
    assert places[:2].tolist() == [0, 1]
    np.testing.assert_allclose(distances, [0.0, 0.0, 1 - np.sqrt(0.5)], atol=1e-12)


def test_a_copy_is_nearer_than_anything_else() -> None:
    generator = np.random.default_rng(0)
    training, others = generator.normal(size=(20, 64)), generator.normal(size=(10, 64))
    far, _ = nearest_distances(others, training)
    near, place = nearest_distances(training[7:8] + 0.01 * generator.normal(size=(1, 64)), training)
    assert place[0] == 7 and near[0] < 0.01 < far.min()


def test_features_must_fit() -> None:
    with pytest.raises(DataError, match=r"\(1, 3\) features cannot be compared with \(2, 4\)"):
        nearest_distances(np.zeros((1, 3)), np.zeros((2, 4)))


def test_suspicious_samples_are_counted() -> None:
    near = [Near("p", 0, "base", "a.png", distance, distance < 0.2) for distance in (0.1, 0.3)]
    assert Memorisation(tuple(near), 0.2, 0.5, 8, "x").suspicious == 1
