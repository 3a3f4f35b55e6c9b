"""Faults over HTTP: broken bodies, lost and many clients, full queues, keys, a failed disk, a clean shutdown; plain replies."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.errors import EnvironmentProblem
from lorakeet.serve.access import Access, Caller, hash_key
from lorakeet.serve.engine import Draining
from lorakeet.serve.routes import adapters, http
from lorakeet.serve.routes.http import run_server
from lorakeet.serve.service import RequestLimits
from tiny.damage import other_bytes, other_json
from tiny.fuzz import fuzzed

FILES = 1500  # that a process may have open where there are 500 connections
BODY = {"model": "a", "prompt": "This drug", "temperature": 0, "max_tokens": 5}


def post(served: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", timeout=60, **options)


def until(true: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def idle(served: Any) -> bool:
    versions = served.service.registry.versions
    return served.service.engine.load == (0, 0) and not any(version.users for version in versions)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "is not JSON"),
        (b"\xff\xfe", 400, "is not JSON"),
        (b"[" * 60_000, 400, "is not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"null", 400, "must be a JSON object"),
        (b"{}", 400, "prompt is missing"),
        (b'{"model": 5, "prompt": "x"}', 400, "model in the request is a number"),
        (b'{"model": "a", "prompt": ""}', 400, "at least one"),
        (b'{"model": "a", "prompt": [1, 99999]}', 400, "a token id outside"),
        (b'{"model": "a", "prompt": "x", "max_tokens": 1e3}', 400, "expected a whole number"),
        (b" " * 70_000, 413, "larger than the 65,536 bytes"),
    ],
)
def test_broken_bodies(content: bytes, status: int, message: str, site: Callable[..., Any]) -> None:
    answer = post(site(limits=RequestLimits(body=1 << 16)), content=content)
    assert answer.status_code == status and message in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_embeddings_are_refused_with_the_reason_and_what_serves_them(site: Callable[..., Any]) -> None:
    asked = {"model": "a", "input": "x"}
    answer = post(site(), "/v1/embeddings", json=asked)
    error = answer.json()["error"]
    assert answer.status_code == 501 and error["type"] == "not_supported_error"
    assert "trained to predict the next token" in error["message"] and "llama-server --embeddings" in error["message"]
    guarded = site(access=Access({hash_key("sk-one-secret"): Caller("one", frozenset({"a"}), False)}))
    assert post(guarded, "/v1/embeddings", json=asked).status_code == 401


def test_health_readiness_and_metrics(site: Callable[..., Any]) -> None:
    served = site()
    assert httpx.get(f"{served.url}/healthz").text == "ok" and httpx.get(f"{served.url}/readyz").text == "ready"
    for _ in range(2):
        assert post(served, json=BODY).status_code == 200
    until(lambda: idle(served))
    page = httpx.get(f"{served.url}/metrics").text
    assert 'lorakeet_requests_total{adapter="a",outcome="done"} 2' in page
    assert 'lorakeet_adapter_loads_total{adapter="a"} 1' in page and "lorakeet_adapters_resident 1" in page
    assert 'lorakeet_time_to_first_token_seconds_count{adapter="a"} 2' in page
    served.service.engine.drain(timeout=10)
    assert httpx.get(f"{served.url}/readyz").status_code == 503
    assert 'lorakeet_adapter_load_seconds_count{adapter="b"}' not in page
    answer = post(served, json=BODY)
    assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]


def test_a_full_queue_answers_429(site: Callable[..., Any]) -> None:
    served = site(slots=1, waiting=1)
    post(served, json=BODY)
    gate = threading.Event()
    held = served.service.engine.call(gate.wait)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, served, json=BODY)
        until(lambda: served.service.engine.load == (0, 1))
        answer = post(served, json=BODY)
        gate.set()
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert held.result() and waiting.result().status_code == 200
    until(lambda: idle(served))


def test_clients_that_leave_free_their_slots(site: Callable[..., Any]) -> None:
    served = site(slots=2)
    long = {**BODY, "max_tokens": 110, "temperature": 1.0, "seed": 1}
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**long, "stream": True}, timeout=60) as stream:
        next(stream.iter_lines())
    gate = threading.Event()
    served.service.engine.call(gate.wait)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=long, timeout=0.5)
    gate.set()
    until(lambda: idle(served))
    assert post(served, json=BODY).status_code == 200


def test_a_request_that_takes_too_long_is_cut(site: Callable[..., Any]) -> None:
    served = site(limits=RequestLimits(timeout=0.0))
    answer = post(served, json=BODY).json()["choices"][0]
    assert answer == {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}


def test_slow_readers_hold_no_one_up(site: Callable[..., Any]) -> None:
    served = site(slots=2)
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({**BODY, "stream": True, "max_tokens": 100})
    slow = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    slow.sendall((head + body).encode())
    assert post(served, json=BODY).status_code == 200
    until(lambda: idle(served))
    slow.close()


@pytest.mark.slow
def test_many_connections(site: Callable[..., Any]) -> None:
    """500 of them, both ends of which are open files of this process."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        if hard != resource.RLIM_INFINITY and hard < FILES:
            pytest.skip(f"the system lets a process open {hard} files; this takes {FILES}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    served = site()
    expected = {name: post(served, json={**BODY, "model": name}).json()["choices"][0]["text"] for name in ("a", "b", "tiny")}
    sockets = [socket.create_connection(tuple(served.url.removeprefix("http://").split(":"))) for _ in range(500)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = [(name, pool.submit(post, served, json={**BODY, "model": name})) for name in ("a", "b", "tiny") * 16]
        for name, answer in asked:
            assert answer.result().json()["choices"][0]["text"] == expected[name]
    for opened in sockets:
        opened.close()
    until(lambda: idle(served))


def test_two_keys_each_seeing_only_its_own(site: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    keys = {"sk-one-secret": Caller("one", frozenset({"a"}), False), "sk-two-secret": Caller("two", frozenset({"b"}), False, 2)}
    served = site(access=Access({hash_key(key): caller for key, caller in keys.items()}))
    one, two = ({"authorization": f"Bearer {key}"} for key in keys)
    caplog.set_level(logging.INFO, logger="lorakeet.serve")
    assert post(served, json=BODY).status_code == 401
    assert post(served, json=BODY, headers=one).status_code == 200
    for model in ("b", "a*0.5+b*0.5", "nothing"):
        assert post(served, json={**BODY, "model": model}, headers=one).status_code == 404
    hidden, absent = (post(served, json={**BODY, "model": m}, headers=one).json()["error"]["message"] for m in ("b", "c"))
    assert hidden.replace("'b'", "'c'") == absent, "what a key may not see does not exist for it"
    listed = httpx.get(f"{served.url}/v1/models", headers=two).json()["data"]
    assert [(model["id"], model["dtype"]) for model in listed] == [("tiny", "float32"), ("b", "float32")]
    assert [t["name"] for t in httpx.get(f"{served.url}/api/tags", headers=one).json()["models"]] == ["tiny", "a"]
    assert [entry["task_name"] for entry in httpx.get(f"{served.url}/lora-adapters", headers=two).json()] == ["b"]
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters/a/pin"):
        assert post(served, path, json={"lora_name": "a"}, headers=one).status_code == 403
    assert httpx.get(f"{served.url}/metrics", headers=one).status_code == 403
    mine = {**BODY, "model": "b"}
    assert [post(served, json=mine, headers=two).status_code for _ in range(3)] == [200, 200, 429]
    until(lambda: idle(served))
    assert "model=a outcome=done" in caplog.text and "secret" not in caplog.text


def test_a_disk_that_is_full(site: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = site(store=tmp_path / "s")

    async def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters.asyncio, "to_thread", full)
    answer = httpx.put(f"{served.url}/v1/adapters/x/adapter_model.safetensors", content=b"xyz")
    monkeypatch.undo()
    assert answer.status_code == 507 and "No space left" in answer.json()["error"]["message"]
    assert not list((tmp_path / "s").rglob("*.safetensors"))
    assert post(served, json=BODY).status_code == 200


def test_stopping_lets_streams_end(site: Callable[..., Any]) -> None:
    served = site()
    whole = post(served, json={**BODY, "max_tokens": 60}).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**BODY, "max_tokens": 60, "stream": True}) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        pieces = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
    stopping.join()
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole
    with pytest.raises(Draining):
        served.service.engine.call(print)


def test_stopping_with_an_old_version_in_use_frees_it(site: Callable[..., Any], saved: Callable[..., Path]) -> None:
    served = site()
    registry = served.service.registry
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**BODY, "max_tokens": 60, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        registry.load("a", saved("a-new", seed=9), replace=True)
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    stopping.join()
    assert len(registry.live.names) == 1 and not served.service.engine.ready


def test_a_port_that_is_taken(site: Callable[..., Any]) -> None:
    served = site()
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(EnvironmentProblem, match="cannot listen on 127"):
        run_server(served.service, host="127.0.0.1", port=port, ready=print)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**BODY, "prompt": "\ud800"}),
        ("/v1/completions", {**BODY, "model": "\ud800"}),
        ("/api/chat", {"model": "a", "messages": [{"role": "user", "content": "\udfff"}]}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "~nobody-of-that-name/x"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": ""}),
        ("/v1/completions", {**BODY, "temperature": 10**400}),
        ("/v1/completions", {**BODY, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
    ],
)
def test_bad_values_are_the_callers(path: str, body: Any, both: Any) -> None:
    answer = post(both, path, content=json.dumps(body))
    assert answer.status_code == 400 and answer.json()["error"]


@pytest.fixture
def both(site: Callable[..., Any]) -> Any:
    return site()


def test_pages_of_others_and_borrowed_names_are_refused_where_no_key_is_needed(both: Any) -> None:
    """A browser sends what a page posts as text, wherever the page is from; and a name may point anywhere."""
    drop, port = json.dumps({"lora_name": "a"}), both.url.rpartition(":")[2]
    for origin in ("http://evil.example", "null", f"http://localhost:{int(port) + 1}"):
        answer = post(both, "/v1/unload_lora_adapter", content=drop, headers={"Origin": origin, "Content-Type": "text/plain"})
        assert answer.status_code == 403 and origin in answer.json()["error"]["message"]
    for host in ("evil.example", "evil.example:80", "[", "localhost.evil.example"):
        assert httpx.get(f"{both.url}/v1/models", headers={"Host": host}).status_code == 403
        for path in ("/health", "/healthz", "/readyz"):
            assert httpx.get(f"{both.url}{path}", headers={"Host": host}).status_code == 403
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "box", "box.local"):
        assert httpx.get(f"{both.url}/v1/models", headers={"Host": host}).status_code == 200
    own = {"Origin": both.url, "Content-Type": "text/plain"}
    assert post(both, "/v1/unload_lora_adapter", content=drop, headers=own).status_code == 200


