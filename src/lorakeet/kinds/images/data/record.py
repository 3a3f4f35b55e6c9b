"""Records the pictures of a run in split.json, and finds the same ones again on resume.

A resumed run is not split again: neither new pictures in its folders nor new rules about copies change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.kinds.images.data.folder import ImageRow, names_in, read_named, require_folder
from lorakeet.kinds.images.data.split import ImageDataset, NearDuplicate, album_folder
from lorakeet.kinds.images.spec import ImageSpec

PARTS = ("train", "held_out", "test", "prior")
_SPLITTING = ("held_out_fraction", "held_out_minimum", "split_seed", "on_leak", "limit")
_FOLDERS = ("held_out", "test")
_SHOWN = 12
_KEYS = {"evaluated": "judged"}  # keys of split.json that differ from the name of the field
_NAMES = {key: name for name, key in _KEYS.items()}


@dataclass(frozen=True)
class RecordedImage:
    """A picture as recorded in split.json."""

    file: str
    pixels: str  # ImageRow.pixels_key
    caption: str

    @property
    def content(self) -> tuple[str, str]:
        return self.pixels, self.caption


def image_record(dataset: ImageDataset, data: DataSpec) -> dict[str, object]:
    """The content of split.json: hashes of each part, its pictures in order, near-duplicates and remarks."""
    pictures = {
        part: [asdict(RecordedImage(row.source, row.pixels_key, row.caption)) for row in getattr(dataset, part)] for part in PARTS
    }
    return {
        **dataset.split_record(),
        "split_by": _split_by(data),
        "pictures": pictures,
        "judged_groups": None if dataset.groups is None else list(dataset.groups),
        "alike": [{_KEYS.get(name, name): value for name, value in asdict(one).items()} for one in dataset.alike],
        "remarks": list(dataset.remarks),
    }


def recorded_images(
    record: Mapping[str, Any], data: DataSpec, images: ImageSpec, *, tables: Path, run: Path
) -> ImageDataset | None:
    """Finds the pictures of `run` again by its split.json; None if its version did not name them.

    A picture is identified by pixels and caption, so it may have been renamed within its folder. Raises DataError that names
    every missing or changed picture, ConfigError that names every changed setting of the split.
    """
    if "pictures" not in record:
        return None
    try:
        known = {part: [RecordedImage(**entry) for entry in record["pictures"][part]] for part in PARTS}
        groups = record["judged_groups"]
        alike = tuple(NearDuplicate(**{_NAMES.get(key, key): value for key, value in entry.items()}) for entry in record["alike"])
        remarks, split_by = tuple(record["remarks"]), dict(record["split_by"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"split.json of {run} cannot be read ({error!r}); restore it, or start a new run.") from error
    _require_same_split(split_by, _split_by(data), run)
    problems = Problems(
        f"The pictures of {run} have changed since it started", DataError,
        remedy="Restore the old pictures, or start a new run with another --out.", shown=_SHOWN,
    )  # fmt: skip
    spec_of_prior = replace(images, caption=images.prior_caption)
    named = (
        ("train", "data.train", data.train, images),
        ("held_out", "data.held_out" if data.held_out else "data.train", data.held_out or data.train, images),
        ("test", "data.test", data.test, images),
        ("prior", "images.prior", images.prior, spec_of_prior),
    )
    found: dict[str, tuple[ImageRow, ...]] = {}
    folders: dict[str, Path] = {}
    for part, setting, name, spec in named:
        if not known[part] or not name:
            found[part] = ()
            continue
        if setting not in folders:
            folders[setting] = album_folder(name, tables, data.limit if setting == "data.train" else None)
            require_folder(folders[setting], setting)
        found[part] = _again(folders[setting], known[part], spec, problems)
    problems.raise_if_any()
    return ImageDataset(
        found["train"], found["held_out"], found["test"], alike, remarks, found["prior"],
        None if groups is None else tuple(groups),
    )  # fmt: skip


def _again(folder: Path, known: Sequence[RecordedImage], spec: ImageSpec, problems: Problems) -> tuple[ImageRow, ...]:
    """The known pictures in order, found by name, else under another name in the same folder; adds a problem if missing."""
    rows = list(read_named(folder, [one.file for one in known], spec))
    shown = (None if row is None else (row.pixels_key, row.caption) for row in rows)
    right = {one.file for one, content in zip(known, shown, strict=True) if content == one.content}
    missing = [place for place, one in enumerate(known) if one.file not in right]
    if missing:
        others = [name for name in names_in(folder) if name not in right]
        elsewhere = {(row.pixels_key, row.caption): row for row in read_named(folder, others, spec) if row is not None}
        for place in missing:
            now, rows[place] = rows[place], elsewhere.get(known[place].content)
            if rows[place] is None:
                problems.add(_difference(folder, known[place], now))
    return tuple(row for row in rows if row is not None)


def _difference(folder: Path, one: RecordedImage, now: ImageRow | None) -> str:
    path = folder / one.file
    if now is None:
        return f"{path} {'cannot be used: its picture or its caption cannot be read' if path.is_file() else 'is gone'}."
    if now.pixels_key != one.pixels:
        return f"{path} shows another picture."
    return f"The caption of {path} was '{one.caption}' and is '{now.caption}'."


def _split_by(data: DataSpec) -> dict[str, Any]:
    """The settings of the split. A folder may move, so only whether one is given is recorded."""
    return {**{name: getattr(data, name) for name in _SPLITTING}, **{name: bool(getattr(data, name)) for name in _FOLDERS}}


def _require_same_split(before: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    problems = Problems(
        f"The run {run} cannot be resumed with another split", ConfigError,
        remedy="Use the old values to resume, or start a new run with another --out.",
    )  # fmt: skip
    for name in sorted(before.keys() & now.keys()):  # a setting that is newer than the run had no effect on its split
        if before[name] == now[name]:
            continue
        words: dict[Any, str] = {True: "a folder", False: "none"} if name in _FOLDERS else {}
        was, said = (words.get(value, repr(value)) for value in (before[name], now[name]))
        problems.add(f"data.{name} was {was} when {run} started and is {said} now.")
    problems.raise_if_any()
