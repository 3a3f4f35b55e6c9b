"""Copies of one photo are found whatever was done to it; different objects on one ground are not copies."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from lorakeet.kinds.images.data.folder import ImageRow, difference_hash_of, thumb_of
from lorakeet.kinds.images.data.near_duplicates import DuplicatePairs, copies, duplicate_groups
from tiny.scenes import DIFFERENT, SAME, draw_shape, garment, on_a_ramp

Picture = Image.Image
PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def row(image: Picture) -> ImageRow:
    pixels = np.asarray(image)
    return ImageRow(
        Path(),
        "",
        image.width,
        image.height,
        hashlib.sha256(pixels.tobytes()).hexdigest(),
        difference_hash_of(pixels),
        "x",
        thumb_of(pixels),
    )


def product(number: int, share: float, *, side: int = 256) -> Picture:
    """A coloured object of one of five shapes, about `share` of the side wide, in the middle of a white ground."""
    generator = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), "white")
    x, y = side / 2 + generator.uniform(-0.04, 0.04, 2) * side
    wide, high = share * side / 2 * generator.uniform(0.6, 1, 2)
    colour = tuple(int(value) for value in generator.integers(20, 200, 3))
    draw_shape(image, number % 5, (x, y), (wide, high), colour, line=int(share * side / 6), inner="black")
    return image


def jpeg(image: Picture) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=50)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def cut(image: Picture, share: float = 0.02) -> Picture:
    return image.crop((round(image.width * share), 0, image.width, round(image.height * (1 - share))))


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "encoded anew": jpeg,
    "smaller": lambda image: image.resize((image.width // 3, image.height // 3)),
    "cut": cut,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "of less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "mirrored": ImageOps.mirror,
    "mirrored and encoded": lambda image: jpeg(ImageOps.mirror(image)),
}


def pairs(left: Sequence[Picture], right: Sequence[Picture], bits: int = 8) -> set[tuple[int, int]]:
    return {(copy.left, copy.right) for copy in copies([row(one) for one in left], [row(one) for one in right], bits)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_photo_is_still_the_photo(change: str) -> None:
    pictures = [*PHOTOS, *(product(number, 0.6) for number in range(5))]
    changed = [CHANGES[change](picture) for picture in pictures]
    assert pairs(pictures, changed) == {(number, number) for number in range(7)}
    equal = {(number, number) for number in range(7) if row(pictures[number]).pixels_key == row(changed[number]).pixels_key}
    assert pairs(pictures, changed, bits=0) == equal  # a box in its own mirror


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_products_on_a_plain_ground_are_different_pictures(share: float) -> None:
    pictures = [row(product(number, share)) for number in range(40)]
    near = [(one.difference_hash ^ other.difference_hash).bit_count() <= 8 for one in pictures for other in pictures]
    assert share > 0.4 or sum(near) > 200  # which their hashes alone would call copies
    assert len(set(duplicate_groups(pictures, 8))) == 40


def test_flat_pictures_are_recognised_by_their_colour() -> None:
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", (251, 2, 3))]
    assert pairs(flat[:1], flat[1:]) == {(0, 1)}


def test_how_they_differ_is_said() -> None:
    photo = row(PHOTOS[0])
    [same] = copies([photo], [photo], 8)
    [turned] = copies([photo], [row(ImageOps.mirror(PHOTOS[0]))], 8)
    [encoded] = copies([photo], [row(jpeg(PHOTOS[0]))], 8)
    assert same.words == "no pixel differs" and turned.words.startswith("mirrored")
    assert encoded.words.endswith("% of its contrast differs") and 0 < encoded.apart < 0.005


def test_a_chain_of_pictures_is_not_one_photo() -> None:
    chain = [row(PHOTOS[0].crop((6 * step, 0, 500 + 6 * step, 400))) for step in range(20)]
    near = {pair for copy in copies(chain, chain, 8) for pair in ((copy.left, copy.right), (copy.right, copy.left))}
    assert all((step, step + 1) in near for step in range(19)) and (0, 19) not in near
    groups = duplicate_groups(chain, 8)
    assert len(set(groups)) > 1
    for group in set(groups):
        members = [place for place, other in enumerate(groups) if other == group]
        assert any(all(one == other or (one, other) in near for other in members) for one in members)


def test_more_pictures_than_are_compared_at_once_give_the_same() -> None:
    many = [product(number, 0.5, side=64) for number in range(300)]
    twins = [jpeg(many[number]) for number in (3, 280)]
    found = pairs(many, [*twins, *PHOTOS])
    assert {(3, 0), (280, 1)} <= found and not any(right > 1 for _, right in found)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_alike_pictures_are_different_ones(kind: str) -> None:
    pictures = [row(DIFFERENT[kind](number)) for number in range(14)]
    assert len(set(duplicate_groups(pictures, 8))) == 14


def test_parts_of_a_photo_are_different_pictures() -> None:
    parts = [row(photo.crop((x, y, x + 210, y + 210))) for photo in PHOTOS for x in (0, 215, 430) for y in (0, 215)]
    assert len(set(duplicate_groups(parts, 8))) == 12


@pytest.mark.parametrize("change", SAME)
def test_an_edited_photo_is_found_and_no_other(change: str) -> None:
    photos = [photo.crop((x, y, x + 320, y + 320)) for photo in PHOTOS for x in (0, 320) for y in (0, 107)]
    originals = [photos[place] for place in (0, 3, 4, 7)]  # that share nothing
    found = pairs(originals, [SAME[change](photo) for photo in originals])
    assert found == {(place, place) for place in range(4)}


def test_small_pictures_coded_anew_are_found() -> None:
    small = [photo.crop((x, 0, x + 400, 400)).resize((64, 64)) for photo in PHOTOS for x in (0, 240)]
    small += [garment(number) for number in range(3, 6)]
    assert pairs(small, [jpeg(picture) for picture in small]) >= {(place, place) for place in range(7)}


def test_trousers_of_another_colour_of_the_same_luminance_are_others() -> None:
    def dressed(*trousers: int) -> Picture:
        image = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(image)
        draw.polygon([(60, 40), (196, 40), (220, 90), (180, 90), (180, 130), (76, 130), (76, 90), (36, 90)], (60, 90, 160))
        draw.polygon([(76, 132), (180, 132), (186, 240), (140, 240), (128, 170), (116, 240), (70, 240)], trousers)
        return image

    pictures = [dressed(255, 30, 30), dressed(0, 166, 0), dressed(150, 74, 74), dressed(97, 97, 97)]  # two are clipped
    assert pairs(pictures, pictures) == {(place, place) for place in range(4)}


def test_a_ground_without_detail_is_compared_as_it_lies() -> None:
    plain = on_a_ramp(0).crop((0, 0, 256, 90))
    darker = SAME["brightness 0.8"](plain)
    assert pairs([plain], [SAME["JPEG 50"](plain)]) == {(0, 0)} and not pairs([plain], [darker])


def test_groups_of_some_pictures_are_those_they_would_have_alone() -> None:
    pairs_of = np.array([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (4, 6)], np.int32)  # a chain, and 4 with three others
    found = DuplicatePairs(tuple("bcadefg"), pairs_of)
    album = found.groups()
    assert len({album[place] for place in (0, 1, 2)}) == 2
    assert len(set(found.groups([0, 1, 2]))) == 1