def test_nothing_of_a_client_becomes_a_line_of_the_answers_head(both: Any) -> None:
    line = "%0d%0aX-Injected:%20yes"
    for path in (f"/{line}", f"/v1/models/{line}", f"/v1/models?x={line}", f"/v1/adapters/{line}"):
        assert "x-injected" not in httpx.get(f"{both.url}{path}").headers
    answer = post(both, json={**BODY, "model": "a\r\nX-Injected: yes", "user": "b\r\nX-Injected: yes"})
    assert answer.status_code == 404 and "x-injected" not in answer.headers
    with socket.create_connection(("127.0.0.1", int(both.url.rpartition(":")[2])), timeout=30) as sent:
        sent.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\rX-Injected: yes\r\nConnection: close\r\n\r\n")
        answered = b"".join(iter(lambda: sent.recv(65536), b""))
    assert answered.startswith(b"HTTP/1.1 400") and b"x-injected" not in answered.lower()


def test_a_bug_is_said_as_an_error_of_the_api(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both.service, "adapters_named", {}.__getitem__)
    answer = post(both, json=BODY)
    assert answer.status_code == 500 and "Please report this" in answer.json()["error"]["message"]


def test_half_a_body_holds_no_one_up(site: Callable[..., Any]) -> None:
    served = site(limits=RequestLimits(pause=0.2))
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=30) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        served.stop()  # which would never return
        assert half.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_key_that_may_load_keeps_to_its_own_adapters(
    site: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    access = Access({hash_key("sk-one-secret"): Caller("one", frozenset({"a"})), hash_key("sk-all-secret"): Caller("all")})
    served = site(access=access, store=tmp_path / "s")
    one, everyone = ({"authorization": f"Bearer sk-{who}-secret"} for who in ("one", "all"))
    assert post(served, "/lora-adapters", json=[{"id": 1, "scale": 2.0}], headers=everyone).status_code == 200
    other = {"lora_name": "b", "lora_path": str(saved("c", seed=4)), "load_inplace": True}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters/b"):
        refused = post(served, path, json=other, headers=one)
        assert refused.status_code == 403
        absent = post(served, path.replace("s/b", "s/nobody"), json={**other, "lora_name": "nobody"}, headers=one)
        assert absent.text == refused.text.replace("'b'", "'nobody'"), "no word of what there is"
    assert httpx.delete(f"{served.url}/v1/adapters/b", headers=one).status_code == 403
    assert httpx.put(f"{served.url}/v1/adapters/b/adapter_config.json", content=b"{}", headers=one).status_code == 403
    assert post(served, "/lora-adapters", json=[], headers=one).status_code == 200
    assert served.service.scales == {"b": 2.0}
    assert post(served, json={**BODY, "model": "b"}, headers=everyone).status_code == 200
    until(lambda: idle(served))
    pages = {who["authorization"]: httpx.get(f"{served.url}/metrics", headers=who).text for who in (one, everyone)}
    assert ['adapter="b"' in page for page in pages.values()] == [False, True]
    assert post(served, "/v1/unload_lora_adapter", json={"lora_name": "a"}, headers=one).status_code == 200
    again = post(served, "/v1/unload_lora_adapter", json={"lora_name": "a"}, headers=one)
    assert again.status_code == 404 and "'b'" not in again.text


def test_tokenising_and_every_text_count_in_a_quota(site: Callable[..., Any]) -> None:
    served = site(access=Access({hash_key("sk-one-secret"): Caller("one", per_minute=5)}))
    key = {"authorization": "Bearer sk-one-secret"}
    assert post(served, json={**BODY, "n": 3, "temperature": 1.0}, headers=key).status_code == 200
    assert post(served, "/tokenize", json={"model": "a", "prompt": "x"}, headers=key).status_code == 200
    refused = post(served, json={**BODY, "n": 2}, headers=key)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert post(served, "/tokenize", json={"model": "a", "prompt": "x"}, headers=key).status_code == 200
    assert post(served, "/tokenize", json={"model": "a", "prompt": "x"}, headers=key).status_code == 429
    most = post(served, json={**BODY, "n": 6}, headers=key)
    assert most.status_code == 400 and "6 texts are requested at once" in most.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/unload_lora_adapter", "/v1/chat/completions"])
def test_hundreds_of_thousands_of_fields_are_refused_before_they_are_parsed(
    path: str, both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    loads = json.loads
    raw = json.dumps({**BODY, **{f"f{number}": None for number in range(400_000)}})
    monkeypatch.setattr(http.json, "loads", lambda text: (parsed.append(len(text)), loads(text))[1])
    answer = post(both, path, content=raw)
    monkeypatch.undo()
    assert answer.status_code == 400 and "more than 50,000 fields" in answer.json()["error"]["message"] and parsed == []
    monkeypatch.setattr(http.json, "loads", lambda text: (parsed.append(len(text)), loads(text))[1])
    for one in ("[]", "{}"):
        answer = post(both, path, content="[" + ",".join([one] * 400_000) + "]")
        assert answer.status_code == 400 and "more than 200,000 brackets" in answer.text and parsed == []
    monkeypatch.undo()
    quoted = {**BODY, "prompt": '{"a": [1]} ' * 10, "max_tokens": 1}
    assert post(both, json=quoted).status_code == 200


def test_a_body_that_trickles_ends(site: Callable[..., Any]) -> None:
    served = site(limits=RequestLimits(pause=0.3, stop=60.0))
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=30) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        slow.settimeout(0.05)
        answer = b""
        for _ in range(1000):  # a byte in each pause
            try:
                answer += slow.recv(1000)
            except TimeoutError:
                slow.sendall(b" ")
            if b"bytes a second" in answer:
                break
        assert answer.startswith(b"HTTP/1.1 408 ") and b"bytes a second" in answer


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
def strange(site: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
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


@fuzzed(quick=120, many=10_000)
@given(request=requests())
def test_no_request_is_a_failure_of_the_server(strange: httpx.Client, request: tuple[str, str, dict[str, str], bytes]) -> None:
    method, path, headers, body = request
    if len(body) < 100_000 and b'"max_tokens"' not in body and "ompletions" in path:
        body = body.replace(b"{", b'{"max_tokens": 2, ', 1)  # or it would write to the end of its context
    answer = strange.request(method, path, content=body, headers=headers)
    assert answer.status_code < 500 or answer.status_code in (501, 503, 507), (answer.status_code, answer.text[:500])
    assert len(answer.text) < 100_000 and "Traceback" not in answer.text
    assert strange.get("/v1/models").status_code == 200


class PanicException(BaseException):
    """As pyo3 names what a panic becomes: no Exception."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), RecursionError("deep"), ValueError("odd")])
def test_a_tokenizer_that_fails_is_one_message_and_the_server_goes_on(
    site: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    served = site()
    tokenizer = served.service.text.tokenizer
    asked = {"model": "tiny", "prompt": "This drug", "max_tokens": 4, "temperature": 0}
    talk = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", "x")
        for method in ("encode", "apply_chat_template", "decode"):
            with patch.context() as broken:
                broken.setattr(tokenizer, method, fail)
                path, body = ("/v1/chat/completions", talk) if method == "apply_chat_template" else ("/v1/completions", asked)
                answer = httpx.post(served.url + path, json=body, timeout=30)
                assert answer.status_code == (500 if method == "decode" else 400), answer.text
                assert type(error).__name__ in answer.json()["error"]["message"]
    assert httpx.post(f"{served.url}/v1/completions", json=asked, timeout=30).status_code == 200


def test_no_key_is_logged_wherever_a_client_puts_it(site: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    served = site(access=Access({hash_key("sk-known-1234"): Caller("a")}))
    for key in ("sk-known-1234", "sk-other-5678"):
        sent = {"headers": {"authorization": f"Bearer {key}"}}
        for path in (f"/v1/models/{key}", f"/v1/adapters/{key}/x?upload={key}", f"/v1/{key}?key={key}"):
            httpx.get(served.url + path, **sent), httpx.put(served.url + path, **sent), httpx.delete(served.url + path, **sent)
        httpx.post(f"{served.url}/v1/completions", json={"model": key, "prompt": "x"}, **sent)
    httpx.get(f"{served.url}/v1/models/sk-known-1234", headers={"authorization": "Bearer sk-other-5678"})
    assert "refused path=" in caplog.text and "***" in caplog.text
    assert "sk-known-1234" not in caplog.text and "sk-other-5678" not in caplog.text


def test_a_request_without_memory_is_one_message(site: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    served = site()
    asked = {"model": "tiny", "prompt": "This drug", "max_tokens": 4}

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(served.service, "write", fail)
        answer = httpx.post(f"{served.url}/v1/completions", json=asked, timeout=30)
        assert answer.status_code == 503 and "more memory" in answer.json()["error"]["message"]
    assert httpx.post(f"{served.url}/v1/completions", json=asked, timeout=30).status_code == 200
