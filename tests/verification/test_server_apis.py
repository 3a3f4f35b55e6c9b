"""`verification.server_apis`: each API is recognised, asked only for what it knows, and says None where it does not tell."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import LONGEST_MESSAGE, ConfigError, EnvironmentProblem
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.server_answer import CallRefused
from lorakeet.verification import server_apis
from lorakeet.verification.server_apis import (
    Api,
    LlamaCppApi,
    OllamaApi,
    SglangApi,
    Token,
    VllmApi,
    Written,
    ask,
    find_api,
)
from tiny.exports import write_model
from tiny.servers import KINDS, MODEL, Fake, serving

TALK = [{"role": "user", "content": "Is it good?"}]


@pytest.fixture(scope="module", params=KINDS)
def served(request: Any, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(the kind, its API as found, the tokenizer)"""
    tokenizer = load_tokenizer(tiny_llama_folder)
    file = write_model(tiny_llama_folder, None, tmp_path_factory.mktemp("served") / "model.gguf")
    with serving(file, tokenizer, request.param) as url:
        yield request.param, find_api(url, ""), tokenizer


def test_what_each_server_tells_of_prompts(served: Any) -> None:
    kind, api, tokenizer = served
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    tells = kind in ("llama.cpp", "vLLM", "SGLang")
    assert api.tokenise("Is it") == (tokenizer.encode("Is it") if tells else None)
    assert api.prompt(TALK) == (ids if tells else None)
    if not tells:
        assert api.prompt_length(TALK) == len(ids)
    assert api.takes_ids is (kind != "Ollama")
    about = {"llama.cpp": "/models/tiny.gguf by llama.cpp b7", "vLLM": "tiny by vLLM 0.11.0", "OpenAI": "tiny by a server with"}
    about["SGLang"] = "tiny by SGLang 0.5.23"
    assert api.number_format() == {"llama.cpp": "F16", "Ollama": "F16", "SGLang": "float16"}.get(kind, "")
    assert about.get(kind, "tiny (0123456789ab) by Ollama 0.12.11") in api.about()


def test_what_each_server_tells_of_tokens(served: Any) -> None:
    kind, api, tokenizer = served
    ids = tokenizer.encode("Is it good?")
    written = api.chat(TALK, 5) if kind == "Ollama" else api.write(ids, 5)
    assert 1 <= len(written.steps) <= 5
    for step in written.steps:
        by_text = kind == "OpenAI"  # by which pieces of characters coincide
        assert by_text or (step.top[0].logprob == step.token.logprob and len(step.top) == 10)
        assert step.token.text in {token.text for token in step.top}
        assert by_text or all(one.logprob >= two.logprob for one, two in zip(step.top, step.top[1:], strict=False))
        assert (step.token.number is not None) is (kind in ("llama.cpp", "vLLM", "SGLang"))
    along = api.along(ids)
    assert (along is not None) is (kind in ("vLLM", "SGLang"))
    if along is not None:
        assert set(along) == set(range(len(ids) - 1))
        assert sorted(token.number for token in along[2]) == sorted(token.number for token in api.write(ids[:3], 1).steps[0].top)


