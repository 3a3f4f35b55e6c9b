"""OpenAI's API by its own client: texts equal the engine's, streams equal the whole, and every setting has its effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tiny.tools import CALL_SCHEMA, TOOL, WRITES_TOOLS

MESSAGES = [{"role": "user", "content": "The doctor gave me this drug."}]


@pytest.fixture
def served(site: Callable[..., Any]) -> Any:
    return site()


@pytest.fixture
def client(served: Any) -> Any:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def chat(client: Any, model: str, **options: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 12, **options}
    return client.chat.completions.create(model=model, messages=MESSAGES, **settings)


def test_models_are_listed_with_their_parent(client: Any) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["tiny", "a", "b"]
    assert listed["a"].parent == "tiny" and listed["a"].root.endswith("/a")


def test_adapters_base_and_mixes(client: Any) -> None:
    names = ("tiny", "a", "b", "a*0.2+b*0.8", "a*3")
    texts = {name: chat(client, name).choices[0].message.content for name in names}
    assert len(set(texts.values())) >= 4, texts
    assert chat(client, "tiny:a").choices[0].message.content == texts["a"]
    answer = chat(client, "a")
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.object == "chat.completion"
    usage = answer.usage
    assert usage.prompt_tokens > 10 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_stream_adds_up_to_the_whole(client: Any) -> None:
    whole = chat(client, "a")
    pieces = list(chat(client, "a", stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(pieces) > 5, "it came in pieces"


def test_stop_seed_n_and_logprobs(client: Any) -> None:
    whole = chat(client, "a").choices[0].message.content
    stop = whole[3:5]
    cut = chat(client, "a", stop=[stop, "never"]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    warm = {"temperature": 1.5, "top_p": 0.9, "seed": 11, "n": 3}
    first, second = ([c.message.content for c in chat(client, "a", **warm).choices] for _ in range(2))
    assert first == second and len(set(first)) == 3
    told = chat(client, "a", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob < 0 for entry in told)
    assert "".join(entry.token for entry in told).startswith(whole[:3])


def test_json_by_a_schema(client: Any) -> None:
    properties = {"drug": {"enum": ["aspirin", "statin"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": schema}}
    for model, options in (("a", {}), ("b", {"temperature": 1.5, "seed": 3})):
        choice = chat(client, model, max_tokens=60, response_format=asked, **options).choices[0]
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and found["drug"] in properties["drug"]["enum"] and 1 <= found["stars"] <= 5
    pieces = chat(client, "a", max_tokens=60, response_format=asked, stream=True)
    whole = json.loads(chat(client, "a", max_tokens=60, response_format=asked).choices[0].message.content)
    assert json.loads("".join(piece.choices[0].delta.content or "" for piece in pieces)) == whole
    assert chat(client, "a", response_format={"type": "json_object"}).choices[0].message.content.lstrip()[0] == "{"
    for broken in ({"type": "xml"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}):
        with pytest.raises(openai.BadRequestError, match=r"expected text, json_object or json_schema|cannot be used"):
            chat(client, "a", response_format=broken)


def test_refusals_are_openais(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match=r"No model 'bb' is served\. Did you mean 'b'"):
        chat(client, "bb")
    for changes, message in (
        ({"temperature": 3}, "between 0 and 2"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"n": 17}, "n is 17"),
        ({"stop": [""]}, "none of them empty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty is 2.5; it must lie between -2 and 2"),
        ({"logit_bias": {"x": 1}}, "logit_bias has the key 'x'; expected token ids"),
        ({"logit_bias": {"0" * 20 + "99999999": 1}}, "logit_bias has the key '0+9+'; expected token ids"),
        ({"logit_bias": {"0" * 5000: 1}}, "expected token ids"),
        ({"logit_bias": {"99999999": 1}}, "expected token ids"),
        ({"extra_body": {"best_of": 3}}, "best_of is 3, which this server does not support"),
        ({"extra_body": {"tempratur": 1}}, "tempratur in the request is not known here"),
        ({"top_logprobs": 2}, "needs logprobs"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            chat(client, "a", **changes)
    for broken in ([], [{"role": "clown", "content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="a", messages=broken)
    with pytest.raises(openai.BadRequestError, match="at most 127 fit"):
        client.completions.create(model="a", prompt="word " * 300)


def test_an_ignorable_field_is_ignored_and_a_neutral_one_too(client: Any) -> None:
    assert chat(client, "a", user="me", frequency_penalty=0, response_format={"type": "text"}).choices[0].message.content


def test_token_ids_are_reported_before_anything_is_written(served: Any) -> None:
    def told(**asked: Any) -> httpx.Response:
        return httpx.post(f"{served.url}/tokenize", json={"model": "a", **asked}, timeout=60)

    tokenizer = served.service.text.tokenizer
    raw = told(prompt="This drug").json()
    assert raw == {"count": len(raw["tokens"]), "max_model_len": 128, "tokens": tokenizer.encode("This drug")}
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    talk = told(messages=MESSAGES, add_generation_prompt=True).json()
    assert talk["tokens"] == tokenizer.encode(rendered, add_special_tokens=False)
    assert told(prompt="This drug", model="nobody").status_code == 404
    assert told(prompt="This drug", add_special_tokens=False).status_code == 400
    assert told(messages=MESSAGES, add_generation_prompt=False).status_code == 400


def test_several_prompts_at_once(client: Any) -> None:
    def texts(prompt: Any, **options: Any) -> list[str]:
        answer = client.completions.create(model="b", prompt=prompt, temperature=0.7, seed=3, max_tokens=6, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    prompts = ["This drug", "The doctor gave"]
    alone = [texts(prompt, n=2) for prompt in prompts]
    assert texts(prompts, n=2) == [*alone[0], *alone[1]]
    assert texts([[30, 51, 77], [9]]) == [*texts([30, 51, 77]), *texts([9])]
    usage = client.completions.create(model="b", prompt=[[30, 51, 77], [9]], n=2, max_tokens=1).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 4)
    long = (["x"] * 500, "list of 500; at most 128")
    refused = (([], "neither texts"), ([[]], "neither texts"), (["x", 5], "expected a string"), long)
    for wrong, message in refused:
        with pytest.raises(openai.BadRequestError, match=message):
            texts(wrong)


def test_messages_with_more_than_text_are_refused(client: Any) -> None:
    echoed = chat(client, "a").choices[0].message
    for more in ({"images": ["aGk="]}, {"tool_calls": [{"id": "1"}]}, {"contents": "x"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(more))):
            client.chat.completions.create(model="a", messages=[{**MESSAGES[0], **more}], max_tokens=1)
    thought = {**echoed.model_dump(), "id": "1", "parsed": {"x": 1}, "reasoning": "so", "reasoning_content": "so"}
    again = [*MESSAGES, thought, {"role": "user", "content": "And?", "name": "me"}]
    assert client.chat.completions.create(model="a", messages=again, max_tokens=1).usage.prompt_tokens > 20


def test_a_bias_decides_what_is_written(client: Any) -> None:
    found = client.completions.create(model="b", prompt="the", temperature=0, max_tokens=3, logit_bias={"40": 100}, logprobs=0)
    assert len(set(found.choices[0].logprobs.tokens)) == 1


def test_tools_go_through_the_template_and_calls_come_back(served: Any, client: Any) -> None:
    served.service.text.tokenizer.chat_template = WRITES_TOOLS
    choice = chat(client, "a", tools=[TOOL], response_format=CALL_SCHEMA, max_tokens=60).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rome"}
    pieces = list(chat(client, "a", tools=[TOOL], response_format=CALL_SCHEMA, max_tokens=60, stream=True))
    calls = [call for piece in pieces for call in (piece.choices[0].delta.tool_calls or [])]
    assert [call.function.arguments for call in calls] == ['{"city": "Rome"}']
    assert pieces[-1].choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "31 degrees"}
    again = [*MESSAGES, choice.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(model="a", messages=again, tools=[TOOL], max_tokens=4)
    assert answer.usage.prompt_tokens > chat(client, "a", tools=[TOOL]).usage.prompt_tokens
    assert chat(client, "a", tools=[TOOL], tool_choice="none").usage.prompt_tokens == chat(client, "a").usage.prompt_tokens


def test_tools_are_refused_where_the_template_leaves_them_out(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"does not write tools \(weather\)"):
        chat(client, "a", tools=[TOOL])
