"""Encodings of text files: each is read as it was saved, and a wrong or missing setting is answered with the right one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.text_encoding import codec_of, utf_16_of
from lorakeet.errors import DataError

ITALIAN = 'text,label\n"La città è lontana,\nperché?",a\nCosì non va,b\n'


def refusal(path: Path, content: bytes, encoding: str = "utf-8") -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(path), DataSpec(train="x", encoding=encoding))
    return str(caught.value)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("saved", ["cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_first_hint_is_the_encoding_in_which_a_file_was_saved(tmp_path: Path, saved: str, plain: bool) -> None:
    text = ITALIAN if not plain else "text,label\nciao,a\n"
    if plain and saved == "cp1252":
        return  # as UTF-8 it is the same
    said = refusal(tmp_path / "rows.csv", text.encode(saved))
    hint = re.search(r"Set --data\.encoding ([\w-]+)", said)
    assert hint is not None and hint[1] == saved
    row = read_rows(str(tmp_path / "rows.csv"), DataSpec(train="x", encoding=saved))[0]
    assert row.text == ("ciao" if plain else "La città è lontana,\nperché?")


def test_how_windows_letters_would_read_is_shown_for_the_user_to_see(tmp_path: Path) -> None:
    said = refusal(tmp_path / "rows.csv", ITALIAN.encode("cp1252"))
    assert "rows.csv is not utf-8 text (byte 0xe0). Set --data.encoding cp1252 if '\"La città è lontana,' reads right" in said


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        ("cp1251", "Счёт неверный, роутер не работает"),
        ("shift_jis", "請求書が間違っている"),
        ("gb18030", "发票错了"),
        ("mac_roman", "La fattura è sbagliata"),
    ],
)
def test_windows_letters_are_not_guessed_where_they_cannot_be(tmp_path: Path, saved: str, text: str) -> None:
    for tried in ("utf-8", "cp1252") if saved in ("shift_jis", "mac_roman") else ("utf-8",):
        said = refusal(tmp_path / "rows.csv", f"text,label\n{text},a\n".encode(saved), tried)
        assert f"is not {tried} text" in said and "encoding cp1252" not in said and "latin-1" not in said and saved in said


@pytest.mark.parametrize("given", ["cp1252", "latin-1", "ascii", "utf-16", "shift_jis"])
def test_a_setting_that_would_garble_utf_8_is_refused(tmp_path: Path, given: str) -> None:
    for content in (ITALIAN.encode(), b"\xef\xbb\xbf" + ITALIAN.encode()):
        said = refusal(tmp_path / "rows.csv", content, given)
        assert f"not {given}" in said and said.endswith("Set --data.encoding utf-8.")


def test_the_mark_decides_and_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(ITALIAN.encode("utf-16"))
    for given in ("utf-16", "utf-16-le", "UTF16"):
        assert [row.label for row in read_rows(str(path), DataSpec(train="x", encoding=given))] == ["a", "b"]
    assert "Set --data.encoding utf-16." in refusal(path, ITALIAN.encode("utf-16"), "cp1252")
    assert "Set --data.encoding utf-16-be." in refusal(path, ITALIAN.encode("utf-16-be"), "utf-16-le")
    assert "such as utf-16-le or cp1252" in refusal(path, ITALIAN.encode("cp1252"), "utf-16")


def test_zeros_tell_the_order_of_bytes_and_few_tell_nothing() -> None:
    assert utf_16_of("ab\n".encode("utf-16-le")) == "utf-16-le" and utf_16_of("ab\n".encode("utf-16-be")) == "utf-16-be"
    assert utf_16_of(b"a\0b" + b"c" * 200) == "" and utf_16_of(b"") == ""
    assert codec_of(b"", "utf-8", "x") == "utf-8-sig" and codec_of(b"caf\xe9", "cp1252", "x") == "cp1252"
    assert codec_of("é".encode()[:1], "latin-1", "x") == "latin-1", "a letter that is cut is no proof"
