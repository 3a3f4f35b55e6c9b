"""Registration finds the cut that was made and the tone that was changed; what is left is a share of the variance."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from lorakeet.kinds.images.data.folder import thumb_of
from lorakeet.kinds.images.data.match import (
    LEVELS,
    Floats,
    Prints,
    _fitted,
    _sampling,
    compared,
    enough_detail,
    level,
    read_prints,
)

PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]
YES = np.ones(1, bool)


def prints(image: Image.Image) -> Prints:
    return read_prints([thumb_of(np.asarray(image))])


def climbed(one: Prints, other: Prints) -> tuple[float, Floats]:
    """The share that is left at the finest level, and the warp, each level begun with that of the one above."""
    warp, left = np.zeros((1, 4), np.float32), np.ones(1, np.float32)
    for side in LEVELS:
        left, warp = compared(level(one, side), level(other, side), warp, YES, YES, np.array([400.0], np.float32))
    return float(left[0]), warp


@pytest.mark.parametrize("photo", PHOTOS)
def test_a_cut_is_found_where_it_was_made(photo: Image.Image) -> None:
    wide, high = photo.size
    cut = photo.crop((round(0.03 * wide), 0, wide, round(0.98 * high)))
    left, warp = climbed(prints(photo), prints(cut))
    assert left < 0.05
    np.testing.assert_allclose(warp[0], [0.03, 0, 0, -0.02], atol=0.004)


@pytest.mark.parametrize("photo", PHOTOS)
def test_another_contrast_is_a_gain(photo: Image.Image) -> None:
    paler = ImageEnhance.Contrast(photo).enhance(0.7)  # nothing is clipped by that
    fit = _fitted(level(prints(photo), 64), level(prints(paler), 64), np.zeros((1, 4), np.float32), YES, YES)
    assert abs(float(fit.tone[0, 0, 0]) - 0.7) < 0.02 and climbed(prints(photo), prints(paler))[0] < 0.01


def test_two_photos_are_none() -> None:
    assert climbed(prints(PHOTOS[0]), prints(PHOTOS[1]))[0] == 1


def test_what_is_reported_by_detail() -> None:
    flat = Image.new("RGB", (256, 256), "grey")
    spot = Image.new("RGB", (256, 256), "grey")
    spot.paste("black", (120, 120, 136, 136))
    tone, cut = enough_detail(np.concatenate([prints(image).light for image in (PHOTOS[0], flat, spot)]))
    assert tone.tolist() == [True, False, False] and cut.tolist() == [True, False, False]


def test_prints_are_what_a_thumb_holds() -> None:
    grey = Image.new("RGB", (100, 80), (200, 200, 200))
    grey.paste("white", (0, 0, 50, 80))
    found = prints(grey)
    assert found.light.shape == (1, 64, 64) and found.colour.shape == (1, 2, 16, 16) and not found.colour.any()
    assert found.clipped[0, 0, :, :31].all() and not found.clipped[0, 0, :, 33:].any() and not found.clipped[0, 1].any()
    assert np.array_equal(found.mirrored().light[..., ::-1], found.light)


def test_sampling_where_places_are_changes_nothing() -> None:
    place = ((np.arange(16) + 0.5) / 16).astype(np.float32)
    np.testing.assert_allclose(_sampling(place[None])[0], np.eye(16), atol=1e-5)
