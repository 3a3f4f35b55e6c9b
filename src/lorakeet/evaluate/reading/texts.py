"""Text as a person reads it: Unicode forms, fenced blocks, words, and the signs that carry meaning."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

_LETTER = r"[\p{L}\p{M}\p{N}]"
_SIGNS = r"[^\s\p{L}\p{M}\p{N}]"
_HAS_LETTER = regex.compile(_LETTER)
_WORD = regex.compile(
    rf"(?<!{_LETTER})[-+](?=\p{{N}}){_LETTER}+|{_LETTER}+(?:['’]{_LETTER}+)*|{_SIGNS}(?:(?![-+]\p{{N}}){_SIGNS})*"
)
_UNSPACED = regex.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_FENCED = regex.compile(r"^[ \t]*(```+|~~~+)[^\n`]*\n(.*?)^[ \t]*\1[ \t]*$", regex.M | regex.S)
_EMPHASIS = regex.compile(r"(?<![\w*])(\*{1,3})(?=\S)([^*\n]+)(?<=\S)\1(?![\w*])")
_MARKUP = regex.compile(r"^[ \t]*(?:[-*•][ \t]+|#{1,6}[ \t]+(?!\d))", regex.M)  # a bullet, or a heading
_POWER = regex.compile(r"(\p{L}?)([⁰¹²³⁴-⁹⁺⁻]+)")
_CLOSING = ".,;:!?…'`\"’”»)]}"  # behind a sign they end the sentence or the bracket, and are no part of it
_OPENING = "([{`\"'«‘“¿¡"
_SOFT = regex.compile(r"(?:(?![%‰&*@#/\\\-_§′″])\p{P}|[`´])+")  # between words they only separate them
_VOWEL_POINTS = regex.compile("[\u0640\u064b-\u0652]")  # of Arabic, which most texts leave out
_QUOTE = regex.compile(  # also the marks of feet and inches, minutes and seconds
    r"(?<=\d)(?P<prime>′′|''|′)(?!\p{L})"
    r"|(?<!\w)(?P<opening>[\"“„](?=[^\s.,;:!?)\]}\"”]|\.\d)|'(?=[^\s.,;:!?)\]}']|\.\d))"
    r"|(?<=[^\s([{])(?P<closing>[\"“”]|'(?!\p{L}|\d{3}))"
)
_INITIALS = regex.compile(r"(?<![\w@.-])\p{L}(?:\.\p{L})+\.?(?![\w@])")  # U.S. is US, and q.d. qd
_RAISED = regex.compile(r"(?<=\p{L}\d*)\^\{?([-+]?\d+[-+]?|[-+])\}?")  # x^2 is x²; 10^2 stays
_ONE_SIGN = str.maketrans(
    {**dict.fromkeys("‐‑−﹣－", "-"), **dict.fromkeys("‘’ʼ", "'"), "≥": ">=", "≤": "<=", "≠": "!=", "\ufe0f": ""}
)
DOTLESS = "ıİ"


def plain(text: str) -> str:
    """The text in one Unicode form: wide, narrow and joined signs, dashes, apostrophes and spaces as the usual ones.

    NFC, and of the compatible forms (NFKC) those that change no value: 10² is not 102, but 10^2; m² is m2; 1½ is 1 1/2.
    """
    text = text if text.isascii() else _one_form(text)
    return _RAISED.sub(r"\1", text) if "^" in text else text


@lru_cache(4096)
def _one_form(text: str) -> str:
    text = _POWER.sub(lambda found: (found[1] or "^") + unicodedata.normalize("NFKC", found[2]), text)
    return unicodedata.normalize("NFC", "".join(map(_usual, text))).translate(_ONE_SIGN)


@lru_cache(4096)
def _usual(sign: str) -> str:
    if sign.isdecimal():
        return str(unicodedata.decimal(sign))
    kind = unicodedata.decomposition(sign).partition(">")[0]
    if kind == "<fraction":
        return " " + unicodedata.normalize("NFKC", sign).replace("⁄", "/")
    return unicodedata.normalize("NFKC", sign) if kind.startswith("<") and kind not in ("<super", "<circle") else sign


def unfenced(text: str, *, anywhere: bool = True) -> str:
    """The content of the only fenced block (``` or ~~~) of a text, or the text; not `anywhere`: of a block that is all of it."""
    found = list(_FENCED.finditer(text))
    if len(found) != 1 or not (anywhere or found[0][0].strip() == text.strip()):
        return text
    return str(found[0][2])


def words(text: str) -> list[str]:
    """The words and runs of signs of a text in one form; scripts without spaces count by characters."""
    found: list[str] = _WORD.findall(_UNSPACED.sub(r" \1 ", plain(text)))
    return found


@lru_cache(2048)
def bare(text: str) -> str:
    """The words and the signs that carry meaning, with single spaces between.

    Punctuation, quotes, brackets, bullets and emphasis around words go; + − = < > % & / and their like stay.
    """
    text = _INITIALS.sub(lambda found: found[0].replace(".", ""), _VOWEL_POINTS.sub("", text))
    text = _UNSPACED.sub(r" \1 ", _with_primes(plain(_EMPHASIS.sub(r"\2", _MARKUP.sub("", plain(text))))))
    return " ".join(kept for found in _WORD.finditer(text) if (kept := _kept(found[0], text, *found.span())))


def _with_primes(text: str) -> str:
    """The text with ′ and ″ in place of the marks behind numbers that close no quotation."""
    opened = {'"': False, "'": False}

    def made(found: regex.Match[str]) -> str:
        mark, behind = found[0], text[found.end() : found.end() + 1]
        kind = "'" if mark in "'′" else '"'
        prime = " ′ " if kind == "'" else " ″ "
        if found["prime"]:
            return prime
        measured = not opened[kind] and not found["opening"] and mark != "“"
        opened[kind] = bool(found["opening"])
        return prime if measured and text[found.start() - 1].isdecimal() and not behind.isalpha() else str(mark)

    return str(_QUOTE.sub(made, text))


def _kept(word: str, text: str, start: int, end: int) -> str:
    """A word as it stands, or what of a run of signs carries meaning."""
    if _HAS_LETTER.search(word):
        return word
    before, after = text[start - 1 : start], text[end : end + 1]
    if word == "_" and before.isalpha() and after.isalpha():
        return ""  # not_spam is not spam
    if word in "-–" and before.isalnum() and after.isalnum():
        return "-" if before.isdigit() and after.isdigit() else ""  # 2024-01-02, but well-known
    if word in ".:" and before.isdigit() and after.isdigit():
        return word
    if _SOFT.fullmatch(word):
        return ""
    return word.lstrip(_OPENING).rstrip(_CLOSING)


def unspaced_letters(text: str) -> int:
    """How many letters are of scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)."""
    return len(_UNSPACED.findall(text))


def folded(text: str, turkish: frozenset[str] | None = None) -> str:
    """The text in one case, by Unicode's folding. `turkish` are words of a Turkish file in small letters: there I is that of ı.

    A word with I is read as the file's own words have it: INFO as info where the file has that and not ınfo.
    """
    if turkish is None:
        return text.casefold().replace("i\u0307", "i")
    return " ".join(_fold_word(word, turkish) for word in text.split(" "))


def _fold_word(word: str, turkish: frozenset[str]) -> str:
    usual, dotless = folded(word), word.replace("İ", "i").replace("I", "ı").casefold()
    return usual if usual in turkish and dotless not in turkish else dotless