def test_a_server_with_several_models_gets_the_name(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")

    def several(self: Any) -> None:
        listed = {"data": [{"id": "one", "owned_by": "lorakeet"}, {"id": "two", "owned_by": "lorakeet", "dtype": "bfloat16"}]}
        self._say(listed if self.path == "/v1/models" else None)

    monkeypatch.setattr(Fake, "do_GET", several)
    with serving(file, load_tokenizer(tiny_llama_folder), "OpenAI") as url:
        with pytest.raises(ConfigError, match=r"serves one, two; say which of them is meant: --against .*#NAME"):
            find_api(url, "")
        assert find_api(url, "two").model == "two"
        assert [find_api(url, name).number_format() for name in ("one", "two")] == ["", "bfloat16"]
        with pytest.raises(CallRefused, match=r"/nowhere refuses \(404"):
            ask(url, "/nowhere")


def test_a_server_that_tells_no_log_probabilities_gives_text_alone(tmp_path: Path, tiny_llama_folder: Path) -> None:
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")
    with serving(file, load_tokenizer(tiny_llama_folder), "Ollama", logprobs=False) as url:
        written = find_api(url, MODEL).chat(TALK, 5)
    assert written.text and written.steps == () and Token("a").logprob is None


def test_nothing_there_is_said() -> None:
    with pytest.raises(EnvironmentProblem, match="gives no answer that can be used"):
        find_api("http://127.0.0.1:9", "")


ODD = [
    None, True, 0, -1, 1e400, float("nan"), 10**30, "", "x", [], {}, [None], [[]], [{}], ["x", 1], {"a": 1}, "[" * 50,
    [{"token": "a", "id": -5}], [{"token": "a", "logprob": 5.0}], [{"token": "a", "logprob": "x"}],
    [{"token": "a", "top_logprobs": 3}],
]  # fmt: skip
BODIES: list[Any] = [*ODD]
for _odd in ODD:
    BODIES += [
        {"tokens": _odd}, {"choices": _odd}, {"choices": [_odd]}, {"choices": [{"message": _odd}]}, {"data": _odd},
        {"choices": [{"message": {"content": _odd}, "logprobs": {"content": _odd}}]}, {"usage": _odd}, {"prompt": _odd},
        {"usage": {"prompt_tokens": _odd}}, {"choices": [{"text": _odd, "logprobs": _odd}]}, {"completion_probabilities": _odd},
        {"choices": [{"logprobs": {"tokens": _odd, "token_logprobs": _odd, "top_logprobs": _odd}}]}, {"models": _odd},
        {"choices": [{"prompt_logprobs": _odd}]}, {"choices": [{"prompt_logprobs": [None, {"7": _odd}]}]}, {"message": _odd},
        {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [_odd], "top_logprobs": [_odd]}}]}, {"data": [_odd]},
        {"message": {"content": "x"}, "logprobs": _odd, "prompt_eval_count": _odd, "version": _odd},
    ]  # fmt: skip
CALLS: list[Callable[[Api], Any]] = [
    lambda api: api.about(), lambda api: api.tokenise("x"), lambda api: api.prompt([{"role": "user", "content": "x"}]),
    lambda api: api.prompt_length([{"role": "user", "content": "x"}]), lambda api: api.along([1, 2]),
    lambda api: api.write([1, 2], 3) if api.takes_ids else None, lambda api: api.chat([{"role": "user", "content": "x"}], 3),
]  # fmt: skip


