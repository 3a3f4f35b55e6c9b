"""Reads a served adapter's files: first only their headers, later the numbers, identified by their content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lorakeet.core.adapter import Adapter, FlatPairs, FlatPairsLayout
from lorakeet.errors import DataError, LorakeetError
from lorakeet.formats.detect import Found, detect, read_found, surplus_rank
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.files.digest import add_file
from lorakeet.formats.files.loaded_file import LoadedFile, load_safetensors, open_header
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.formats.identity import AdapterFiles
from lorakeet.formats.peft import peft
from lorakeet.formats.peft.peft_config import CONFIG_NAME, config_bytes
from lorakeet.kernels.cpu.inference_pairs import even
from lorakeet.models.text.serving import ServingModel

log = logging.getLogger("lorakeet.serve")
_SAID = 300  # characters of another library's message
Stamp = tuple[tuple[int, int, int], ...]  # (inode, size, modification time) of each file


@dataclass(frozen=True)
class AdapterSource:
    """An adapter on disk, and what its header said when it was inspected."""

    found: Found
    bytes: int  # of its numbers in memory
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stamp: Stamp
    private: bool = False  # only the server writes its files, so that they may be mapped
    digest: str = ""  # SHA-256 of configuration and numbers; empty until they are read
    of_experts: int = 0  # bytes of its pairs on experts, which are read where they are and never copied
    beside: int = 0  # bytes of its file that are in memory beside its numbers while it is read, as far as is known

    @property
    def path(self) -> Path:
        return self.found.path

    @property
    def filled(self) -> int:
        """Bytes of a copy for computing, in fp32: odd ranks are padded (kernels/cpu/inference_pairs)."""
        copied = self.bytes - self.of_experts
        return max((-(-copied * even(rank) // rank) for rank in self.ranks if rank), default=copied)


class _Seen(NamedTuple):
    """What follows from an adapter's layout."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    surplus: bool  # some rank is larger than its layer
    of_experts: int  # bytes of pairs on experts


_SEEN: LruCache[FlatPairsLayout, _Seen] = LruCache(8)


def inspect_adapter(path: Path, live: ServingModel, digest: str = "", *, private: bool = False) -> AdapterSource:
    """Checks names, shapes and scale of the adapter at `path`, of any format, against the model.

    Of PEFT folders only headers are read. `digest`: that of the content, if it is known.
    """
    with _reading(path):
        found = detect(path)
        stamp = () if digest else _stamp(found)  # a digest from before a restart is compared with the content at the first load
        if found.format == "peft":
            outline = peft.read(found.path, opened=partial(open_header, longest=live.longest_header))
        else:
            outline = _converted(found, live)
    alike = outline.pairs.outline if isinstance(outline.pairs, FlatPairs) else None
    seen = _seen(outline) if alike is None else _SEEN.get_or_make(alike, lambda: _seen(outline))
    if seen.surplus:
        log.warning("%s", surplus_rank(outline, str(found.path)))
    live.check(outline)
    size = 4 * outline.parameters
    beside = 0 if private else _beside(found, size, seen.of_experts)
    return AdapterSource(found, size, seen.ranks, seen.scales, stamp, private, digest, seen.of_experts, beside)


def _beside(found: Found, size: int, of_experts: int) -> int:
    """Bytes of a file that are in memory beside the numbers made of it; 0 if those are views, or in another format than PEFT's.

    Pairs on experts are rearranged; numbers that take less than fp32 are converted.
    """
    if found.format != "peft":
        return 0
    stored = (found.path / peft.MODEL_NAME).stat().st_size
    return stored if of_experts or stored < size else 0


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A context in which whatever a reader raises at a file of a stranger is a DataError, so that the server goes on."""
    try:
        yield
    except (LorakeetError, OSError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}"
        log.warning("not read path=%s", json.dumps(str(path)), exc_info=error)
        raise DataError(f"{path} cannot be read as an adapter ({said}). It is damaged; fetch it again.") from error


def _seen(outline: Adapter) -> _Seen:
    kinds = {(pair.rank, pair.scale) for pair in outline.pairs.values()}
    ranks, scales = {rank for rank, _ in kinds}, {float(f"{scale:.6g}") for _, scale in kinds}
    of_experts = sum(4 * (pair.A.numel() + pair.B.numel()) for pair in outline.pairs.values() if pair.kind == "experts")
    return _Seen(tuple(sorted(ranks)), tuple(sorted(scales)), bool(surplus_rank(outline, "")), of_experts)


def read_stored_adapter(
    source: AdapterSource, name: str, live: ServingModel, compare: Callable[[Path, AdapterFiles | None], object] = lambda *_: None
) -> tuple[Adapter, AdapterSource]:
    """Reads the adapter with its numbers; returns it and its source with the digest.

    `compare` gets its path and its files as they were read (None of other formats than PEFT's), and refuses them by an error.
    DataError if the content has changed: if the files' stamps differ, their digest decides.
    """
    stamp = _stamp(source.found)
    known = bool(source.digest) and stamp == source.stamp
    opened: list[LoadedFile] = []
    configured = b""
    with _reading(source.path):
        if source.found.format == "peft":
            configured = config_bytes(source.path)
            adapter = peft.read(source.path, opened=partial(_kept, opened, source.private, known, live), configured=configured)
        else:
            adapter = _converted(source.found, live)
    compare(source.path, AdapterFiles(opened[0], configured) if opened else None)
    if any(pair.kind == "experts" for pair in adapter.pairs.values()):
        adapter = _apart_from_file(adapter)
    if known and stamp == _stamp(source.found):
        return adapter, source
    digest = _digest(source.found, configured, opened)
    if source.digest and source.digest != digest:
        raise DataError(
            f"The files of '{name}' at {source.path} have changed since they were checked. Load them again under that name "
            "(load_inplace) to serve what they hold now."
        )
    seen = _seen(adapter)  # the files may have changed since they were inspected
    return adapter, replace(
        source, digest=digest, stamp=stamp, bytes=4 * adapter.parameters, ranks=seen.ranks, scales=seen.scales,
        of_experts=seen.of_experts,
    )  # fmt: skip


def _apart_from_file(adapter: Adapter) -> Adapter:
    """The same with tensors in memory of their own: pairs on experts are rearranged as they are read, and the file's memory, of
    which others are views, would stay beside them."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    return replace(adapter, pairs={path: replace(pair, A=own(pair.A), B=own(pair.B)) for path, pair in adapter.pairs.items()})


def _kept(opened: list[LoadedFile], private: bool, known: bool, live: ServingModel, path: Path) -> LoadedFile:
    """Loads a file and appends it to `opened`. An unknown digest, which takes longest, is computed at once, while the numbers
    are in the processor's caches."""
    file = load_safetensors(path, mapped=private, longest=live.longest_header)
    if not known:
        _ = file.digest
    opened.append(file)
    return file


def _digest(found: Found, configured: bytes, opened: list[LoadedFile]) -> str:
    """The SHA-256 of an adapter: of its configuration and numbers as they were read, or of its files."""
    total = hashlib.sha256()
    if opened:
        total.update(configured)
        total.update(opened[0].digest.encode())
    else:
        for file in _files(found):
            add_file(total, file)
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
    """Reads an adapter in another format than PEFT's, with the names of the base."""
    return read_found(found, base=open_base(live.text.source), say=lambda _: None)  # the checks report what matters
