"""The trained tensors of the best held-out evaluation so far: in memory, or in a file of the run where memory is short."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lorakeet.formats.files.safetensors_file import save_tensors
from lorakeet.train.checkpoint import StoredTensors


class Best:
    """What `keep` was given last. With a `file`, it is there and nowhere else, until `close`."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._tensors: Mapping[str, Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor] | None:
        """The kept tensors, those in a file read one at a time as they are asked for; None where there are none yet."""
        return self._tensors

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes copies of `tensors`; OSError where the disk is full, and the ones before are then kept."""
        if self.file is None:
            self._tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            return
        save_tensors(self.file, tensors, metadata={})
        self._tensors = StoredTensors(self.file)

    def close(self) -> None:
        """Forgets the tensors, and deletes their file."""
        self._tensors = None
        if self.file is not None:
            self.file.unlink(missing_ok=True)
