"""What a server answers is bounded in bytes and in time, whatever it sends."""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
from collections.abc import Callable, Iterator
from http.client import HTTPException

import hypothesis
import pytest
from hypothesis import strategies as st

from lorakeet.errors import LONGEST_MESSAGE, EnvironmentProblem
from lorakeet.replying.speakers import BASE, ServerSpeaker
from lorakeet.runs import server_answer
from lorakeet.runs.judge_server import JudgeServer
from lorakeet.runs.server_answer import CallRefused, answer_lines, called_again, open_answer, read_answer, refusal_of
from lorakeet.serve.sampling import Sampling
from lorakeet.verification.server_apis import Api
from tiny.damage import other_bytes, other_json
from tiny.fuzz import fuzzed
from tiny.hostile_server import answering


def slowly(piece: bytes) -> Iterator[bytes]:
    while True:
        time.sleep(0.01)
        yield piece


class Slowly:
    """The same pieces for each request."""

    def __init__(self, piece: bytes) -> None:
        self.piece = piece

    def __iter__(self) -> Iterator[bytes]:
        return slowly(self.piece)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_answer, "MOST_ANSWER", 100_000)
    monkeypatch.setattr(server_answer, "LONGEST_LINE", 1000)
    monkeypatch.setattr(server_answer, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(server_answer, "LONGEST_STREAM", 0.1)


def test_an_answer_is_read_whole() -> None:
    with answering([b"ab", b"c" * 100_000]) as url, open_answer(url) as response:
        assert read_answer(response) == b"ab" + b"c" * 100_000


def test_a_stream_comes_line_by_line() -> None:
    with answering([b"a\nb", b"c\r\n\n", b"end"]) as url, open_answer(url, {"a": 1}) as response:
        assert list(answer_lines(response)) == [b"a", b"bc\r", b"", b"end"]


@pytest.mark.usefixtures("small")
def test_an_answer_without_end_is_refused() -> None:
    for sent in ([b"x" * 10_000] * 100, Slowly(b"x")):
        said = pytest.raises(EnvironmentProblem, match=r"more than|not whole")
        with answering(sent) as url, open_answer(url) as response, said:
            read_answer(response)


@pytest.mark.usefixtures("small")
def test_a_stream_without_lines_or_end_is_refused() -> None:
    for body, said in ((itertools.repeat(b"x" * 500, 50), "a line of more than 1,000 bytes"), (Slowly(b"x\n"), "was not whole"),
                       (itertools.repeat(b"x\n" * 5000, 50), "answers with more than 100,000")):  # fmt: skip
        with answering(body) as url, open_answer(url) as response, pytest.raises(EnvironmentProblem, match=said):
            list(answer_lines(response))


@pytest.mark.usefixtures("small")
def test_headers_without_end_are_cut_off() -> None:
    with answering(Slowly(b"x"), raw=True) as url, pytest.raises((OSError, HTTPException)):
        open_answer(url)


def test_what_a_server_says_of_an_error_is_cut() -> None:
    answer = b"HTTP/1.0 404 Nothing\r\n\r\n" + b"y" * 5000
    with answering([answer], raw=True) as url, pytest.raises(urllib.error.HTTPError) as caught:
        open_answer(url)
    said = refusal_of(caught.value)
    assert said.startswith("(404 Nothing): yyy") and len(said) < 600


def test_this_machines_own_addresses_are_not_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy elsewhere has another 127.0.0.1."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing is
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answering([b"here"]) as url, open_answer(url) as response:
        assert read_answer(response) == b"here"
    with pytest.raises(OSError, match="refused"):
        open_answer("http://elsewhere.invalid/")


def test_a_busy_server_is_called_again_and_no_other() -> None:
    codes, paused = iter((429, 503, 429)), list[float]()

    def call() -> str:
        if (code := next(codes, None)) is not None:
            raise CallRefused("no time", code)
        return "answer"

    assert called_again(call, (429, 503), (1.0, 2.0, 4.0), paused.append) == "answer" and paused == [1.0, 2.0, 4.0]
    for given, waits in ((404, []), (429, [1.0])):
        codes, paused = iter((given, 404)), []
        with pytest.raises(CallRefused) as caught:
            called_again(call, (429, 503), (1.0,), paused.append)
        assert caught.value.status == 404 and paused == waits


CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Right. [[A]]"},
          "delta": {"content": "a"}, "text": "ab", "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-0.5, -1.0],
                                     "top_logprobs": [{"a": -0.5, "c": -2.0}, {"b": -1.0}], "content": [
              {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}]}}  # fmt: skip
ANSWER = {"object": "list", "data": [{"id": "m"}], "choices": [CHOICE], "tokens": [1, 2], "usage": {"prompt_tokens": 3}}
HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
CHAT = [{"role": "user", "content": "?"}]


def say_to(url: str) -> list[str]:
    speaker, _ = ServerSpeaker.at(url)
    return list(speaker.reply(CHAT, BASE, Sampling()))


def compared(url: str) -> object:
    api = Api(url, "m")
    return api.serves_it(), api.tokenise("x"), api.prompt_length(CHAT), api.write([1], 2), api.chat(CHAT, 2)


@pytest.fixture(scope="module")
def hostile() -> Iterator[tuple[str, list[bytes]]]:
    """A server, and the pieces that it answers with."""
    pieces: list[bytes] = []
    with answering(pieces, raw=True) as url:
        yield url, pieces


@fuzzed(quick=100, many=20_000)
@hypothesis.given(
    answer=st.one_of(other_json(ANSWER).map(lambda body: HEAD + body), other_bytes(HEAD + json.dumps(ANSWER).encode()),
                     other_json(ANSWER).map(lambda body: HEAD + b"data: " + body + b"\n\n")),
    call=st.sampled_from([lambda url: JudgeServer.at(f"{url}#m").reply("?"), say_to, compared]),
)  # fmt: skip
def test_any_answer_is_used_or_one_message(
    hostile: tuple[str, list[bytes]], answer: bytes, call: Callable[[str], object]
) -> None:
    url, pieces = hostile
    pieces[:] = [answer]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        try:
            call(url)
        except EnvironmentProblem as error:
            assert len(str(error)) <= LONGEST_MESSAGE
