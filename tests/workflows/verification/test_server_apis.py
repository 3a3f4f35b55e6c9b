"""`workflows.server_apis`: each API is recognised, asked only for what it knows, and says None where it does not tell."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import LONGEST_MESSAGE, ConfigError, EnvironmentProblem
from lorakeet.models.text.load import load_tokenizer
from lorakeet.workflows.verification import server_apis
from lorakeet.workflows.verification.server_apis import (
    Api,
    CallRefused,
    LlamaCppApi,
    OllamaApi,
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
    tells = kind in ("llama.cpp", "vLLM")
    assert api.tokenise("Is it") == (tokenizer.encode("Is it") if tells else None)
    assert api.prompt(TALK) == (ids if tells else None)
    if not tells:
        assert api.prompt_length(TALK) == len(ids)
    assert api.takes_ids is (kind != "Ollama")
    about = {"llama.cpp": "/models/tiny.gguf by llama.cpp b7", "vLLM": "tiny by vLLM 0.11.0", "OpenAI": "tiny by a server with"}
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
        assert (step.token.number is not None) is (kind in ("llama.cpp", "vLLM"))
    along = api.along(ids)
    assert (along is not None) is (kind == "vLLM")
    if along is not None:
        assert set(along) == set(range(len(ids) - 1))
        assert sorted(token.number for token in along[2]) == sorted(token.number for token in api.write(ids[:3], 1).steps[0].top)


def test_a_server_with_several_models_gets_the_name(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")

    def several(self: Any) -> None:
        listed = {"data": [{"id": "one", "owned_by": "lorakeet"}, {"id": "two", "owned_by": "lorakeet"}]}
        self._say(listed if self.path == "/v1/models" else None)

    monkeypatch.setattr(Fake, "do_GET", several)
    with serving(file, load_tokenizer(tiny_llama_folder), "OpenAI") as url:
        with pytest.raises(ConfigError, match=r"serves one, two; say which of them is meant: --against .*#NAME"):
            find_api(url, "")
        assert find_api(url, "two").model == "two"
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


@pytest.mark.parametrize("kind", [Api, VllmApi, LlamaCppApi, OllamaApi])
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
    """One that refuses more is queried again once; what it accepts is remembered."""
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")
    refused: list[int] = []
    completions = Fake.completions

    def few(self: Any, asked: Any) -> Any:
        if asked.get("logprobs", 0) > most:
            refused.append(asked["logprobs"])
            return None
        return completions(self, asked)

    monkeypatch.setattr(Fake, "completions", few)
    with serving(file, load_tokenizer(tiny_llama_folder), "OpenAI") as url:
        api = find_api(url, "")
        written = [api.write([5, 9, 70], 2) for _ in range(2)]
    assert all(len(one.steps) == (2 if most else 0) and one.text for one in written)
    assert all(0 < len(step.top) <= most for one in written for step in one.steps)
    assert refused == [10, 5, 1][: {5: 1, 1: 2, 0: 3}[most]]


def test_a_server_without_tls_is_one_message(tmp_path: Path, tiny_llama_folder: Path) -> None:
    file = write_model(tiny_llama_folder, None, tmp_path / "model.gguf")
    broken = pytest.raises(EnvironmentProblem, match=r"gives no answer that can be used .*SSL")
    with serving(file, load_tokenizer(tiny_llama_folder), "OpenAI") as url, broken:
        find_api(url.replace("http:", "https:"), "")
