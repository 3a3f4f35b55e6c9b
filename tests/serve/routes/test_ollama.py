"""Ollama's API by its own client: an adapter is a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ollama
import pytest

from lorakeet import __version__
from tiny.tools import CALL_SCHEMA, TOOL, WRITES_TOOLS

MESSAGES = [{"role": "user", "content": "The doctor gave me this drug."}]
GREEDY = {"temperature": 0, "num_predict": 12}


@pytest.fixture
def client(site: Callable[..., Any]) -> Any:
    found = ollama.Client(host=site().url)
    yield found
    found._client.close()


def test_streams_add_up(client: Any) -> None:
    whole = client.chat("a", MESSAGES, options=GREEDY)
    pieces = list(client.chat("a", MESSAGES, options=GREEDY, stream=True))
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert pieces[-1].done and pieces[-1].eval_count == whole.eval_count and pieces[-1].done_reason in ("stop", "length")
    assert len(pieces) > 5


def test_generate_goes_through_the_template_unless_raw(client: Any) -> None:
    prompt = MESSAGES[0]["content"]
    assert client.generate("a", prompt, options=GREEDY).response == client.chat("a", MESSAGES, options=GREEDY).message.content
    raw = client.generate("a", prompt, raw=True, options=GREEDY)
    assert raw.prompt_eval_count < client.generate("a", prompt, options=GREEDY).prompt_eval_count
    told = client.generate("a", prompt, system="Be brief.", options=GREEDY)
    assert told.prompt_eval_count > client.generate("a", prompt, options=GREEDY).prompt_eval_count
    pieces = client.generate("a", prompt, raw=True, options=GREEDY, stream=True)
    assert "".join(piece.response for piece in pieces) == raw.response


def test_json_by_a_schema(client: Any) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    found = client.chat("a", MESSAGES, options={**GREEDY, "num_predict": 40}, format=schema).message.content
    assert json.loads(found)["ok"] in (True, False)
    assert client.generate("a", "x", options=GREEDY, format="json").response.lstrip()[0] == "{"
    with pytest.raises(ollama.ResponseError, match="expected json or a JSON schema"):
        client._request_raw("POST", "/api/generate", json={"model": "a", "prompt": "x", "format": "xml"})


def test_refusals_are_ollamas(client: Any) -> None:
    with pytest.raises(ollama.ResponseError, match="No model 'c' is served") as error:
        client.chat("c", MESSAGES)
    assert error.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="mirostat is 2, which this server does not support"):
        client.chat("a", MESSAGES, options={"mirostat": 2})


def test_truncation_and_penalties_are_those_of_the_options(client: Any) -> None:
    plain = client.chat("a", MESSAGES, options={**GREEDY, "num_predict": 12}).message.content
    assert client.chat("a", MESSAGES, options={"temperature": 1.5, "top_k": 1, "num_predict": 12}).message.content == plain
    assert client.chat("a", MESSAGES, options={**GREEDY, "num_predict": 12, "repeat_penalty": 0.1}).message.content != plain


def test_images_are_refused_and_not_left_out(client: Any) -> None:
    with pytest.raises(ollama.ResponseError, match=r"images is .*, which this server does not support"):
        client.chat("a", [{**MESSAGES[0], "images": [b"a picture"]}])


def test_what_is_in_memory(client: Any) -> None:
    client.generate("b", "x", options=GREEDY)
    assert [model.model for model in client.ps().models] == ["tiny", "b"]


def test_what_is_known_of_a_model_is_shown(client: Any) -> None:
    shown = client.show("a")
    assert shown.details.parent_model == "tiny" and "completion" in shown.capabilities
    assert shown.modelinfo["general.parameter_count"] > 0
    with pytest.raises(ollama.ResponseError, match="No model 'c' is served"):
        client.show("c")


def test_the_version_is_told(client: Any) -> None:
    assert client._request_raw("GET", "/api/version").json() == {"version": __version__}


def test_calls_come_back_as_ollama_writes_them(site: Callable[..., Any]) -> None:
    served = site()
    served.service.text.tokenizer.chat_template = WRITES_TOOLS
    schema = CALL_SCHEMA["json_schema"]["schema"]
    found = ollama.Client(host=served.url)
    options = {**GREEDY, "num_predict": 60}
    whole = found.chat("a", MESSAGES, tools=[TOOL], format=schema, options=options)
    (last,) = found.chat("a", MESSAGES, tools=[TOOL], format=schema, options=options, stream=True)
    for answer in (whole, last):
        assert [call.function.name for call in answer.message.tool_calls or ()] == ["weather"]
        assert (answer.message.tool_calls or ())[0].function.arguments == {"city": "Rome"}
    found._client.close()
