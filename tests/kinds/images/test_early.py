"""Missing folders of pictures are refused by the name of their setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.config import read_run
from lorakeet.errors import DataError
from lorakeet.kinds.images.early import require_pictures
from tiny.pictures import album


def test_each_folder_of_pictures_is_looked_for(tmp_path: Path) -> None:
    given = {"kind": "image", "model.path": "none", "data.train": str(album(tmp_path / "album", 2))}
    require_pictures(read_run(None, given), whole=True)
    for name in ("data.held_out", "data.test", "images.prior"):
        with pytest.raises(DataError, match=f"{name} .*gone"):
            require_pictures(read_run(None, {**given, name: str(tmp_path / "gone")}), whole=True)