@pytest.mark.parametrize("kind", [Api, VllmApi, SglangApi, LlamaCppApi, OllamaApi])
def test_answers_of_any_kind_are_values_or_one_message(kind: type[Api], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [json.dumps(body) for body in BODIES]
    texts += ["", "[" * 100_000, "1" * 5000, '{"tokens": ' + "[" * 100_000, "\ufeff{}", "{", '{"tokens": [1e999]}']
    sent: list[str] = []
    monkeypatch.setattr(server_apis, "open_answer", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(server_apis, "read_answer", lambda _: sent[-1].encode())
    refused = 0
    for text in texts:
        sent.append(text)
        for call in CALLS:
            try:
                found = call(kind("http://x", "m"))
            except EnvironmentProblem as error:
                refused += 1
                assert "http://x" in str(error) and len(str(error)) <= LONGEST_MESSAGE
                continue
            for step in found.steps if isinstance(found, Written) else ():
                assert all(token.logprob is None or token.logprob < 0.01 for token in (step.token, *step.top))  # nor NaN
        with contextlib.suppress(EnvironmentProblem, ConfigError):
            find_api("http://x", "")
    assert refused > 200


@pytest.mark.parametrize("most", [5, 1, 0])
def test_a_server_that_reports_fewer_likeliest_tokens_is_queried_for_so_many(
    most: int, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses more in two calls is queried for fewer from then on."""
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")
    refused: list[int] = []
    completions = Fake.completions

    def few(self: Any, asked: Any) -> Any:
        if asked.get("logprobs", 0) > most:
            refused.append(asked["logprobs"])
            return 400
        return completions(self, asked)

    monkeypatch.setattr(Fake, "completions", few)
    with serving(file, load_tokenizer(tiny_llama_folder), "OpenAI") as url:
        api = find_api(url, "")
        written = [api.write([5, 9, 70], 2) for _ in range(4)]
    assert all(len(one.steps) == (2 if most else 0) and one.text for one in written)
    assert all(0 < len(step.top) <= most for one in written for step in one.steps)
    assert refused == [10, 5, 1][: {5: 1, 1: 2, 0: 3}[most]] * 2


def answering(*statuses: int | bytes) -> tuple[str, list[str], Callable[[], None]]:
    """The address of a server that answers each request with the next status, or these bytes, and then with {"tokens": [1]}."""
    left, seen = list(statuses), list[str]()

    class Next(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers.get("Authorization", ""))
            status = left.pop(0) if left else 200
            if isinstance(status, bytes):
                self.wfile.write(status)
                return
            data = b'{"tokens": [1]}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Next)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    return f"http://127.0.0.1:{server.server_port}", seen, stop


@pytest.mark.slow
def test_a_server_that_has_no_time_is_queried_again_and_later_has_none() -> None:
    waits = list[float]()
    url, seen, stop = answering(429, 503)
    try:
        assert ask(url, "/x", {}, key="sesame", pause=waits.append) == {"tokens": [1]}
        assert waits == [1.0, 3.0] and seen == ["Bearer sesame"] * 3
    finally:
        stop()
    url, seen, stop = answering(*[429] * 9)
    try:
        with pytest.raises(EnvironmentProblem, match=r"refuses \(429") as raised:
            ask(url, "/x", {}, pause=waits.append)
        assert not isinstance(raised.value, CallRefused) and len(seen) == 4
    finally:
        stop()


@pytest.mark.parametrize("status", [401, 404, 500])
def test_another_refusal_is_none_of_the_number_of_likeliest_tokens(status: int) -> None:
    """What a server reports is not forgotten because of it."""
    url, seen, stop = answering(status)
    try:
        api = Api(url, "m", "sesame")
        with pytest.raises(CallRefused) as raised:
            api.write([1], 1)
        assert raised.value.status == status and len(seen) == 1 and api._most == (10, 5, 1, 0) and seen == ["Bearer sesame"]
    finally:
        stop()


def test_a_number_that_was_refused_once_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals, requested = [400], list[int]()

    def answer(url: str, path: str, body: Any, **_: Any) -> dict[str, Any]:
        requested.append(body.get("logprobs", 0))
        if refusals:
            raise CallRefused("no", refusals.pop())
        return {"choices": [{"text": "x"}]}

    monkeypatch.setattr(server_apis, "ask", answer)
    api = Api("http://x", "m")
    for _ in range(3):
        api.write([1], 1)
    assert requested == [10, 5, 10, 10]


@pytest.mark.parametrize("body", [b"ffff\r\nno such", b"zz\r\nno such"])
def test_an_error_whose_body_is_cut_or_broken_is_a_refusal(body: bytes) -> None:
    url, _, stop = answering(b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    try:
        with pytest.raises(CallRefused, match="404"):
            ask(url, "/x", {})
    finally:
        stop()


def test_whether_the_model_is_still_served_is_known(served: Any) -> None:
    kind, api, _ = served
    assert api.serves_it()
    other = type(api)(api.url, "another")
    assert other.serves_it() is (kind == "llama.cpp"), "which has a single one"


def test_a_server_without_tls_is_one_message(tmp_path: Path, tiny_llama_folder: Path) -> None:
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")
    broken = pytest.raises(EnvironmentProblem, match=r"gives no answer that can be used .*SSL")
    with serving(file, load_tokenizer(tiny_llama_folder), "OpenAI") as url, broken:
        find_api(url.replace("http:", "https:"), "")


def test_an_adapter_that_sglang_loaded_at_run_time_is_named_in_each_call(tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama_folder)
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")
    with serving(file, tokenizer, "SGLang") as url:
        assert ask(url, "/load_lora_adapter", {"lora_name": "mine", "lora_path": "/mine"})["success"]
        mine, base = find_api(url, "mine"), find_api(url, MODEL)
        assert mine.serves_it() and mine.about() == "mine by SGLang 0.5.23" and mine.write([1, 2, 3], 2).steps
        sent: list[Any] = []
        for api in (mine, base):
            api._ask = lambda path, body=None, whole=api._ask: (sent.append(body), whole(path, body))[1]  # type: ignore[method-assign]
            api.write([1, 2, 3], 1)
        assert [body.get("lora_path") for body in sent if body] == ["mine", None]
        one = {"max_new_tokens": 1, "temperature": 0}
        with pytest.raises(CallRefused):
            ask(url, "/generate", {"input_ids": [1], "sampling_params": one, "lora_path": "unknown"})
