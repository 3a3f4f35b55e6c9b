"""Pieces of text add up to the text, characters come whole, and a stop text is never shown, however it is cut."""

from __future__ import annotations

import pytest

from lorakeet.serve.text_stream import TextStream
from tiny.models import tiny_tokenizer

TEXT = "Ärger 🙂 with naïve  text.\nThis drug worked well for my pain; 日本語 and the end"


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return tiny_tokenizer()


def pieces(tokenizer: object, text: str, *stops: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stops)
    found = []
    for token in tokenizer.encode(text, add_special_tokens=False):  # type: ignore[attr-defined]
        found.append(stream.add(token))
        if stream.stopped:
            return found, True
    return [*found, stream.end()], stream.stopped


def test_pieces_add_up_and_are_whole_characters(tokenizer: object) -> None:
    found, stopped = pieces(tokenizer, TEXT)
    assert "".join(found) == TEXT and not stopped
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > 10, "shown as it comes"


@pytest.mark.parametrize("stop", ["worked", " w", "日本", "🙂", "the end", "\n", "."])
def test_a_stop_text_is_never_shown(tokenizer: object, stop: str) -> None:
    found, stopped = pieces(tokenizer, TEXT, "not in it", stop)
    assert stopped and "".join(found) == TEXT[: TEXT.index(stop)]


def test_what_only_looked_like_a_stop_text_is_shown_in_the_end(tokenizer: object) -> None:
    found, stopped = pieces(tokenizer, TEXT, "the end of it")
    assert "".join(found) == TEXT and not stopped
    assert found[-1].endswith("the end")


def test_broken_bytes_do_not_hold_a_text_up(tokenizer: object) -> None:
    stream = TextStream(tokenizer)
    half = tokenizer.encode("🙂", add_special_tokens=False)[0]  # type: ignore[attr-defined]
    shown = "".join(stream.add(half) for _ in range(8)) + stream.end()
    assert set(shown) == {"\ufffd"}
