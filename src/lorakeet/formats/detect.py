"""Detects which format an adapter on disk has, and reads it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from lorakeet.core.adapter import Adapter
from lorakeet.disk import open_buffered
from lorakeet.errors import DataError, readable, reader
from lorakeet.formats import gguf, mlx
from lorakeet.formats.adapter_format import READABLE, AdapterFormat, Say, require_adapter
from lorakeet.formats.compress import CompressionTarget
from lorakeet.formats.diffusion import diffusers, kohya, lycoris
from lorakeet.formats.files.base_model import BaseModel
from lorakeet.formats.files.loaded_file import LoadedFile, load_safetensors
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.formats.identity import AdapterFiles, require_certified
from lorakeet.formats.peft import peft
from lorakeet.formats.peft.peft_config import CONFIG_NAME, LARGEST_SCALE, config_bytes

LYCORIS = "lycoris"  # kohya's files with products that are no pair: read by its module, never written
FORMATS: tuple[AdapterFormat, ...] = (peft, kohya, mlx, gguf, diffusers)  # the first that owns a tensor's name has it
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SUFFIXES = {one.SUFFIX for one in FORMATS if one.SUFFIX}


@dataclass(frozen=True)
class Found:
    """An adapter on disk: the name of its format, the folder or file to read, and the evidence for the format."""

    format: str
    path: Path
    evidence: str


def format_of(name: str) -> AdapterFormat:
    """The module of the format called `name`; KeyError if there is none."""
    return {one.NAME: one for one in FORMATS}[name]


@reader("an adapter")
def detect(path: Path) -> Found:
    """The adapter at `path`: a file, a folder with one, or a run folder with an `adapter` in it.

    DataError says what was found if the format is unknown or mixed. Pickles are never opened.
    """
    require_adapter(path)
    if path.is_file():
        return _file(path)
    for folder in (path, path / "adapter"):
        held = [one for one in FORMATS if one.WEIGHTS and (folder / one.WEIGHTS).is_file()]
        if len(held) > 1:
            names = " and ".join(f"{one.WEIGHTS} of {one.NAME}" for one in held)
            raise DataError(
                f"{folder} holds two adapters: {names}. Move the one that is not meant, with its {CONFIG_NAME}, to a folder of "
                "its own."
            )
        if held:
            return Found(held[0].NAME, folder, f"the folder holds {held[0].WEIGHTS}")
        if any((folder / name).exists() for name in (CONFIG_NAME, peft.PICKLE_NAME)):  # PEFT's reader says what is missing
            return Found(peft.NAME, folder, f"the folder holds {CONFIG_NAME} or {peft.PICKLE_NAME}")
    return _only_file(path)


def _only_file(path: Path) -> Found:
    """The one adapter file in the folder `path`."""
    single = sorted(entry for entry in path.iterdir() if entry.suffix in _SUFFIXES and entry.is_file())
    if len(single) == 1:
        return _file(single[0])
    if single:
        listed = ", ".join(file.name for file in single[:5])
        raise DataError(f"{path} holds {len(single)} adapter files ({listed}); name one of them.")
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        if (own := path / "adapter").is_dir() and (held := sorted(entry.name for entry in own.iterdir())[:8]):
            raise DataError(
                f"{path} has an adapter in the layout of its own kind of run, which only that kind reads: {own} holds "
                f"{', '.join(held)}. Expected {READABLE}."
            )
        raise DataError(
            f"{path} is a run that has no adapter yet: {path / 'adapter'} is written at its first held-out evaluation. Train it, "
            f"or go on with it: lorakeet finetune --resume {path}"
        )
    inside = sorted(entry.name for entry in path.iterdir())[:8]
    raise DataError(
        f"{path} holds no adapter: neither {CONFIG_NAME} nor {peft.MODEL_NAME} is there, only {', '.join(inside) or 'nothing'}. "
        f"Expected {READABLE}."
    )


def _file(path: Path) -> Found:
    if path.suffix.lower() in _PICKLES:
        raise DataError(f"{path} is a pickle file, which can run code when it is loaded, so it is never opened.")
    if path.name in (CONFIG_NAME, *(one.WEIGHTS for one in FORMATS)):
        return detect(path.parent)
    with readable(path), open_buffered(path) as file:
        begin = file.read(9)
    for one in FORMATS:
        if one.MAGIC and begin.startswith(one.MAGIC):
            return Found(one.NAME, path, f"the file begins with {one.MAGIC.decode()}")
        if one.MAGIC and path.suffix.lower() == one.SUFFIX:
            magic = one.MAGIC.decode()
            raise DataError(
                f"{path} is not a {magic} file: it does not begin with {magic}. It may have been cut off; fetch it again."
            )
    is_header = begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= path.stat().st_size  # its length, a JSON object
    if path.suffix.lower() != ".safetensors" and not is_header:
        raise DataError(f"{path} is no adapter: it begins with {begin[:4]!r}, as no known format does. Expected {READABLE}.")
    return _by_names(path, list(open_safetensors(path).tensors))


def _by_names(path: Path, names: list[str]) -> Found:
    """The format that the names of a file's tensors belong to."""
    owners = {name: next((one for one in FORMATS if one.owns(name)), None) for name in names}
    counts = Counter(one.NAME for one in owners.values() if one is not None)
    example = {one.NAME: name for name, one in reversed(owners.items()) if one is not None}
    if len(counts) > 1:
        parts = (f"{counts[kind]} as in {kind} ({example[kind]})" for kind in sorted(counts))
        raise DataError(f"{path} mixes formats: {'; '.join(parts)}. Parts of different files were put together; fetch it again.")
    if not counts:
        shown = ", ".join(names[:4]) or "none at all"
        raise DataError(f"{path} has no known format: its {len(names)} tensors are called {shown}. Expected {READABLE}.")
    [(kind, count)] = counts.items()
    if weights := format_of(kind).WEIGHTS:
        raise DataError(f"{path} has tensors as in {kind}, but another name; rename it to {weights}, beside its {CONFIG_NAME}.")
    format_name = LYCORIS if kind == kohya.NAME and any(lycoris.owns(name) for name in names) else kind
    return Found(format_name, path, f"{count} of {len(names)} tensors are named like {example[kind]}")


