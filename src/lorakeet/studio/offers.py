"""Models and rows that a page can offer: in the chosen folders, in installed packages, and in the hub's cache."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorakeet.data.locate import WORKBOOKS
from lorakeet.disk import create, erase, open_in_place, stage_in_use, written_whole
from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.files.digest import sha256_of
from lorakeet.registry import declarations
from lorakeet.studio.pages import json_answer, studio_of
from lorakeet.studio.places import UPLOADED, Places
from lorakeet.studio.safety import LARGEST_UPLOAD
from lorakeet.verbs.packages import QUICKSTART_PACKAGES, installed_version

ROWS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", *WORKBOOKS, ".zip", ".gz")
OTHER_TABLES = (".xls", ".xlsb", ".ods", ".numbers")  # of offices, which save them as .xlsx
_ENDED = re.compile(rf"(.+?)(?:{'|'.join(map(re.escape, ROWS))})+(?:[!#].*)?", re.IGNORECASE | re.DOTALL)
_DEPTH = 3  # folders below a chosen one
_MOST = 200  # of each kind
_ENTRIES = 20_000  # that are read in all
MOST_UPLOADED = 4 * LARGEST_UPLOAD  # bytes of all copies
_UNFINISHED = 24 * 3600.0  # seconds after which an unfinished copy is a leftover
_ADDING = threading.Lock()  # of bytes, so that uploads at once keep the limit together
_LEFT_OUT = {"node_modules", "__pycache__", "site-packages", "checkpoints", "adapter"}


def stem_of(name: str) -> str:
    """The name of a file of rows without its endings, and without what is named within it: a point in it stays."""
    found = _ENDED.fullmatch(name)
    return found[1] if found else name


@dataclass(frozen=True)
class Offers:
    """Names that can be typed into a form as they are."""

    models: tuple[str, ...]
    rows: tuple[str, ...]
    accepted: str = ",".join((*ROWS, *OTHER_TABLES))  # endings that a browser offers; the last are answered with what to do

    def short(self, name: str) -> str:
        """The end of a path that tells it from all others that are offered; any other name as it is."""
        if not name.startswith("/"):
            return name
        parts, others = Path(name).parts, [Path(one).parts for one in (*self.models, *self.rows) if one != name]
        for count in range(1, len(parts)):
            if all(one[-count:] != parts[-count:] for one in others):
                return "/".join(parts[-count:])
        return name


def offers(places: Places) -> Offers:
    """What lies in the folders, in few levels; then models of installed packages and those that the hub's cache has."""
    models: list[str] = []
    rows: list[str] = [str(path) for path in sorted((places.own / UPLOADED).glob("*")) if not path.name.startswith(".")]
    left = _ENTRIES
    for folder in places.folders:
        for path, names in _walk(folder, places.runs, _DEPTH):
            left -= len(names)
            if _is_model(names):
                models.append(str(path))
            elif not _is_run(names):
                captions = _captions(names)
                rows += [str(path / name) for name in names if name.lower().endswith(ROWS) and name not in captions]
            models += [str(path / name) for name in names if name.lower().endswith(".gguf")]
            if left < 0:
                break
    models += [f"package:{need.name}" for need in map(Requirement, QUICKSTART_PACKAGES[:1]) if installed_version(need)]
    models += _cached()
    return Offers(tuple(dict.fromkeys(models))[:_MOST], tuple(dict.fromkeys(rows))[:_MOST])


