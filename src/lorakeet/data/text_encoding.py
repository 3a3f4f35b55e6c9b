"""Recognises the encoding of a text file by its marks, zero bytes and letters, and says which one to set."""

from __future__ import annotations

import codecs

from lorakeet.errors import DataError, Remedy, spelt

MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")
)  # fmt: skip
OTHERS = "cp1250, cp1251, cp850, mac_roman, shift_jis, gb18030, euc_kr"
_SHOWN = 24  # bytes on each side of the one that could not be read
_WESTERN = "cp1252"


def codec_of(beginning: bytes, encoding: str, name: str) -> str:
    """The codec that reads the file `name`, whose first bytes are given: `encoding`, without a byte-order mark in the text.

    Raises DataError where these bytes show that the encoding is another one.
    """
    chosen = codecs.lookup(encoding).name
    mark = next((family for bytes_, family in MARKS if beginning.startswith(bytes_)), None)
    if mark is not None:
        if chosen.startswith(mark):
            return "utf-8-sig" if mark == "utf-8" else mark
        said = f"{name} begins with the byte-order mark of {mark}, so it is not {encoding} text."
        raise _refusal(f"{said} {_advice(mark)}.", name, mark)
    found = utf_16_of(beginning)
    if found and chosen not in (found, "utf-32", "utf-32-le", "utf-32-be"):
        said = f"{name} has a zero byte beside each letter, as {found} has: it is not {encoding} text."
        raise _refusal(f"{said} {_advice(found)}.", name, found)
    if not found and not chosen.startswith(("utf-8", "ascii")):
        text = _as_utf_8(beginning)
        if text and (chosen.startswith("utf") or not text.isascii()):
            said = f"{name} is utf-8 text and not {encoding}{_otherwise(text, encoding)}."
            raise _refusal(f"{said} {_advice('utf-8')}.", name, "utf-8")
    return "utf-8-sig" if chosen == "utf-8" else encoding


def utf_16_of(beginning: bytes) -> str:
    """ "utf-16-le" or "utf-16-be" where zero bytes stand in every second place, as beside Latin letters; else ""."""
    even, odd = beginning[::2].count(0), beginning[1::2].count(0)
    if even + odd < max(2, len(beginning) // 50) or min(even, odd) > max(even, odd) // 10:
        return ""
    return "utf-16-le" if odd > even else "utf-16-be"


def encoding_refusal(error: UnicodeDecodeError, encoding: str, name: str) -> DataError:
    """The error for bytes that `encoding` cannot read: what they are, or how they read as cp1252, for the user to see."""
    block, at = error.object, error.start
    said = f"{name} is not {encoding} text (byte 0x{block[at : at + 1].hex()})."
    if codecs.lookup(encoding).name != "utf-8" and not block.isascii() and _as_utf_8(block) is not None:
        return _refusal(f"{said} It is utf-8. {_advice('utf-8')}.", name, "utf-8")
    around = block[max(0, at - _SHOWN) : at + _SHOWN]
    shown = next((line for line in around.splitlines() if not line.isascii()), around).strip()
    try:
        western = shown.decode(_WESTERN) if _letters_stand_alone(block) else None
    except UnicodeDecodeError:
        western = None
    if western is None:
        return _refusal(
            f"{said} Set {spelt('data.encoding')} to what the file was saved in, such as {OTHERS}, or convert the file to UTF-8.",
            name,
        )
    return _refusal(
        f"{said} {_advice(_WESTERN)} if {western!r} reads right; otherwise what the file was saved in, such as {OTHERS}, or "
        "convert the file to UTF-8.",
        name,
        _WESTERN,
    )


def _refusal(message: str, name: str, encoding: str = "") -> DataError:
    """The error for the file `name`, which seems to be in this encoding."""
    remedies = [_remedy(encoding)] if encoding else []
    return DataError(message, code="encoding-wrong", values={"file": name}, remedies=remedies)


def _remedy(encoding: str) -> Remedy:
    return Remedy("data.encoding", encoding, f"Read it as {encoding}")


def _advice(encoding: str) -> str:
    return f"Set {_remedy(encoding).flag}"


def _as_utf_8(block: bytes) -> str | None:
    """The text of a block whose last letter may be cut, or None."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(block)
    except UnicodeDecodeError:
        return None


def _otherwise(said: str, encoding: str) -> str:
    """How the first word that is not ASCII would read in `encoding`."""
    word = next((word for word in said.split() if not word.isascii()), "")[:_SHOWN]
    return f", in which {word!r} would be {word.encode().decode(encoding, 'replace')!r}" if word else ""


def _letters_stand_alone(block: bytes) -> bool:
    """True if most bytes beyond ASCII stand between ASCII ones, as accented letters of Western European languages do."""
    plain = [byte < 128 for byte in block]
    alone = sum(1 for i, ascii_ in enumerate(plain) if not ascii_ and all(plain[max(0, i - 1) : i] + plain[i + 1 : i + 2]))
    return 2 * alone > plain.count(False)
