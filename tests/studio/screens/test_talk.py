"""`studio.screens.talk`: the page of the chat, and what a conversation may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lorakeet.errors import ConfigError
from lorakeet.studio.pages import Studio
from lorakeet.studio.screens import talk as module
from lorakeet.studio.screens.talk import conversation
from lorakeet.studio.trial import TriedModel, mixed
from lorakeet.verbs.options import PredictOptions
from tiny.command_results import failed


@pytest.fixture
def run(studio: Studio) -> Path:
    folder = studio.places.runs / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: m\ndata: {train: r, system: 'Be <b>brief</b>.'}\n")
    (folder / "report.json").write_text(json.dumps({"rows": [{"text": '<script>alert("row")</script>'}]}))
    return folder


def test_an_empty_studio_teaches(browser: TestClient) -> None:
    text = browser.get("/try").text
    assert "no trained adapter yet" in text and "Try the quickstart" in text


def test_a_model_is_loaded_and_closed(browser: TestClient, studio: Studio, run: Path) -> None:
    assert "No model is loaded" in browser.get("/try?run=mine").text
    assert browser.post("/try/open", data={"run": "mine"}).headers["location"] == "/try?run=mine"
    [job] = studio.queue.jobs()
    text = browser.get("/try").text
    assert job.words[0] == "serve" and "Loads the model" in text and browser.get("/try/state").json()["state"] == "starting"
    assert "<script>alert" not in text and "u003cscript" in text and "Be &lt;b&gt;brief&lt;/b&gt;." in text
    assert browser.post("/try/say", data={"messages": "[]"}).status_code == 400, "it is not ready yet"
    browser.post("/try/close")
    assert job.state == "cancelled" and browser.post("/try/open", data={"run": "gone"}).status_code == 404


def test_a_model_that_cannot_be_loaded_says_why(browser: TestClient, studio: Studio, run: Path) -> None:
    browser.post("/try/open", data={"run": "mine"})
    [job] = studio.queue.jobs()
    for name, text in (("alive", ""), ("pid", "1"), ("code", "2"), ("result", failed("'m' <i>does not exist</i>."))):
        (job.folder / name).write_text(text)
    assert "“m” &lt;i&gt;does not exist&lt;/i&gt;." in browser.get("/try").text


def test_both_sides_have_the_same_seed_and_messages() -> None:
    form = {"messages": '[{"role": "user", "content": "a"}]', "seed": "7", "temperature": "0.5", "max_tokens": "20"}
    base, adapter = conversation(form, "tiny"), conversation({**form, "weights": '{"mine": 0.5}'}, "tiny")
    assert base["model"] == "tiny" and adapter["model"] == mixed("tiny", {"mine": 0.5})
    assert {**base, "model": ""} == {**adapter, "model": ""} and (base["seed"], base["max_tokens"]) == (7, 20)


@pytest.mark.parametrize(
    "change",
    [{"messages": "{"}, {"messages": "{}"}, {"messages": ""}, {"weights": "[1]"}, {"weights": '{"a": "x"}'}, {"seed": "x"},
     {"weights": '{"a": NaN}'}, {"temperature": "inf"}, {"messages": json.dumps(["x" * 300_000])}],
)  # fmt: skip
def test_other_conversations_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        conversation({"messages": "[]", **change}, "tiny")


def test_a_reply_that_breaks_off_says_so(
    browser: TestClient, studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = studio.queue.add(["serve"], title="x")
    ready = TriedModel(job, "mine", 1, "k")
    monkeypatch.setattr(module, "current_trial", lambda queue: ready)
    monkeypatch.setattr(module, "trial_state", lambda trial: ("ready", ""))
    monkeypatch.setattr(module, "served_base", lambda trial: "tiny")

    def lines(trial: TriedModel, body: object) -> object:
        yield b'data: {"choices": []}\n'
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(module, "reply_lines", lines)
    said = browser.post("/try/say", data={"messages": "[]"})
    assert said.status_code == 200 and '"choices": []' in said.text and "reset by peer" in said.text


def test_what_is_sent_is_what_the_run_was_trained_on(
    browser: TestClient, studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """data.template around the message, and the answer limit of `lorakeet predict`; the page shows both."""
    data = {"train": "r", "template": "Is this spam?\n{text}", "labels": ["no", "yes"]}
    (run / "config.yaml").write_text(json.dumps({"model": "m", "data": data}))
    job = studio.queue.add(["serve"], title="x")
    monkeypatch.setattr(module, "current_trial", lambda queue: TriedModel(job, "mine", 1, "k"))
    monkeypatch.setattr(module, "trial_state", lambda trial: ("ready", ""))
    monkeypatch.setattr(module, "served_base", lambda trial: "tiny")
    sent: list[Any] = []
    monkeypatch.setattr(module, "reply_lines", lambda trial, body: (sent.append(body), iter([b"data: [DONE]\n"]))[1])
    for weights in ("{}", '{"mine": 1}'):
        messages = json.dumps([{"role": "user", "content": "buy now"}])
        assert browser.post("/try/say", data={"messages": messages, "weights": weights}).status_code == 200
    assert [body["messages"][0]["content"] for body in sent] == ["Is this spam?\nbuy now"] * 2
    assert {body["max_tokens"] for body in sent} == {PredictOptions.max_tokens}
    page = browser.get("/try").text
    assert "<code class=\"wrap\">Is this spam?\n{text}</code>" in page and f'value="{PredictOptions.max_tokens}"' in page
