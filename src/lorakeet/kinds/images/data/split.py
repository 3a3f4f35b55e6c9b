"""Splits pictures into training and held-out ones by content; copies and near-copies stay on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import split_record, split_rows
from lorakeet.errors import DataError, Remedy
from lorakeet.kinds.images.data.folder import ImageRow, is_table, read_album, unpack_pictures
from lorakeet.kinds.images.data.near_duplicates import Copy, DuplicatePairs, copies, duplicate_groups, duplicate_pairs
from lorakeet.kinds.images.spec import ImageSpec

ENOUGH, MANY = 6, 20  # fewest independent pictures that can show a difference; albums of MANY or more hold out at least ENOUGH
MUCH = 0.3  # share of an album that are copies of one picture; above it, they may be one scene and not one photo
_OWN_SPLIT = DataSpec().held_out_fraction


@dataclass(frozen=True)
class NearDuplicate:
    """A picture that shows the same photo as an evaluation picture: how they differ, and what was done with the first."""

    train: str  # its ImageRow.source
    evaluated: str  # the ImageRow.source of the other
    caption: str  # of the first
    apart: float  # share of the variance that differs
    words: str
    action: str


@dataclass(frozen=True)
class ImageDataset:
    """The pictures of a run, in an order that depends on content and seed only."""

    train: tuple[ImageRow, ...]
    held_out: tuple[ImageRow, ...]
    test: tuple[ImageRow, ...]
    alike: tuple[NearDuplicate, ...]
    remarks: tuple[str, ...]
    prior: tuple[ImageRow, ...] = ()  # of the subject's kind
    groups: tuple[int, ...] | None = None  # of the evaluation pictures (`evaluation_groups`)

    @property
    def evaluation(self) -> tuple[str, tuple[ImageRow, ...]]:
        """The name and the pictures that the verdict is about: the test pictures, or else the held-out ones."""
        return ("test", self.test) if self.test else ("held-out", self.held_out)

    def split_record(self) -> dict[str, object]:
        """The hashes in split.json; kinds/images/data/record adds the pictures themselves."""
        train, held_out, test = ([_as_row(row, None) for row in part] for part in (self.train, self.held_out, self.test))
        return split_record(train, held_out, test)


def load_images(data: DataSpec, images: ImageSpec, *, tables: Path) -> ImageDataset:
    """Loads, splits and compares the pictures that `data` names; tables are unpacked below `tables`.

    Raises DataError for unusable pictures, and if none is held out.
    """
    album = read_album(album_folder(data.train, tables, data.limit), images, limit=data.limit)
    remarks = list(album.remarks)
    held_out = _other_album(data.held_out, images, tables, remarks, "data.held_out")
    test = _other_album(data.test, images, tables, remarks, "data.test")
    of_prior = replace(images, caption=images.prior_caption)
    train = album.rows
    policy = data.on_leak
    if not data.held_out:
        train, held_out = _split_off(train, data, images, remarks)
        policy = "keep" if policy == "keep" else "drop"  # an own split cannot be refused: the files are not at fault
    held_out, in_test = _without_leaks(held_out, test, images, policy=data.on_leak, part="held-out")
    if in_test and not held_out:
        raise DataError("Every held-out picture is also a test one; give other pictures, or set data.on_leak keep.")
    train, alike = _without_leaks(train, (*held_out, *test), images, policy=policy)
    if not held_out:
        raise DataError(
            "No pictures are held out, so nothing can be measured; set data.held_out_fraction above 0, or name a folder as "
            "data.held_out."
        )
    if not train:
        raise DataError("Every training picture is also a held-out or test one; give other pictures, or set data.on_leak keep.")
    prior = _other_album(images.prior, of_prior, tables, remarks, "images.prior")
    prior, known = _without_leaks(prior, (*held_out, *test), images, policy=data.on_leak)
    groups = evaluation_groups(test or held_out, images)
    return ImageDataset(train, held_out, test, (*in_test, *alike, *known), tuple(remarks), prior, groups)


def album_folder(name: str, tables: Path, limit: int | None = None) -> Path:
    """The folder of pictures that a setting names; a table is unpacked below `tables`."""
    return unpack_pictures(name, tables, limit=limit) if is_table(name) else Path(name).expanduser()


def _other_album(name: str | None, spec: ImageSpec, tables: Path, remarks: list[str], setting: str) -> tuple[ImageRow, ...]:
    if not name:
        return ()
    album = read_album(album_folder(name, tables), spec, setting=setting)
    remarks += album.remarks
    return album.rows


def _split_off(
    rows: Sequence[ImageRow], data: DataSpec, images: ImageSpec, remarks: list[str]
) -> tuple[tuple[ImageRow, ...], tuple[ImageRow, ...]]:
    """Training and held-out pictures. With the default `data.held_out_fraction`, MANY or more hold out at least ENOUGH.

    If much of an album are copies of one picture, a remark, or the DataError of the split, names two of them.
    """
    alike = duplicate_pairs(rows, images.near_duplicates)
    said = _mostly_copies(rows, alike.groups())
    try:
        parts = _split(rows, alike, data)
    except DataError as error:
        raise DataError(f"{error} {said}" if said else str(error)) from error
    if said:
        remarks.append(said)
    return parts


def _mostly_copies(rows: Sequence[ImageRow], groups: Sequence[int]) -> str:
    """A remark if more than MUCH of the pictures are copies of one; empty otherwise."""
    largest = [group for group, _ in Counter(groups).most_common(1)]
    members = [row for row, group in zip(rows, groups, strict=True) if group in largest]
    if len(members) < 2 or len(members) <= MUCH * len(rows):
        return ""
    one, other = members[0].source, members[1].source
    return (
        f"{len(members)} of {len(rows)} pictures look like copies of one, such as {one} and {other}. If they are "
        "different pictures (one pose, scene or background colour), set images.near_duplicates 0 to drop only equal ones."
    )


def _split(rows: Sequence[ImageRow], alike: DuplicatePairs, data: DataSpec) -> tuple[tuple[ImageRow, ...], tuple[ImageRow, ...]]:
    """Training and held-out pictures. ENOUGH counts the groups of the held-out pictures alone, as in evaluation.

    These may be fewer than the album's groups of them, since the middle of a group may stay in training.
    """
    plain = {row.source: row for row in rows}
    index_of = {row.source: index for index, row in enumerate(rows)}
    groups = alike.groups()
    given = [_as_row(row, f"pictures {group}") for row, group in zip(rows, groups, strict=True)]
    split = split_rows(given, data)
    if data.held_out_fraction == _OWN_SPLIT and len(set(groups)) >= MANY:
        wanted = max(ENOUGH, len(split.held_out))
        while len(set(alike.groups([index_of[row.source] for row in split.held_out]))) < ENOUGH and wanted <= len(rows) // 2:
            split = split_rows(given, replace(data, held_out_fraction=wanted / len(rows), held_out_minimum=0))
            wanted += 1
    return tuple(plain[row.source] for row in split.train), tuple(plain[row.source] for row in split.held_out)


def evaluation_groups(rows: Sequence[ImageRow], images: ImageSpec) -> tuple[int, ...] | None:
    """A group number for each evaluation picture if some are copies of others; None if all are independent."""
    groups = duplicate_groups(rows, images.near_duplicates)
    return None if len(set(groups)) == len(groups) else tuple(groups)


def _without_leaks(
    rows: Sequence[ImageRow], evaluated: Sequence[ImageRow], images: ImageSpec, *, policy: str, part: str = "training"
) -> tuple[tuple[ImageRow, ...], tuple[NearDuplicate, ...]]:
    """The pictures of `part` without copies of `evaluated` (mirrored ones included), and the nearest match of each copy."""
    nearest: dict[int, Copy] = {}
    for copy in copies(rows, evaluated, images.near_duplicates):
        if copy.left not in nearest or (copy.apart, copy.right) < (nearest[copy.left].apart, nearest[copy.left].right):
            nearest[copy.left] = copy
    action = "kept" if policy == "keep" else f"dropped from {part}"
    found = tuple(
        NearDuplicate(rows[place].source, evaluated[copy.right].source, rows[place].caption, copy.apart, copy.words, action)
        for place, copy in sorted(nearest.items())
    )
    if found and policy == "refuse":
        named = ", ".join(f"{one.train} is nearly {one.evaluated}" for one in found[:5])
        remedy = "Remove them, or set data.on_leak drop."
        said = f"{len(found)} {part} pictures are also evaluation pictures ({named}). {remedy}"
        raise DataError(said, code="rows-leak", remedies=[Remedy("data.on_leak", "drop", "Leave copies out of training")])
    return tuple(row for place, row in enumerate(rows) if policy == "keep" or place not in nearest), found


def _as_row(row: ImageRow, group: str | None) -> Row:
    return Row((Turn("", f"{row.pixels_key} {row.caption}", True),), None, group, row.source)
