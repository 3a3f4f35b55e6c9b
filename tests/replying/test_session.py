"""A conversation and its commands, with a speaker that repeats what it hears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakeet.errors import LorakeetError
from lorakeet.replying.session import ChatSession
from lorakeet.replying.speakers import BASE, LocalSpeaker, Messages
from lorakeet.serve.sampling import Sampling


class Echo:
    """Answers with the choice, the number of messages and the last one."""

    names: tuple[str, ...] = ("reviews", "dates")

    def check(self, choice: str) -> None:
        LocalSpeaker(None, dict.fromkeys(self.names), {}).check(choice)  # type: ignore[arg-type,dict-item]

    def reply(self, messages: Messages, choice: str, sampling: Sampling) -> Iterator[str]:
        yield from (f"{choice} ", f"{len(messages)} ", messages[-1]["content"])


def session(**more: object) -> ChatSession:
    return ChatSession(Echo(), Sampling(), "reviews", **more)  # type: ignore[arg-type]


def said(chat: ChatSession, text: str) -> dict[str, str]:
    found = {choice: "".join(stream) for choice, stream in chat.replies(text).items()}
    chat.keep(text, list(found.values())[-1])
    return found


def test_the_conversation_goes_on() -> None:
    chat = session(system="Be brief.")
    assert said(chat, "hi") == {"reviews": "reviews 2 hi"}
    assert said(chat, "again") == {"reviews": "reviews 4 again"}
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.command("/reset") == "The conversation is forgotten." and said(chat, "new") == {"reviews": "reviews 2 new"}


def test_who_answers() -> None:
    chat = session()
    assert chat.command("/base") == "The base answers." and list(said(chat, "x")) == [BASE]
    assert chat.command("/adapter") == "reviews answers." and list(said(chat, "x")) == ["reviews"]
    assert chat.command("/adapter dates") == "dates answers." and list(said(chat, "x")) == ["dates"]
    assert chat.command("/adapters") == "  reviews\n* dates"
    assert "side by side" in chat.command("/both") and list(said(chat, "x")) == [BASE, "dates"]
    assert chat.said[-1]["content"].startswith("dates "), "the adapter's reply is what the conversation goes on from"
    chat.command("/adapters reviews*0.7 + dates*0.3")
    assert list(said(chat, "x")) == ["reviews*0.7+dates*0.3"]


def test_saved_as_a_training_row(tmp_path: Path) -> None:
    chat = session()
    said(chat, "hi")
    file = tmp_path / "chat.jsonl"
    assert chat.command(f"/save {file}") == f"2 messages are in {file}."
    assert json.loads(file.read_text()) == {"messages": chat.messages}
    with pytest.raises(LorakeetError, match=r"chat\.jsonl cannot be written"):
        chat.command(f"/save {file}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sytem", r"There is no command /sytem. Did you mean 'system'\?"),
        ("/adapter revews", r"no adapter 'revews'; there are reviews, dates, base. Did you mean 'reviews'"),
        ("/adapters reviews*x", "is no number"),
        ("/save", "/save needs the name of a new file"),
        ("/save x.jsonl", "Nothing was said yet"),
    ],
)
def test_mistakes_change_nothing(line: str, message: str) -> None:
    chat = session()
    with pytest.raises(LorakeetError, match=message):
        chat.command(line)
    assert (chat.choice, chat.both, chat.said, chat.ended) == ("reviews", False, [], False)


def test_without_adapters_there_is_nothing_to_compare() -> None:
    class Alone(Echo):
        names = ()

    chat = ChatSession(Alone(), Sampling(), BASE)
    for line in ("/both", "/adapter"):
        with pytest.raises(LorakeetError, match="There is no adapter"):
            chat.command(line)
    assert "/both" in chat.command("/help") and chat.command("/quit") == "" and chat.ended
