"""`studio.trial`: a server as a job beside others, and what it answers."""

from __future__ import annotations

import json
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.serve.model_names import check_name, parse_model
from lorakeet.studio import trial as module
from lorakeet.studio.jobs import BESIDE, Job, Queue
from lorakeet.studio.pages import Studio
from lorakeet.studio.trial import (
    TriedModel,
    adapter_name,
    add_run,
    close_trial,
    current_trial,
    examples_of,
    in_trained_prompts,
    mixed,
    open_trial,
    port_of,
    reply_lines,
    served_base,
    shown_template,
    single_rows,
    trial_state,
)  # fmt: skip
from tiny.hostile_server import answering


def made(studio: Studio, name: str, config: str = "model: {path: m, quantize: nf4}\ndata: r\n") -> Path:
    folder = studio.places.runs / name
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    return folder


def test_a_trial_is_the_command_serve_beside_other_jobs(studio: Studio) -> None:
    folder = made(studio, "mine")
    trial = open_trial(studio.places, studio.queue, "mine")
    words = dict(zip(trial.job.words[1::2], trial.job.words[2::2], strict=True))
    assert trial.job.words[0] == "serve" and trial.job.device == BESIDE and words["--quantize"] == "nf4"
    assert words["--adapter"] == f"{adapter_name('mine')}={folder}" and words["--lora-paths"] == str(studio.places.runs)
    assert trial.key in Path(words["--keys"]).read_text() and trial.key not in " ".join(trial.job.words)
    assert stat.S_IMODE(studio.places.own.stat().st_mode) == 0o700
    assert current_trial(studio.queue) == trial and trial_state(trial) == ("starting", "")
    close_trial(studio.queue)
    assert trial.job.state == "cancelled" and trial_state(current_trial(studio.queue)) == ("off", "")
    again = open_trial(studio.places, studio.queue, "mine")
    for name in ("alive", "pid"):
        (again.job.folder / name).touch()
    (again.job.folder / "code").write_text("0")  # it has ended, or is about to
    close_trial(studio.queue)
    assert current_trial(studio.queue) is None


def test_a_trial_goes_on_uncertified_where_that_is_requested(studio: Studio) -> None:
    made(studio, "mine")
    assert "--uncertified" not in open_trial(studio.places, studio.queue, "mine").job.words
    assert open_trial(studio.places, studio.queue, "mine", uncertified=True).job.words[-1] == "--uncertified"


def test_a_second_click_loads_no_second_model(studio: Studio) -> None:
    made(studio, "mine")
    first = open_trial(studio.places, studio.queue, "mine", once="a")
    assert open_trial(studio.places, studio.queue, "mine", once="a").job == first.job and first.job.state == "waiting"
    later = open_trial(studio.places, studio.queue, "mine", once="b")
    assert (first.job.state, later.job.state) == ("cancelled", "waiting")


def test_servers_of_two_studios_are_both_ended(studio: Studio) -> None:
    """Each has closed the one before and started its own at the same moment."""
    made(studio, "mine")
    first = open_trial(studio.places, studio.queue, "mine")
    about = '{"run": "mine", "key": "k"}'
    second = studio.queue.add(first.job.words, title="Try mine", device=BESIDE, files={"trial.json": about})
    close_trial(studio.queue)
    assert (first.job.state, second.state) == ("cancelled", "cancelled") and current_trial(studio.queue) is None


def test_what_cannot_be_tried_is_refused(studio: Studio) -> None:
    made(studio, "pictures", "model: m\ndata: r\nkind: image\n")
    (studio.places.runs / "young").mkdir()
    with pytest.raises(ConfigError, match=r"is of kind image, which has a page of its own"):
        open_trial(studio.places, studio.queue, "pictures")
    with pytest.raises(ConfigError, match="no adapter yet"):
        open_trial(studio.places, studio.queue, "young")
    assert trial_state(None) == ("off", "") and examples_of(studio.places.runs / "young") == []


def test_names_and_weights_are_what_the_server_reads() -> None:
    names = ["a run", "ä/ö", "x" * 200, "half \ud800"]
    for name in names:
        check_name(adapter_name(name))
    known = [adapter_name(name) for name in names]
    found = parse_model(mixed("base", {names[0]: 0.7, names[1]: -0.25, names[2]: 0.0}), base=("base",), known=known)
    assert found == {known[0]: 0.7, known[1]: -0.25}
    assert mixed("base", {names[0]: 0.0}) == "base" == mixed("base", {})


