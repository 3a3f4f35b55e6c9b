"""An adapter's files: looked at by their headers first, read whole later, and known again by their content."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lorakeet.core.adapter import Adapter, FlatPairs, FlatPairsLayout
from lorakeet.errors import DataError
from lorakeet.formats.detect import Found, detect, read_found, surplus_rank
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.files.loaded_file import LoadedFile, load_safetensors, open_header
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.formats.peft import peft
from lorakeet.formats.peft.peft_config import CONFIG_NAME, config_bytes
from lorakeet.kernels.cpu.inference_pairs import even
from lorakeet.models.text.serving import ServingModel

log = logging.getLogger("lorakeet.serve")
Stamp = tuple[tuple[int, int, int], ...]  # (inode, size, time of change) of each file


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter lies and what it held when it was looked at."""

    found: Found
    bytes: int  # that its numbers take in memory
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stamp: Stamp
    private: bool = False  # whether nobody but the server writes its files, so that they may be mapped
    digest: str = ""  # SHA-256 of configuration and numbers; empty until they are read

    @property
    def path(self) -> Path:
        return self.found.path

    @property
    def filled(self) -> int:
        """The bytes of a copy for texts, in fp32: its odd ranks are filled up (kernels/cpu/inference_pairs)."""
        return max((-(-self.bytes * even(rank) // rank) for rank in self.ranks if rank), default=self.bytes)


class _Seen(NamedTuple):
    """What is told of an adapter by its outline."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    surplus: bool  # whether a rank is larger than its layer


_SEEN: LruCache[FlatPairsLayout, _Seen] = LruCache(8)


def inspect_adapter(path: Path, live: ServingModel, digest: str = "", *, private: bool = False) -> AdapterSource:
    """Looks at the adapter at `path`, of any format, and checks its names, shapes and scale against the model.

    PEFT folders by their headers alone; other formats are read. `digest` is what the content is known to be.
    """
    found = detect(path)
    stamp = () if digest else _stamp(found)  # a digest from before a restart is compared with the content at the first load
    outline = peft.read(found.path, opened=open_header) if found.format == "peft" else _converted(found, live)
    alike = outline.pairs.outline if isinstance(outline.pairs, FlatPairs) else None
    seen = _seen(outline) if alike is None else _SEEN.of(alike, lambda: _seen(outline))
    if seen.surplus:
        log.warning("%s", surplus_rank(outline, str(found.path)))
    live.check(outline)
    return AdapterSource(found, 4 * outline.parameters, seen.ranks, seen.scales, stamp, private, digest)


def _seen(outline: Adapter) -> _Seen:
    kinds = {(pair.rank, pair.scale) for pair in outline.pairs.values()}
    ranks, scales = {rank for rank, _ in kinds}, {float(f"{scale:.6g}") for _, scale in kinds}
    return _Seen(tuple(sorted(ranks)), tuple(sorted(scales)), bool(surplus_rank(outline, "")))


def read_stored_adapter(source: AdapterSource, name: str, live: ServingModel) -> tuple[Adapter, AdapterSource]:
    """The adapter with its numbers, and its source with what they were.

    DataError where the content is not the one that was known: by the files' stamps, or, where these differ, by the digest.
    """
    stamp = _stamp(source.found)
    known = bool(source.digest) and stamp == source.stamp
    opened: list[LoadedFile] = []
    configured = b""
    if source.found.format == "peft":
        configured = config_bytes(source.path)
        adapter = peft.read(source.path, opened=partial(_kept, opened, source.private, known), configured=configured)
    else:
        adapter = _converted(source.found, live)
    if known and stamp == _stamp(source.found):
        return adapter, source
    digest = _digest(source.found, configured, opened)
    if source.digest and source.digest != digest:
        raise DataError(
            f"The files of '{name}' at {source.path} have changed since they were checked. Load them again under that name "
            "(load_inplace) to serve what they hold now."
        )
    seen = _seen(adapter)  # the files may be others than those that were looked at
    return adapter, replace(
        source, digest=digest, stamp=stamp, bytes=4 * adapter.parameters, ranks=seen.ranks, scales=seen.scales
    )


def _kept(opened: list[LoadedFile], private: bool, known: bool, path: Path) -> LoadedFile:
    """The slab, which joins `opened`. Its digest, which takes longest, is worked out now if it is not known: what comes next is
    small, and would have left the processor's caches when 10 MB of numbers had passed through them."""
    slab = load_safetensors(path, mapped=private)
    if not known:
        _ = slab.digest
    opened.append(slab)
    return slab


def _digest(found: Found, configured: bytes, opened: list[LoadedFile]) -> str:
    """The SHA-256 of an adapter: of its configuration and its numbers as they were read, or of its files."""
    total = hashlib.sha256()
    if opened:
        total.update(configured)
        total.update(opened[0].digest.encode())
    else:
        for file in _files(found):
            total.update(file.read_bytes())
    return total.hexdigest()


def _files(found: Found) -> list[Path]:
    if found.path.is_file():
        return [found.path]
    return sorted(file for file in found.path.iterdir() if file.suffix in (".safetensors", ".json") and file.is_file())


def _stamp(found: Found) -> Stamp:
    files = [found.path / CONFIG_NAME, found.path / peft.MODEL_NAME] if found.format == "peft" else _files(found)
    stats = [file.stat() for file in files if file.exists()]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _converted(found: Found, live: ServingModel) -> Adapter:
    """An adapter in another format than PEFT's, by the names of the base."""
    return read_found(found, base=open_base(live.text.source), say=_unheard)


def _unheard(_: str) -> None:
    """Notes of a reader; the checks say what matters."""
