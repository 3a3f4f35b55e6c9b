"""Whatever a request holds, its answer is no failure of the server, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny.damage import other_bytes, other_json
from tiny.fuzz import fuzzed

TALK = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
COMPLETION = {
    "model": "a", "prompt": "This drug", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 3, "stop": ["x"],
    "logprobs": 2, "logit_bias": {"5": 1}, "stream": False, "lora": [{"id": 0, "scale": 0.5}],
}  # fmt: skip
CHAT = {"model": "b", "messages": TALK, "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto", "stream": True,
        "response_format": {"type": "json_object"}, "top_logprobs": 2, "logprobs": True}  # fmt: skip
REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/completions", COMPLETION), ("POST", "/v1/chat/completions", CHAT), ("POST", "/tokenize", {"prompt": "x"}),
    ("POST", "/tokenize", {"model": "a", "messages": TALK}), ("POST", "/v1/embeddings", {"model": "a", "input": "x"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "c", "lora_path": "/nowhere", "load_inplace": True}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "none"}), ("POST", "/lora-adapters", [{"id": 0, "scale": 0.2}]),
    ("POST", "/v1/adapters/x", {"replace": True}), ("POST", "/v1/adapters/a/pin", {"pinned": False}),
    ("PUT", "/v1/adapters/x/adapter_config.json", {"peft_type": "LORA", "r": 2}),
    ("POST", "/api/chat", {"model": "a", "messages": TALK, "options": {"num_predict": 2, "temperature": 0}, "stream": False}),
    ("POST", "/api/generate", {"model": "a", "prompt": "x", "options": {"num_predict": 2, "stop": ["y"]}, "format": "json"}),
    ("POST", "/api/show", {"model": "a"}), ("GET", "/v1/models/a", {}), ("DELETE", "/v1/adapters/none", {}),
]  # fmt: skip
HEADERS: list[dict[str, str]] = [{}, {}, {}, {"Content-Type": "text/plain"}, {"Authorization": "Bearer \x01"}, {"Accept": "x/y"}]




@pytest.fixture
def client(site: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    served = site(store=tmp_path_factory.mktemp("store"))
    with httpx.Client(base_url=served.url, timeout=60) as opened:
        yield opened


@st.composite
def requests(draw: Any) -> tuple[str, str, dict[str, str], bytes]:
    method, path, body = draw(st.sampled_from(REQUESTS))
    raw = json.dumps(body).encode()
    sent = draw(other_json(body)) if draw(st.integers(0, 4)) else draw(other_bytes(raw))
    if draw(st.integers(0, 9)) == 0:
        path += draw(st.sampled_from(["/", "/%00", "?upload=%ff", "?x=" + "y" * 3000, "/../../etc", "%2e%2e", "/é", "\\x"]))
    return method, path, draw(st.sampled_from(HEADERS)), sent


@fuzzed(quick=400, many=10_000)
@given(request=requests())
def test_no_request_is_a_failure_of_the_server(client: httpx.Client, request: tuple[str, str, dict[str, str], bytes]) -> None:
    method, path, headers, body = request
    if len(body) < 100_000 and b'"max_tokens"' not in body and "ompletions" in path:
        body = body.replace(b"{", b'{"max_tokens": 2, ', 1)  # or it would write to the end of its context
    answer = client.request(method, path, content=body, headers=headers)
    assert answer.status_code < 500 or answer.status_code in (501, 503, 507), (answer.status_code, answer.text[:500])
    assert len(answer.text) < 100_000 and "Traceback" not in answer.text
    assert client.get("/v1/models").status_code == 200
