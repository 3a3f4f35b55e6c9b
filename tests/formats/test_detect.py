"""Finding the adapter that a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import DataError
from lorakeet.formats.detect import read_adapter


def test_a_folder_a_file_in_it_and_a_run_are_the_same_adapter(folder: Path) -> None:
    for path in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors", folder.parent):
        assert len(read_adapter(path).pairs) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist; expected a folder with adapter_config.json"),
        ("old.bin", "is a pickle file"),
        ("empty", r"holds no adapter: .* only weights\.gguf"),
        ("torch", r"adapter_model\.bin is a pickle file|adapter_config\.json cannot be read"),
    ],
)
def test_what_is_no_adapter(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(b"\x80")
    for part, file in (("empty", "weights.gguf"), ("torch", "adapter_model.bin")):
        (tmp_path / part).mkdir()
        (tmp_path / part / file).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        read_adapter(tmp_path / name)
