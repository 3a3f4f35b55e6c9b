"""A judge behind OpenAI's API: what it is sent, its key, and reports that survive a judge that fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.judge import ReplyPair
from lorakeet.evaluate.report.compose_judge import JUDGE_WINS
from lorakeet.evaluate.report.report import Report, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.runs import judge_server
from lorakeet.runs.judge_server import KEY, JudgeServer, compared_by_judge
from tiny.runs import quiet

REPORT = Report("t", task="language", systems=(SystemResult("adapter", "adapter", {}), SystemResult("base", "base", {})))
SYSTEMS = ("adapter", "base")
PAIRS = [ReplyPair(f"prompt {number}", "4", "four", "five") for number in range(12)]
SENT: list[tuple[dict[str, Any], str | None]] = []


class Honest(BaseHTTPRequestHandler):
    """Prefers "four" wherever it stands; `model` broken answers without a message."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert set(body) == {"model", "messages", "temperature", "max_tokens"}
        SENT.append((body, self.headers.get("Authorization")))
        text = body["messages"][0]["content"]
        vote = "[[A]]" if "answer A\nfour" in text else "[[B]]"
        known, cut = body["model"] in ("qwen3", "long", "busy"), body["model"] == "long"
        choice = {"message": {"content": f"Right. {vote}"}, "finish_reason": "length" if cut else "stop"}
        data = json.dumps({"choices": [choice] if known else []}).encode()
        if body["model"] == "moved":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
        else:
            self.send_response(429 if body["model"] == "busy" and len(SENT) == 1 else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture()
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Honest)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    SENT.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_its_votes_become_a_comparison(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    found = compared_by_judge(REPORT, PAIRS, SYSTEMS, EvaluateSpec(judge=f"{url}/v1#qwen3", resamples=500), quiet())
    assert found.systems[0].metrics[JUDGE_WINS].value == 1.0 and found.comparisons[0].verdict == "better"
    assert len(SENT) == 2 * len(PAIRS) and {key for _, key in SENT} == {"Bearer secret"}


def test_no_judge_is_no_question(url: str) -> None:
    assert compared_by_judge(REPORT, PAIRS, SYSTEMS, EvaluateSpec(), quiet()) is REPORT and not SENT


@pytest.mark.parametrize("address", ["{url}#broken", "http://127.0.0.1:9#qwen3"])
def test_a_judge_that_fails_costs_its_result_alone(address: str, url: str) -> None:
    given = address.format(url=url)
    found = compared_by_judge(REPORT, PAIRS, SYSTEMS, EvaluateSpec(judge=given), quiet())
    assert not found.comparisons and "It gave no further answer: " in found.warnings[0] and len(SENT) < 2
    with pytest.raises(EnvironmentProblem):
        JudgeServer.at(given).reply("?")


def test_an_answer_that_was_cut_is_no_vote(url: str) -> None:
    assert JudgeServer.at(f"{url}#long").reply("?") == ""


def test_a_busy_server_is_called_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(judge_server.time, "sleep", waited.append)
    assert "[[B]]" in JudgeServer.at(f"{url}#busy").reply("?") and waited == [1.0]


def test_a_key_is_sent_to_no_other_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    with pytest.raises(EnvironmentProblem, match="302"):
        JudgeServer.at(f"{url}#moved").reply("?")
    assert len(SENT) == 1


@pytest.mark.parametrize(
    "address", ["http://me:secret@localhost:8000#m", "localhost:8000", "http://localhost:8000", "http://a b#c", "ftp://x#y"]
)
def test_an_address_without_a_model_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected the address and the model"):
        EvaluateSpec(judge=address).validate()
