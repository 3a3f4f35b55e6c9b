"""Decodes tokens to pieces of text as they come: whole characters only, and no beginning of a stop text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lorakeet.data.template import decoded

UNFINISHED = "\ufffd"  # decoded from bytes of an incomplete character
LONGEST_CHARACTER = 4  # tokens: a character of UTF-8 has at most four bytes, and a token at least one


class TextStream:
    """The text of tokens, returned as soon as it can no longer change.

    Only the last few tokens are decoded again, so that the cost per token does not depend on the length.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text is final
        self._before = 0  # where decoding starts: some tokens earlier, since a tokenizer may drop a leading space
        self._pending = ""  # final, but perhaps the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is final after `token`. Sets `stopped` when a stop text is complete, which is never returned."""
        self._ids.append(token)
        text = self._decode(self._before)
        if text.endswith(UNFINISHED) and len(self._ids) - self._shown < LONGEST_CHARACTER:
            return ""
        return self._release(self._advance(text))

    def end(self) -> str:
        """The rest of the text after the last token."""
        if self.stopped:
            return ""
        piece = self._release(self._advance(self._decode(self._before)))
        pending, self._pending = self._pending, ""
        return piece + pending

    def _advance(self, text: str) -> str:
        prefix = self._decode(self._before, self._shown)
        self._before, self._shown = self._shown, len(self._ids)
        return text[len(prefix) :]

    def _release(self, piece: str) -> str:
        """The pending text and `piece`, up to the first stop text or the possible beginning of one."""
        text = self._pending + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._pending = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, first: int, last: int | None = None) -> str:
        return decoded(self._tokenizer, self._ids[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_bytes(tokenizer: Any, number: int, text: str) -> bytes:
    """The bytes of a token: those of its `text`, or of its vocabulary entry if it is part of a character.

    Byte-level vocabularies have a letter for each byte; those of SentencePiece have <0xE2>.
    """
    if UNFINISHED not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(number))
    if _BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return bytes(_LETTERS[letter] for letter in piece) if all(letter in _LETTERS for letter in piece) else text.encode()


def _letters() -> dict[str, int]:
    """The byte of each letter of a byte-level vocabulary: printable ones are themselves, the others follow from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_LETTERS = _letters()
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((count for count in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:count])), 0)
