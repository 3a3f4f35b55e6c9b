"""`formats.json_object`: an object is read; everything else is an error that names the file and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import DataError
from lorakeet.formats.files.json_object import read_object


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "Köln", "n": [1, 2]}', encoding="utf-8")
    assert read_object(tmp_path / "a.json", expected="x") == {"name": "Köln", "n": [1, 2]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"n": ' + b"9" * 6000 + b"}", "is not JSON that can be read: .*6000 digits"),
        (b"[]", "holds a JSON list"),
        (b"3", "holds a JSON int"),
    ],
)
def test_anything_else_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json {said}.*[eE]xpected the settings of a model\."):
        read_object(path, expected="the settings of a model")
