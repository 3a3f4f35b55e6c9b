"""Arrays for the gguf package whose every byte is written, or the refusal of the system raised."""

from __future__ import annotations

from typing import Any

import numpy as np


class WholeArray(np.ndarray[Any, Any]):
    """An array that writes itself through Python's file; numpy's own `tofile` loses ENOSPC as it closes its copy of the file."""

    def tofile(self, file: Any, *_: Any, **__: Any) -> None:
        """Appends the bytes in row-major order to an open file. OSError if not all of them could be written."""
        file.write(np.ascontiguousarray(self).reshape(-1).view(np.uint8).data)
