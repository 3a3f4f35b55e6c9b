"""Arrays in GGUF files: all bytes, or the refusal of the system."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from lorakeet.formats.files.gguf_array import WholeArray


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3)), np.arange(6).reshape(2, 3).T])
def test_the_bytes_are_numpys_own(array: np.ndarray, tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.write(b"head")
        array.view(WholeArray).tofile(file)
    assert (tmp_path / "a").read_bytes() == b"head" + array.tobytes()


def test_a_full_disk_is_an_error_with_its_number() -> None:
    with pytest.raises(OSError) as refused, open("/dev/full", "wb", buffering=0) as file:
        np.zeros(5000).view(WholeArray).tofile(file)
    assert refused.value.errno == errno.ENOSPC
