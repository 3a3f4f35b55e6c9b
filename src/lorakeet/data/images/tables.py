"""Unpacks pictures from Parquet files, `datasets` folders and hub ids into a folder that data/images/folder reads."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorakeet.data.columns import HUB, is_hub_id
from lorakeet.data.images.folder import CAPTION_COLUMNS
from lorakeet.data.read import read_records
from lorakeet.data.tables import RowProblems
from lorakeet.errors import DataError

_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp", b"II*\x00": ".tif",
          b"MM\x00*": ".tif"}  # fmt: skip


def is_table(name: str) -> bool:
    """True if `name` is a table with pictures, false for a folder of picture files."""
    base, mark, _ = name.partition("#")
    folder = Path(base).expanduser()
    if folder.is_dir():
        return bool(mark) or any((folder / file).exists() for file in _SAVED)
    return name.lower().endswith(".parquet") or name.startswith(HUB) or is_hub_id(name)


def unpack_pictures(name: str, into: Path, *, limit: int | None = None) -> Path:
    """Writes the pictures of the table `name`, byte for byte, and their captions in metadata.jsonl to a folder below `into`.

    The picture is in the first column that has one (datasets' image feature, or plain bytes), the caption in text, caption or
    prompt. The folder's name is a hash of its content. Raises DataError that names rows without a picture.
    """
    partial = into / f"unpacking-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    found, lines = hashlib.sha256(), []
    for number, (content, caption) in enumerate(_pictures(name, limit), start=1):
        ending = next((ending for magic, ending in _MAGIC.items() if content.startswith(magic)), ".png")
        file = f"{number:06}{ending}"
        (partial / file).write_bytes(content)
        line = json.dumps({"file_name": file, **({} if caption is None else {"text": caption})}, ensure_ascii=False)
        lines += [] if caption is None else [line]
        found.update(hashlib.sha256(content).digest() + line.encode("utf-8", "surrogatepass"))
    (partial / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    folder = into / found.hexdigest()[:32]
    if folder.exists():
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    return folder


def _pictures(name: str, limit: int | None) -> Iterator[tuple[bytes, str | None]]:
    """Yields the bytes and the caption of each row; None for no caption."""
    problems = RowProblems(f"{name} cannot be used as it is")
    column: str | None = None
    for record in islice(read_records(name, problems), limit):
        if column is None:
            column = next((key for key, value in record.values.items() if _bytes_of(value) is not None), None)
            if column is None:
                raise DataError(
                    f"{record.source} has no picture in {', '.join(record.values)}; expected a column with the bytes of picture "
                    "files, such as datasets' Image feature."
                )
        content = _bytes_of(record.values.get(column))
        if content is None:
            problems.add(record.source, f"no picture in the column {column}.")
            continue
        caption = next((value for key in CAPTION_COLUMNS if isinstance(value := record.values.get(key), str)), None)
        yield content, caption
    problems.raise_if_any()
    if column is None:
        raise DataError(f"{name} has no rows; expected rows with a picture and a caption.")


def _bytes_of(value: Any) -> bytes | None:
    """The bytes of a picture file: plain, in datasets' {bytes, path}, or as PNG of a picture that datasets has opened."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes) and value:
        return value
    if hasattr(value, "save") and hasattr(value, "getexif"):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG", exif=value.getexif())
        return buffer.getvalue()
    return None
