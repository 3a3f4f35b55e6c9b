"""Splits texts of any script into normalised words; scripts without spaces are split into characters.

Words follow the default rules of Unicode (UAX #29), with two differences. Apostrophes and hyphens within a word are left out, so
that "don't" is "dont", and "follow-up" one word. And Han, kana, Thai, Lao, Khmer and Burmese are split into characters, since
UAX #29 leaves them to a dictionary. Signs that calculate or compare are words too: "x = 4" is not "x < 4", and "Cu2+" not "Cu2".
Those of markup are none: of tags, tables, quoted lines, headings and arrows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import regex

_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_APOSTROPHES = str.maketrans("ı", "i", "'’ʼ`´\u0307")  # and Turkish I, whose case depends on the language
_LETTER = rf"[\w--[{_SPACELESS}_]]"
_INSIDE = r"(?:(?<=\d)[.,:/](?=\d)|(?<!\d)[-‐‑]|[-‐‑](?!\d))"  # not the hyphen of "4-5"
_HYPHENS = str.maketrans("", "", "-‐‑")
_SIGN = (
    r"!?[\p{Sm}--[\u2190-\u21ff|]]+|\|\||(?<=\w)\|(?=\w)|(?<=\d\s?)%"  # not arrows
    r"|(?<!\w)-(?=\d)|(?<=\d)-(?!\w)|(?<=\d\s)-(?=\s\d)"  # not a dash
    r"|(?<=[\w)\]])(?:\*+|\^)(?=[\w(])|(?<=[\w)\]]\s)(?:\*+|[/^%])(?=\s[\w(])|&&"
)
_WORD = regex.compile(rf"(?V1)[{_SPACELESS}]\p{{M}}*|{_LETTER}+(?:{_INSIDE}{_LETTER}+)*|{_SIGN}")
_MORE = r"(?=[ \t]+\S)(?![ \t]+-?\p{Sc}?\d\S*(?:[ \t]+\S{1,4})?[ \t]*$)"  # behind a mark: more than an operand
_ATTRIBUTE = r"(?:\s++[\w:.-]++\s*+=\s*+(?:\"[^\"<>]*+\"|'[^'<>]*+'|[^\s<>\"']++))"
_MARKUP = regex.compile(
    rf"(?m)<(?P<name>[/!?]?[A-Za-z][\w:.-]*+{_ATTRIBUTE}{{0,99}}+)\s*/?>|<!--"  # tags
    r"|<\|(?P<token>[^|<>\n]+)\|>|(?<![-=])[-=]+>|~~|([<>])\3\3+|([<>=+~|^])\4{3,}"  # tokens of a chat, arrows, rules
    rf"|^[ \t]*(?:(?:>[ \t]*)+|==+){_MORE}|\A\s*[=+~|]+{_MORE}|[ \t]==+[ \t]*$|\s[=>~]+[\s.?!…_]*\Z"  # quotes, headings
)
_MARKS = frozenset("<>=~|+^")
_CHARGE = regex.compile(r"(?<=\b[A-Z][A-Za-z]?)-(?![\w-])")  # of an ion, or of a mark such as "A-"
_DIGITS = regex.compile(r"\d+(?:\.\d+)*")
_BINARY = regex.compile(r"[-+*/^×÷≤≥≠]|\*\*|[<>=!]=*|<<|>>|&&|\|\||\|")
_FIELD = regex.compile(
    r"(?:(?m:^)[ \t]*(?:[-*{][ \t]*)?|[;,|{]\s*)[\"']?(\p{L}[\w -]{0,40}+)[\"']?\s*(?::(?=[\s\"'\d]|$)|=(?![=>]))"
)
_FEWEST_FIELDS = 3  # whose order says nothing
_CHARACTER = regex.compile(f"[{_SPACELESS}]")
CHARACTER_LENGTH = 2 / 3  # of a word: what one character of a script without spaces says


def normal_words(text: str) -> list[str]:
    """The words of a text, normalised (NFKC, case-folded), without punctuation and spacing; signs stay."""
    if not _MARKS.isdisjoint(text):
        text = _MARKUP.sub(lambda found: f" {found['name'] or found['token'] or ''} ".replace("=", " "), text)
    text = _CHARGE.sub("−", text if text.isascii() else unicodedata.normalize("NFKC", text))
    plain = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text.casefold())
    found = _WORD.findall(plain.translate(_APOSTROPHES))
    return [word if word.isalnum() else word.replace("−", "-") if is_sign(word) else word.translate(_HYPHENS) for word in found]


def fields_sorted(text: str) -> str:
    """A text with its fields ("key: value", "key = value") in order, if all keys differ; a text of other form as it is.

    Neither is sorted where a "=" assigns what another key names: then the order says what it is.
    """
    found = list(_FIELD.finditer(text)) if text.count(":") + text.count("=") >= _FEWEST_FIELDS and text.count("{") < 2 else []
    keys = [field[1].strip().casefold() for field in found]
    if len(found) < _FEWEST_FIELDS or len({*keys}) < len(found):
        return text
    bounds = [field.start() for field in found]
    last, _, behind = text[bounds[-1] :].partition("\n\n")
    fields = (*(text[begin:end] for begin, end in pairwise(bounds)), last)
    for field, key, whole in zip(found, keys, fields, strict=True):
        value = whole[len(field[0]) :].casefold() if field[0].endswith("=") else ""
        if any(regex.search(rf"(?<!\w){regex.escape(other)}(?!\w)", value) for other in keys if other != key):
            return text
    ordered = (field.strip(" \t\n,;|{}") for _, field in sorted(zip(keys, fields, strict=True)))
    return "\n".join((text[: bounds[0]], *ordered, behind))


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


def is_sign(word: str) -> bool:
    """True for a word that calculates or compares, such as "+" or "<="."""
    return not any(map(str.isalnum, word)) and not is_character(word)


def calculates(sign: str) -> bool:
    """True for a sign that needs a number or word on both sides, such as "+" or "<=", and not "++" or "%"."""
    return _BINARY.fullmatch(sign.strip()) is not None


def other_values(first: Sequence[str], second: Sequence[str]) -> bool:
    """True if two passages both have numbers and these differ, or if they differ in digits alone."""
    sides = (first, second)
    numbers = [[_digits(word) for word in words if word[0].isdigit()] for words in sides]
    names, digits = ([made("".join(words)) for words in sides] for made in (_without_digits, _digits))
    same_name = bool(first and second) and names[0] == names[1]
    return (all(numbers) and numbers[0] != numbers[1]) or (same_name and digits[0] != digits[1])


def _digits(text: str) -> tuple[str, ...]:
    return tuple(_DIGITS.findall(text.replace(",", "")))


def _without_digits(text: str) -> str:
    return str(_DIGITS.sub("", text.replace(",", "")))
