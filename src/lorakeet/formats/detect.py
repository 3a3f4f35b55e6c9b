"""Which format an adapter on disk has, what says so, and its reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakeet.core.adapter import Adapter
from lorakeet.errors import DataError, unreadable
from lorakeet.formats import gguf, mlx
from lorakeet.formats.diffusion import diffusers, kohya, lycoris
from lorakeet.formats.diffusion.dense import Compression
from lorakeet.formats.files.base_model import BaseModel
from lorakeet.formats.files.gguf_header import MAGIC
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.formats.peft import peft
from lorakeet.formats.peft.peft_config import CONFIG_NAME
from lorakeet.formats.surplus import surplus_rank

Format = Literal["peft", "kohya", "diffusers", "gguf", "mlx", "lycoris"]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_READABLE = "the folder of a run, of PEFT or of mlx-lm, or a .safetensors or .gguf file of kohya, LyCORIS, diffusers or llama.cpp"


@dataclass(frozen=True)
class Found:
    """An adapter on disk: its format, the folder (peft, mlx) or file to read, and what the format was told by."""

    format: Format
    path: Path
    evidence: str


def detect(path: Path) -> Found:
    """The adapter that `path` means: a file, a folder with one, or a run folder that holds one as `adapter`.

    DataError says what was found where the format is unknown or mixed; pickles are never opened.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {_READABLE}.")
    if path.is_file():
        return _file(path)
    for folder in (path, path / "adapter"):
        if (folder / mlx.MODEL_NAME).is_file():
            if (other := folder / peft.MODEL_NAME).is_file():
                raise DataError(
                    f"{folder} holds two adapters: {mlx.MODEL_NAME} as mlx-lm and {other.name} as PEFT writes it. Move the one "
                    f"that is not meant, with its {CONFIG_NAME}, to a folder of its own."
                )
            return Found("mlx", folder, f"the folder holds {mlx.MODEL_NAME}")
        if any((folder / name).exists() for name in (CONFIG_NAME, peft.MODEL_NAME, peft.PICKLE_NAME)):
            return Found("peft", folder, f"the folder holds {CONFIG_NAME} or {peft.MODEL_NAME}")
    single = sorted(entry for entry in path.iterdir() if entry.suffix in (".safetensors", ".gguf") and entry.is_file())
    if len(single) == 1:
        return _file(single[0])
    if single:
        listed = ", ".join(file.name for file in single[:5])
        raise DataError(f"{path} holds {len(single)} adapter files ({listed}); name one of them.")
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise DataError(
            f"{path} is a run that has no adapter yet: {path / 'adapter'} comes with its first held-out evaluation. Train it, or "
            f"go on with it: lorakeet finetune --resume {path}"
        )
    inside = sorted(entry.name for entry in path.iterdir())[:8]
    raise DataError(
        f"{path} holds no adapter: neither {CONFIG_NAME} nor {peft.MODEL_NAME} is there, only {', '.join(inside) or 'nothing'}. "
        f"Expected {_READABLE}."
    )


def _file(path: Path) -> Found:
    if path.suffix.lower() in _PICKLES:
        raise DataError(f"{path} is a pickle file, which can run code when it is loaded, so it is never opened.")
    if path.name in (CONFIG_NAME, peft.MODEL_NAME, mlx.MODEL_NAME):
        return detect(path.parent)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(unreadable(path, error)) from error
    if magic == MAGIC:
        return Found("gguf", path, "the file begins with GGUF")
    if path.suffix.lower() == ".gguf":
        raise DataError(f"{path} is not a GGUF file: it does not begin with GGUF. It may have been cut off; fetch it again.")
    if path.suffix.lower() != ".safetensors" and not _may_be_safetensors(path):
        raise DataError(f"{path} is no adapter: it begins with {magic!r}, as no known format does. Expected {_READABLE}.")
    return _by_names(path, list(open_safetensors(path).tensors))


def _may_be_safetensors(path: Path) -> bool:
    """Whether the file begins with a header's length and a JSON object, as safetensors files of any name do."""
    with path.open("rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= path.stat().st_size


def _by_names(path: Path, names: list[str]) -> Found:
    """The format that the names of a file's tensors belong to."""
    families = {name: _family(name) for name in names}
    counts = Counter(families.values())
    strange = [name for name in names if not families[name]]
    kinds = {family for family in counts if family}
    if kinds == {"kohya", "lycoris"}:
        kinds, counts["lycoris"] = {"lycoris"}, counts["lycoris"] + counts["kohya"]
    if len(kinds) > 1:
        parts = (f"{counts[kind]} as in {kind} ({_example(families, kind)})" for kind in sorted(kinds))
        raise DataError(f"{path} mixes formats: {'; '.join(parts)}. Parts of different files were put together; fetch it again.")
    if not kinds:
        shown = ", ".join(strange[:4]) or "none at all"
        raise DataError(f"{path} has no known format: its {len(names)} tensors are called {shown}. Expected {_READABLE}.")
    kind = kinds.pop()
    if kind in ("peft", "mlx"):
        name = peft.MODEL_NAME if kind == "peft" else mlx.MODEL_NAME
        raise DataError(f"{path} has tensors as in {kind}, but another name; rename it to {name}, beside its {CONFIG_NAME}.")
    return Found(_FORMATS[kind], path, f"{counts[kind]} of {len(names)} tensors are named like {_example(families, kind)}")


_FORMATS: dict[str, Format] = {"kohya": "kohya", "lycoris": "lycoris", "diffusers": "diffusers"}


def _example(families: dict[str, str], kind: str) -> str:
    return next(name for name, family in families.items() if family == kind or (kind == "lycoris" and family == "kohya"))


def _family(name: str) -> str:
    if name.startswith("base_model.model."):
        return "peft"
    if name.startswith(kohya.PREFIXES):
        return "lycoris" if _ends(name, (*lycoris.LOHA, *lycoris.LOKR)) else "kohya"
    if _ends(name, ("lora_a", "lora_b", "m")):
        return "mlx"
    return "diffusers" if diffusers.parse_key(name) else ""


def _ends(name: str, endings: Iterable[str]) -> bool:
    return name.removesuffix(".weight").endswith(tuple(f".{ending}" for ending in endings))


def read_adapter(
    path: Path,
    *,
    base: BaseModel | None = None,
    compression: Compression | None = None,
    say: Callable[[str], None] = print,
) -> Adapter:
    """The adapter at `path`, whatever its format (`detect`). DataError and ConfigError list everything that is wrong.

    base: for GGUF files that do not describe theirs; compression: for LyCORIS; `say` hears what a reader assumes or loses.
    """
    return read_found(detect(path), base=base, compression=compression, say=say)


def read_found(
    found: Found,
    *,
    base: BaseModel | None = None,
    compression: Compression | None = None,
    say: Callable[[str], None] = print,
) -> Adapter:
    """The adapter that `detect` found; arguments and errors as in `read_adapter`."""
    adapter = _read(found, base, compression, say)
    if surplus := surplus_rank(adapter, str(found.path)):
        say(surplus)
    return adapter


def _read(found: Found, base: BaseModel | None, compression: Compression | None, say: Callable[[str], None]) -> Adapter:
    if found.format == "peft":
        return peft.read(found.path)
    if found.format == "mlx":
        return mlx.read(found.path)
    if found.format == "gguf":
        return gguf.read(found.path, base=base)
    if found.format == "diffusers":
        return diffusers.read(found.path)
    return kohya.read(found.path, base=base, compression=compression, say=say)
