"""Splits texts of any script into normalised words; scripts without spaces are split into characters.

Words follow the default rules of Unicode (UAX #29), with two differences. Apostrophes and hyphens within a word are left out, so
that "don't" is "dont", and "follow-up" one word. And Han, kana, Thai, Lao, Khmer and Burmese are split into characters, since
UAX #29 leaves them to a dictionary.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_APOSTROPHES = str.maketrans("", "", "'’ʼ`´")
_LETTER = rf"[\w--[{_SPACELESS}_]]"
_INSIDE = r"(?:(?<=\d)[.,:/](?=\d)|(?<!\d)[-‐‑]|[-‐‑](?!\d))"  # not the hyphen of "4-5"
_HYPHENS = str.maketrans("", "", "-‐‑")
_WORD = regex.compile(rf"(?V1)[{_SPACELESS}]\p{{M}}*|{_LETTER}+(?:{_INSIDE}{_LETTER}+)*")
_CHARACTER = regex.compile(f"[{_SPACELESS}]")
CHARACTER_LENGTH = 2 / 3  # of a word: what one character of a script without spaces says


def normal_words(text: str) -> list[str]:
    """The words of a text, normalised (NFKC, case-folded), without punctuation and spacing."""
    plain = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return [word if word.isalnum() else word.translate(_HYPHENS) for word in _WORD.findall(plain.translate(_APOSTROPHES))]


def letters(words: Sequence[str]) -> str:
    """The words without spaces, but for those between two numbers: equal for texts that differ in spacing alone."""
    parts: list[str] = []
    for word in words:
        if parts and word[0].isdigit() and parts[-1][-1].isdigit():
            parts.append(" ")
        parts.append(word)
    return "".join(parts)


def is_character(word: str) -> bool:
    """True for a word that is one character of a script without spaces."""
    return _CHARACTER.match(word) is not None
