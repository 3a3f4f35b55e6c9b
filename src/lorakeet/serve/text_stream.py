"""From tokens to pieces of text as they come: whole characters only, and nothing of what may become a stop text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what decoding gives for bytes that are no whole character yet
LONGEST_CHARACTER = 4  # tokens: a character of UTF-8 has at most four bytes, and a token at least one


class TextStream:
    """The text that tokens amount to, handed out as soon as it can no longer change.

    Only the last few tokens are decoded again, so that a long text costs no more per token than a short one.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text is certain
        self._before = 0  # where decoding begins: some tokens earlier, since a tokenizer may drop a leading space
        self._held = ""  # certain, but perhaps the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now that `token` has come. Once a stop text is complete, `stopped` is set; it is never shown."""
        self._ids.append(token)
        text = self._decode(self._before)
        if text.endswith(UNFINISHED) and len(self._ids) - self._shown < LONGEST_CHARACTER:
            return ""
        return self._release(self._advance(text))

    def end(self) -> str:
        """What is left when no token comes any more."""
        if self.stopped:
            return ""
        piece = self._release(self._advance(self._decode(self._before)))
        held, self._held = self._held, ""
        return piece + held

    def _advance(self, text: str) -> str:
        prefix = self._decode(self._before, self._shown)
        self._before, self._shown = self._shown, len(self._ids)
        return text[len(prefix) :]

    def _release(self, piece: str) -> str:
        """`piece` after what was held, up to the first stop text or to what may be the beginning of one."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, first: int, last: int | None = None) -> str:
        return str(self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def token_bytes(tokenizer: Any, number: int, text: str) -> bytes:
    """The bytes of a token, whose `text` they are unless it is part of a character: then as the vocabulary spells them.

    Vocabularies of bytes write a letter for each byte; those of SentencePiece write <0xE2>.
    """
    if UNFINISHED not in text:
        return text.encode()
    piece = str(tokenizer.convert_ids_to_tokens(number))
    if _BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return bytes(_LETTERS[letter] for letter in piece) if all(letter in _LETTERS for letter in piece) else text.encode()


def _letters() -> dict[str, int]:
    """The byte that each letter of a vocabulary of bytes stands for: itself where it can be seen, else the next from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_LETTERS = _letters()
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((count for count in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:count])), 0)