def read_adapter(
    path: Path, *, base: BaseModel | None = None, compression: CompressionTarget | None = None, say: Say = print
) -> Adapter:
    """The adapter at `path` in whatever format (`detect`). DataError and ConfigError list everything that is wrong.

    base: for GGUF files that do not describe theirs; compression: for LyCORIS; `say` gets what a reader assumes or loses.
    """
    return read_found(detect(path), base=base, compression=compression, say=say)


def read_found(
    found: Found, *, base: BaseModel | None = None, compression: CompressionTarget | None = None, say: Say = print
) -> Adapter:
    """The adapter that `detect` found; arguments and errors as in `read_adapter`."""
    module = kohya if found.format == LYCORIS else format_of(found.format)
    return _plausible(found, module.read(found.path, base=base, compression=compression, say=say), say)


def read_certified(
    path: Path, *, base: BaseModel | None = None, compression: CompressionTarget | None = None, uncertified: bool = False,
    say: Say = print,
) -> tuple[Adapter, str]:  # fmt: skip
    """As `read_adapter`, with how it compares with its certificate (`require_certified`): of the bytes that were read."""
    found = detect(path)
    if found.format != peft.NAME:
        note = require_certified(path, uncertified=uncertified, say=say)
        return read_found(found, base=base, compression=compression, say=say), note
    files: list[LoadedFile] = []

    def opened(file: Path) -> LoadedFile:
        files.append(replace(load_safetensors(file), header=None))  # adapters that share a layout are for servers
        return files[0]

    configured = config_bytes(found.path)
    adapter = _plausible(found, peft.read(found.path, opened=opened, configured=configured), say)
    return adapter, require_certified(path, read=AdapterFiles(files[0], configured), uncertified=uncertified, say=say)


def _plausible(found: Found, adapter: Adapter, say: Say) -> Adapter:
    """The adapter; DataError for a scale that is no number, and a word about ranks that are too large."""
    if odd := [name for name, pair in adapter.pairs.items() if not abs(pair.scale) <= LARGEST_SCALE]:
        shown = f"{odd[0]}: {adapter.pairs[odd[0]].scale}"
        raise DataError(f"{found.path} has {len(odd)} pairs whose scale is no finite number in fp32 ({shown}). Fetch it again.")
    if surplus := surplus_rank(adapter, str(found.path)):
        say(surplus)
    return adapter


def surplus_rank(adapter: Adapter, named: str) -> str:
    """A warning on all pairs whose rank is above min(in, out); empty if there are none.

    Such a pair computes what it should, and PEFT and kohya write them for small layers, so it is read and converted unchanged. A
    Plan is refused instead (models/targets), since its useless parameters are yet to be trained.
    """
    groups: dict[tuple[int, int, int], list[str]] = {}
    for path, pair in adapter.pairs.items():
        out, *inner = pair.weight_shape[-2:] if pair.kind == "experts" else pair.weight_shape
        width = math.prod(inner)
        if pair.rank > min(out, width):
            groups.setdefault((pair.rank, out, width), []).append(path)
    if not groups:
        return ""
    parts = (f"{', '.join(paths)} (rank {rank}, {out} × {width})" for (rank, out, width), paths in groups.items())
    largest = max(pair.rank for pair in adapter.pairs.values())
    base = "" if adapter.base else " --base MODEL"
    return (
        f"{named} has a rank larger than the layer in {sum(map(len, groups.values()))} of {len(adapter.pairs)} pairs: "
        f"{'; '.join(parts)}. A matrix has no more directions than its shorter side, so a part of these numbers does nothing. "
        "What the pairs compute is right. Cut them without loss: "
        f"lorakeet merge {named} --to adapter --rank {largest}{base} --out OUT"
    )
