"""What the studio shows of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet.studio.shown_rows import show_rows_of
from tiny.pictures import album


def test_pictures_have_captions_sizes_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    folder, sent = album(tmp_path / "album", 8), list[dict[str, Any]]()
    given = {"kind": "image", "data.train": str(folder), "data.held_out_fraction": "0.25", "images.smallest": "8"}
    show_rows_of({**given, "images.resolution": "64"}, sent.append)
    [found] = [part for part in sent if part.get("part") == "album"]
    assert sum(found["counts"].values()) == 8 == found["shown"] and sum(count for _, count in found["buckets"]) == 8
    assert found["shown_rows"][0]["thumb"].startswith("data:image/png;base64,") and found["shown_rows"][0]["caption"]
    assert "trained as" in found["shown_rows"][0]["size"] and found["alike"] == []