def _walk(folder: Path, runs: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """Each folder with the names of its files; neither hidden ones, nor links, nor the runs, nor parts of a model or a run."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False) and not entry.name.startswith(".")]
    yield folder, names
    for entry in entries if not (_is_model(names) or _is_run(names)) else ():
        inner = Path(entry.path)
        left_out = entry.name.startswith(".") or entry.name in _LEFT_OUT or inner == runs
        if depth and entry.is_dir(follow_symlinks=False) and not left_out:
            yield from _walk(inner, runs, depth - 1)


def _captions(names: list[str]) -> set[str]:
    """The texts that lie beside the files that they describe."""
    described = {ending for kind in declarations().values() for ending in kind.described}
    return {f"{stem}.txt" for stem, ending in map(os.path.splitext, names) if ending.lower() in described}


def _is_run(names: list[str]) -> bool:
    return "metrics.jsonl" in names and "config.yaml" in names


def _is_model(names: list[str]) -> bool:
    return "config.json" in names or "model_index.json" in names


def _cached() -> list[str]:
    """The models in the hub's cache, by id."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    return sorted(path.name.removeprefix("models--").replace("--", "/", 1) for path in cache.glob("models--*--*"))


async def _receive(request: Request) -> Response:
    """Keeps a file of rows that the browser sends; answers with its path. Another one of that name stays: runs need it."""
    name = str(request.path_params["name"])
    places = studio_of(request).places
    if name.lower().endswith(OTHER_TABLES):
        raise ConfigError(f"{name:.80} cannot be read as it is. Open it, save it as .xlsx (Save as), and choose that file.")
    if not name.lower().endswith(ROWS) or len(name.encode()) > 200 or name.startswith(".") or not name.isprintable():
        raise ConfigError(f"The file's name is {name!r:.80}; expected a plain name that ends with {', '.join(ROWS)}.")
    await asyncio.to_thread(_require_space, places, int(request.headers.get("content-length") or 0))
    size, sent = 0, hashlib.sha256()
    folder = places.own / UPLOADED
    coming = folder / f".{secrets.token_hex(8)}" / name
    try:
        with written_whole(coming) as made, create(made) as file:

            def take(piece: bytes) -> None:
                sent.update(piece)
                with _ADDING:
                    others = _kept(folder, but=coming.parent)
                    if size + others > MOST_UPLOADED:
                        raise _too_much(folder, size, MOST_UPLOADED - others)
                    file.write(piece)
                    file.flush()

            async for piece in request.stream():
                size += len(piece)
                if size > LARGEST_UPLOAD:
                    raise ConfigError(f"{name} has more than {bytes_text(LARGEST_UPLOAD)}. Put it into a folder of the studio.")
                await asyncio.to_thread(take, piece)  # a slow disk keeps no other page waiting
        path = await asyncio.to_thread(_settled, coming, folder, sent.hexdigest())
    finally:
        erase(coming.parent)
    return json_answer({"path": str(path), "bytes": size})


def _require_space(places: Places, size: int) -> None:
    """Removes unfinished copies of a killed studio. ConfigError for a file that is too large, alone or with the others."""
    folder = places.own / UPLOADED
    for left in folder.glob(".*"):
        with suppress(OSError):  # it has ended meanwhile
            if time.time() - left.stat().st_mtime > _UNFINISHED and not any(map(stage_in_use, left.glob("*"))):
                erase(left)
    kept = _kept(folder)
    if size > LARGEST_UPLOAD or kept + size > MOST_UPLOADED:
        raise _too_much(folder, size, MOST_UPLOADED - kept)


def _kept(folder: Path, but: Path | None = None) -> int:
    """Bytes of all copies in `folder`, those that still arrive too; without what is in the folder `but`."""
    found = 0
    for place, inner, names in os.walk(folder):  # a folder that is erased meanwhile has nothing
        if Path(place) == but:
            inner.clear()
            continue
        for name in names:
            with suppress(OSError):  # it was moved or erased meanwhile
                found += os.lstat(os.path.join(place, name)).st_size
    return found


def _too_much(folder: Path, size: int, left: int) -> ConfigError:
    return ConfigError(
        f"The file has {bytes_text(size)}; expected at most {bytes_text(min(LARGEST_UPLOAD, max(0, left)))}: a copy "
        f"may have {bytes_text(LARGEST_UPLOAD)}, and all copies together {bytes_text(MOST_UPLOADED)}. Put the file into a "
        f"folder of the studio, or delete copies in {folder} that no run needs."
    )


def _settled(coming: Path, folder: Path, digest: str) -> Path:
    """Moves a file into `folder`, under a name that is free; the file itself where it was sent before."""
    stem = stem_of(coming.name)
    ending = coming.name.removeprefix(stem)
    with open_in_place(folder.parent / "rows.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two tabs or studios, none takes the name that the other has found free
        for number in itertools.count(1):
            path = folder / (coming.name if number == 1 else f"{stem}-{number}{ending}")
            if not path.exists():
                coming.rename(path)
                return path
            if sha256_of(path) == digest:
                return path
    raise AssertionError


UPLOAD = Route("/rows/{name}", _receive, methods=["PUT"])
