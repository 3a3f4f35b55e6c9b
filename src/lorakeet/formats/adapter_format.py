"""What a module must define to be an adapter format.

To add a format, write a module like this, list it in `formats/detect.FORMATS`, and name it in `verbs/convert.Target`.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lorakeet.errors import DataError, require_regular

if TYPE_CHECKING:  # these import torch
    from lorakeet.core.adapter import Adapter
    from lorakeet.formats.compress import CompressionTarget
    from lorakeet.formats.files.base_model import BaseModel

READABLE = "the folder of a run, of PEFT or of mlx-lm, or a .safetensors or .gguf file of kohya, LyCORIS, diffusers or llama.cpp"
Say = Callable[[str], None]


class AdapterFormat(Protocol):
    """A module that reads and writes adapters of one format. Arguments that it does not need it ignores."""

    NAME: str  # in --to and in messages
    SUFFIX: str  # of its files; empty if an adapter is a folder
    WEIGHTS: str  # the file of a folder that holds the tensors; empty if an adapter is one file
    MAGIC: bytes  # the first bytes of its files; empty if they are safetensors

    def owns(self, tensor: str, /) -> bool:
        """True if a safetensors file of this format may have a tensor of that name."""

    def read(self, path: Path, /, *, base: BaseModel | None, compression: CompressionTarget | None, say: Say) -> Adapter:
        """The adapter in `path`. DataError and ConfigError list everything that is wrong.

        `base`: the model, if the format needs its names or shapes; `compression`: for changes that are no pair; `say` gets notes
        on what is assumed or lost.
        """

    def write(self, adapter: Adapter, path: Path, /, *, base: BaseModel | None, say: Say) -> None:
        """Writes `adapter` to `path`. ConfigError names what the format cannot hold."""


def require_adapter(path: Path) -> None:
    """Raises DataError unless a file or a folder is at `path`."""
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {READABLE}.", code="file-missing", values={"path": str(path)})
    if not path.is_dir():
        require_regular(path)