class Server(BaseHTTPRequestHandler):
    """Answers as `lorakeet serve` does."""

    got: ClassVar[list[tuple[str, str | None, Any]]] = []
    refuses: ClassVar[bool] = False

    def do_GET(self) -> None:
        models = {"data": [{"id": "tiny", "parent": None}, {"id": "run-1", "parent": "tiny"}]}
        self.answer(200, json.dumps(models).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Server.got.append((self.path, self.headers["authorization"], body))
        if Server.refuses:
            self.answer(400, json.dumps({"error": {"message": "No <b>such</b> model."}}).encode())
        else:
            self.answer(200, b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[TriedModel]:
    Server.got, Server.refuses = [], False
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield TriedModel(Job(tmp_path, ("serve",), "x"), "mine", server.server_address[1], "secret")
        server.shutdown()


def test_a_reply_comes_line_by_line_with_probabilities(trial: TriedModel) -> None:
    lines = list(reply_lines(trial, {"model": "tiny", "messages": [], "max_tokens": 10**9}))
    assert lines == [b'data: {"choices": []}\n', b"\n", b"data: [DONE]\n", b"\n"]
    [(path, key, body)] = Server.got
    assert (path, key) == ("/v1/chat/completions", "Bearer secret") and body["top_logprobs"] == 3 and body["max_tokens"] == 2048
    assert served_base(trial) == "tiny" and trial_state(trial) == ("ready", "")


def test_what_the_server_refuses_is_said_in_its_words(trial: TriedModel, studio: Studio) -> None:
    folder = made(studio, "other")
    add_run(studio.places, trial, "other")
    assert Server.got[-1][2] == {"lora_name": adapter_name("other"), "lora_path": str(folder), "load_inplace": True}
    Server.refuses = True
    for refused in (lambda: list(reply_lines(trial, {})), lambda: add_run(studio.places, trial, "other")):
        with pytest.raises(EnvironmentProblem, match="No <b>such</b> model"):
            refused()
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        list(reply_lines(TriedModel(trial.job, "mine", 1, "x"), {}))


@pytest.mark.parametrize("sent", [b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, b"HTTP/1.1 200 OK\r\n\r\n[]"])
def test_what_is_no_answer_of_a_server_is_one_message(tmp_path: Path, studio: Studio, sent: bytes) -> None:
    made(studio, "other")
    with answering([sent], raw=True) as url:
        trial = TriedModel(Job(tmp_path, ("serve",), "x"), "mine", int(url.rpartition(":")[2]), "secret")
        with pytest.raises(EnvironmentProblem, match="The model does not answer"):
            served_base(trial)
        if sent.startswith(b"no"):
            for call in (lambda: list(reply_lines(trial, {})), lambda: add_run(studio.places, trial, "other")):
                with pytest.raises(EnvironmentProblem, match="The model does not answer"):
                    call()


def test_a_server_s_own_file_that_is_damaged_is_no_server(studio: Studio) -> None:
    made(studio, "mine")
    trial = open_trial(studio.places, studio.queue, "mine")
    for text in ("[" * 100_000, "[]", '{"run": 1, "key": "k"}', '{"run": "mine", "key": "a\\nb"}'):
        (trial.job.folder / "trial.json").write_text(text)
        assert current_trial(studio.queue) is None


def test_the_port_is_the_one_that_the_server_has_bound(studio: Studio) -> None:
    made(studio, "mine")
    trial = open_trial(studio.places, studio.queue, "mine")
    words = trial.job.words
    assert words[words.index("--port") + 1] == "0" and trial.port == port_of(trial.job) == 0
    (trial.job.folder / "log").write_text("Serving tiny with 1 adapter at http://127.0.0.1:9/v1\n")
    (trial.job.folder / "result").write_text('{"address": "http://127.0.0.1:4711/v1", "port": 4711}\n')
    found = current_trial(studio.queue)
    assert found is not None and found.port == 4711


def test_what_it_was_measured_on_is_tried_with_what_was_expected(studio: Studio) -> None:
    folder = made(studio, "mine")
    assert not single_rows(folder)
    (folder / "report.json").write_text(json.dumps({"rows": [{"text": "a", "truth": "b"}], "task": "classification"}))
    assert examples_of(folder) == [{"text": "a", "truth": "b"}] and single_rows(folder)
    (folder / "report.json").write_text(json.dumps({"rows": [{"text": "a", "truth": "b"}], "task": "language"}))
    assert not single_rows(folder)


def test_two_tabs_that_load_a_model_leave_one(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    made(studio, "mine")

    def slow(queue: Queue) -> None:
        close_trial(queue)
        time.sleep(0.1)

    monkeypatch.setattr(module, "close_trial", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: open_trial(studio.places, studio.queue, "mine"), range(2)))
    assert [state for _, state in studio.queue.going()] == ["waiting"]


def test_each_message_has_the_prompt_of_the_training(studio: Studio) -> None:
    """Of the user; whatever a run with answers was trained on is typed as it is."""
    settings = {"train": "r", "template": "Review: {text}\nOne of: a, b", "labels": ["a", "b"]}
    folder = made(studio, "mine", json.dumps({"model": "m", "data": settings}))
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "fine"}, {"role": "assistant", "content": "a"}]
    assert in_trained_prompts(folder, said) == [said[0], {"role": "user", "content": "Review: fine\nOne of: a, b"}, said[2]]
    assert shown_template(folder) == settings["template"]
    free = made(studio, "free", json.dumps({"model": "m", "data": {**settings, "labels": []}}))
    assert in_trained_prompts(free, said) == said and shown_template(free) == ""
    raw = made(studio, "raw", json.dumps({"model": "m", "data": {**settings, "template": "{text}", "chat_template": "off"}}))
    assert shown_template(raw) == ""
    with pytest.raises(ConfigError, match="trained without the chat template"):
        in_trained_prompts(raw, said)
