"""Which format an adapter on disk has, and its reader."""

from __future__ import annotations

from pathlib import Path

from lorakeet.core.adapter import Adapter
from lorakeet.errors import DataError
from lorakeet.formats import peft
from lorakeet.formats.peft_config import CONFIG_NAME

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_adapter(path: Path) -> Adapter:
    """The adapter at `path`: a PEFT folder, a file inside one, or a run folder that holds one as `adapter`.

    DataError says what was found where nothing can be read.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a folder with {CONFIG_NAME} and {peft.MODEL_NAME}.")
    if path.is_file() and path.suffix in _PICKLES:
        raise DataError(f"{path} is a pickle file, which can run code when it is loaded, so it is never opened.")
    folders = [path.parent] if path.is_file() else [path, path / "adapter"]
    for folder in folders:
        if any((folder / name).exists() for name in (CONFIG_NAME, peft.MODEL_NAME, peft.PICKLE_NAME)):
            return peft.read(folder)
    inside = sorted(entry.name for entry in folders[0].iterdir())[:8]
    raise DataError(
        f"{path} holds no adapter: neither {CONFIG_NAME} nor {peft.MODEL_NAME} is there, only {', '.join(inside) or 'nothing'}. "
        "Name the folder that a run wrote as adapter/, or one that PEFT saved."
    )
