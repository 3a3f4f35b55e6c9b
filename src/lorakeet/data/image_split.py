"""Pictures parted into training and held-out ones by their content; copies and near-copies stay on one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lorakeet.data.image_spec import ImageSpec
from lorakeet.data.image_tables import is_table, unpacked
from lorakeet.data.images import HASH_SIDE, ImageRow, read_album
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import split_record, split_rows
from lorakeet.errors import DataError

_CHUNK = 1024


@dataclass(frozen=True)
class Alike:
    """A picture to learn from that is nearly one to judge by: in how many of 256 bits they differ, and what was done."""

    train: ImageRow
    judged: ImageRow
    bits: int
    action: str


@dataclass(frozen=True)
class ImageDataset:
    """The pictures of a run, in an order that depends on content and seed only."""

    train: tuple[ImageRow, ...]
    held_out: tuple[ImageRow, ...]
    test: tuple[ImageRow, ...]
    alike: tuple[Alike, ...]
    remarks: tuple[str, ...]
    prior: tuple[ImageRow, ...] = ()  # of the subject's kind

    @property
    def judged(self) -> tuple[str, tuple[ImageRow, ...]]:
        """The pictures that the verdict is about, and what they are called: the test ones, or else the held-out ones."""
        return ("test", self.test) if self.test else ("held-out", self.held_out)

    def split_record(self) -> dict[str, object]:
        """The content of split.json."""
        train, held_out, test = ([_as_row(row, None) for row in part] for part in (self.train, self.held_out, self.test))
        return split_record(train, held_out, test)


def load_images(data: DataSpec, images: ImageSpec, *, tables: Path) -> ImageDataset:
    """The pictures that `data` names, split and compared; those in tables are unpacked below `tables`.

    DataError for what cannot be used, and where nothing is held out.
    """
    album = read_album(_folder(data.train, tables, data.limit), images, limit=data.limit)
    remarks = list(album.remarks)
    held_out = _other_album(data.held_out, images, tables, remarks)
    test = _other_album(data.test, images, tables, remarks)
    of_prior = replace(images, caption=images.prior_caption)
    train = album.rows
    if not data.held_out:
        train, held_out = _parted(train, data, images)
    train, alike = _without_leaks(train, (*held_out, *test), data, images)
    if not held_out:
        raise DataError(
            "No pictures are held out, so nothing could be proved; set data.held_out_fraction above 0, or name a folder as "
            "data.held_out."
        )
    if not train:
        raise DataError("Every training picture is also a held-out or test one; give other pictures, or set data.on_leak keep.")
    prior, known = _without_leaks(_other_album(images.prior, of_prior, tables, remarks), (*held_out, *test), data, images)
    return ImageDataset(train, held_out, test, (*alike, *known), tuple(remarks), prior)


def _folder(name: str, tables: Path, limit: int | None = None) -> Path:
    return unpacked(name, tables, limit=limit) if is_table(name) else Path(name).expanduser()


def _other_album(name: str | None, spec: ImageSpec, tables: Path, remarks: list[str]) -> tuple[ImageRow, ...]:
    if not name:
        return ()
    album = read_album(_folder(name, tables), spec)
    remarks += album.remarks
    return album.rows


def _parted(rows: Sequence[ImageRow], data: DataSpec, images: ImageSpec) -> tuple[tuple[ImageRow, ...], tuple[ImageRow, ...]]:
    groups = alike_groups([row.looks for row in rows], images.near_duplicates)
    plain = {row.source: row for row in rows}
    split = split_rows([_as_row(row, f"pictures {group}") for row, group in zip(rows, groups, strict=True)], data)
    return tuple(plain[row.source] for row in split.train), tuple(plain[row.source] for row in split.held_out)


def _without_leaks(
    train: Sequence[ImageRow], judged: Sequence[ImageRow], data: DataSpec, images: ImageSpec
) -> tuple[tuple[ImageRow, ...], tuple[Alike, ...]]:
    """The training pictures that are not nearly one of `judged`, and the pairs that were found."""
    if not judged or not train:
        return tuple(train), ()
    bits = distances([row.looks for row in train], [row.looks for row in judged])
    found, kept = [], []
    for row, near in zip(train, bits, strict=True):
        place = int(near.argmin())
        twin = next((other for other in judged if other.pixels_key == row.pixels_key), None)
        if twin is None and near[place] <= images.near_duplicates and images.near_duplicates:
            twin = judged[place]
        if twin is not None:
            apart = int(distances([row.looks], [twin.looks])[0, 0])
            found.append(Alike(row, twin, apart, "kept" if data.on_leak == "keep" else "dropped from training"))
        if twin is None or data.on_leak == "keep":
            kept.append(row)
    if found and data.on_leak == "refuse":
        named = ", ".join(f"{one.train.source} is nearly {one.judged.source}" for one in found[:5])
        raise DataError(f"{len(found)} training pictures are also judged by ({named}). Remove them, or set data.on_leak drop.")
    return tuple(kept), tuple(found)


def alike_groups(looks: Sequence[int], bits: int) -> list[int]:
    """A group number for each hash; hashes that differ in at most `bits` bits, directly or through others, share one."""
    parent = list(range(len(looks)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for start in range(0, len(looks), _CHUNK):
        near = distances(looks[start : start + _CHUNK], looks) <= bits
        for left, right in zip(*np.nonzero(near), strict=True):
            parent[root(start + int(left))] = root(int(right))
    return [root(place) for place in range(len(looks))]


def distances(left: Sequence[int], right: Sequence[int]) -> NDArray[np.int64]:
    """In how many bits each hash of `left` differs from each of `right` (left, right)."""
    ones, others = _bits(left), _bits(right)
    return np.asarray(ones @ (1 - others).T + (1 - ones) @ others.T).round().astype(np.int64)


def _bits(looks: Sequence[int]) -> NDArray[np.float32]:
    count = HASH_SIDE * HASH_SIDE
    raw = np.frombuffer(b"".join(value.to_bytes(count // 8, "big") for value in looks), np.uint8)
    return np.unpackbits(raw).reshape(len(looks), count).astype(np.float32)


def _as_row(row: ImageRow, group: str | None) -> Row:
    return Row((Turn("", f"{row.pixels_key} {row.caption}", True),), None, group, row.source)
