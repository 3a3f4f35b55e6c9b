"""The model that is tried: `lorakeet serve` as a job of its own, with a key that only the studio knows, and talk with it."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Literal

from lorakeet.config import read_run
from lorakeet.disk import write_whole
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, one_message
from lorakeet.formats.files.json_object import read_object
from lorakeet.runs.server_answer import LONGEST_LINE
from lorakeet.runs.trained_prompt import prompt_settings, trained_prompt
from lorakeet.studio.jobs import BESIDE, Job, Queue
from lorakeet.studio.places import Places, regular_within
from lorakeet.studio.remedies import page_words
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.studio_options import LOOPBACK_ADDRESS

TrialState = Literal["off", "starting", "ready", "failed"]
_SECONDS = 600.0  # without a byte of an answer
_ABOUT, _KEYS, _CLOSED = "trial.json", "keys.json", "closed"
_MOST_TOKENS = 2048
_LARGEST_LIST = 1 << 22  # bytes of a list of models
_EXAMPLES = 40
_OPENING = threading.Lock()  # two tabs load one model after the other, so that the later one closes the other's


@dataclass(frozen=True)
class TriedModel:
    """A server and the run that it was started for; further runs of the same base are added by name."""

    job: Job
    run: str
    port: int  # 0 until it listens
    key: str


def open_trial(places: Places, queue: Queue, run: str, once: str = "", *, uncertified: bool = False) -> TriedModel:
    """Puts a server of the run's base and adapter into the queue. It runs beside other jobs. ConfigError without an adapter.

    The server before it is ended; where that was made with the same `once` (pages.once_of), it goes on.
    """
    folder = places.run(run)
    if not (folder / "adapter").is_dir():
        raise ConfigError(f"'{run}' has no adapter yet. Wait until it has trained, or resume it.")
    config = read_run(folder / "config.yaml")
    if not config.declaration.text_model:
        own = "has a page of its own. Choose it under Run, and load it" if config.declaration.try_page else "is not tried here"
        raise ConfigError(f"'{run}' is of kind {config.kind}, which {own}.")
    with _OPENING:
        before = current_trial(queue)
        if once and before is not None and before.job.once == once and before.job.state in ("waiting", "running"):
            return before
        close_trial(queue)
        key = secrets.token_urlsafe(24)
        method = config.model.quantize.method
        words = [
            "serve", "--model", config.model.path, "--adapter", f"{adapter_name(run)}={folder}", "--lora-paths", str(places.runs),
            "--port", "0", "--keys", f"{{folder}}/{_KEYS}", "--quantize", method if method in ("nf4", "int8") else "none",
            "--slots", "4", *(["--uncertified"] if uncertified else []),
        ]  # fmt: skip
        files = {
            _ABOUT: json.dumps({"run": run, "key": key}),
            _KEYS: json.dumps({"keys": [{"key": key, "owner": "studio", "admin": True}]}),
        }
        return TriedModel(queue.add(words, title=f"Try {run}", device=BESIDE, files=files, once=once), run, 0, key)


def close_trial(queue: Queue) -> None:
    """Ends the servers that run or wait: two, where two studios have started one each at the same moment."""
    found = current_trial(queue)
    going = [job for job, _ in queue.going() if _is_trial(job)]
    for job in dict.fromkeys([*([] if found is None else [found.job]), *going]):
        write_whole(job.folder / _CLOSED, b"")  # it ends within seconds, and is not talked to meanwhile
        if job.state in ("running", "waiting"):
            try:
                queue.stop(job)
            except ConfigError:
                if job.state in ("running", "waiting"):  # else another tab was first
                    raise


def current_trial(queue: Queue) -> TriedModel | None:
    """The newest server that was not closed on purpose; None if there is none."""
    for job in reversed(queue.jobs()):
        if _is_trial(job):
            if (job.folder / _CLOSED).exists():
                return None
            return _tried(job)
    return None


def _is_trial(job: Job) -> bool:
    return job.words[:1] == ("serve",) and (job.folder / _ABOUT).is_file()


def _tried(job: Job) -> TriedModel | None:
    """The server of a job, by the file beside it; None where that is no such file."""
    try:
        about = read_object(job.folder / _ABOUT, expected="a server's run and key")
    except DataError:
        return None
    run, key = (about.get(name) for name in ("run", "key"))
    if not isinstance(run, str) or not isinstance(key, str):
        return None
    return TriedModel(job, run, port_of(job), key) if key.isascii() and key.isprintable() else None


def port_of(job: Job) -> int:
    """The port that the server has bound, as it said first; 0 before. The key is sent to no other."""
    port = next(iter(job.results), {}).get("port")
    return port if type(port) is int and 0 < port < 1 << 16 else 0


def trial_state(trial: TriedModel | None) -> tuple[TrialState, str]:
    """Whether it can be talked to, and why not."""
    if trial is None:
        return "off", ""
    state = trial.job.state
    if state in ("waiting", "running"):
        if not trial.port:
            return "starting", ""
        try:
            with closing(_sent(trial, "GET", "/readyz", seconds=2.0)) as answer:
                return ("ready" if answer.status == 200 else "starting"), ""
        except (OSError, HTTPException):
            return "starting", ""
    return ("failed", page_words(trial.job.error)) if state in ("failed", "killed") else ("off", "")


def adapter_name(run: str) -> str:
    """The run's name on the server, which takes fewer characters than folders have."""
    return f"run-{hashlib.sha256(run.encode(errors='backslashreplace')).hexdigest()[:24]}"


def mixed(base: str, weights: Mapping[str, float]) -> str:
    """The server's name for runs mixed by these weights: "run-ca97…*0.7+run-3e23…*0.3"; the base where all are 0."""
    parts = [f"{adapter_name(run)}*{weight:g}" for run, weight in weights.items() if weight]
    return "+".join(parts) or base


def served_base(trial: TriedModel) -> str:
    """The server's name for its base."""
    with _answering(), closing(_sent(trial, "GET", "/v1/models")) as answer:
        listed = json.loads(answer.read(_LARGEST_LIST))["data"]
        return str(next(model["id"] for model in listed if model.get("parent") is None))


def add_run(places: Places, trial: TriedModel, run: str) -> None:
    """Loads the adapter of another run. EnvironmentProblem with the server's words if it refuses."""
    body = {"lora_name": adapter_name(run), "lora_path": str(places.run(run)), "load_inplace": True}
    with _answering(), closing(_sent(trial, "POST", "/v1/load_lora_adapter", body)) as answer:
        _require_good(answer)


def reply_lines(trial: TriedModel, body: Mapping[str, Any]) -> Iterator[bytes]:
    """The server-sent events of a chat completion, line by line. EnvironmentProblem where the server refuses or is gone."""
    limited = {**body, "max_tokens": min(int(body.get("max_tokens") or 256), _MOST_TOKENS), "stream": True}
    wanted = {**limited, "logprobs": True, "top_logprobs": 3}
    with _answering(), closing(_sent(trial, "POST", "/v1/chat/completions", wanted)) as answer:
        _require_good(answer)
        while line := answer.readline(LONGEST_LINE):
            yield line


def _answering() -> AbstractContextManager[None]:
    """A context in which whatever an answer is not becomes one EnvironmentProblem."""
    return one_message("The model does not answer", "Load it again.", EnvironmentProblem)


def _require_good(answer: HTTPResponse) -> None:
    if answer.status >= 400:
        text = answer.read(5000).decode("utf-8", "replace")
        try:
            found = json.loads(text)["error"]
            text = str(found["message"] if isinstance(found, dict) else found)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise EnvironmentProblem(text)


def _sent(
    trial: TriedModel, method: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = _SECONDS
) -> HTTPResponse:
    """The open answer of the server; closing it closes the connection."""
    connection = HTTPConnection(LOOPBACK_ADDRESS, trial.port, timeout=seconds)
    headers = {"authorization": f"Bearer {trial.key}", "content-type": "application/json", "connection": "close"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse()
    except BaseException:
        connection.close()
        raise


def _report_of(folder: Path) -> dict[str, Any]:
    """The report of a run as it is in its file; empty without one."""
    report = folder / "report.json"
    try:
        return read_object(report, expected="a report") if regular_within(folder, report) else {}
    except DataError:
        return {}


def examples_of(folder: Path) -> list[dict[str, str]]:
    """Rows that the run was measured on, with what was expected: to begin with. None where it has no report."""
    rows = _report_of(folder).get("rows")
    found = [row for row in rows[:_EXAMPLES] if isinstance(row, dict)] if isinstance(rows, list) else []
    return [{"text": str(row.get("text", ""))[:2000], "truth": str(row.get("truth", ""))[:500]} for row in found]


def single_rows(folder: Path) -> bool:
    """True where the run was trained on texts with labels: then a message stands for itself, as its rows did."""
    report = _report_of(folder)
    return bool(report.get("rows")) and report.get("task", "classification") == "classification"


def in_trained_prompts(folder: Path, messages: Sequence[Any]) -> list[Any]:
    """The messages with each text of the user in the prompt that the run in `folder` was trained on. ConfigError if it has none.

    ConfigError also where rows with labels were trained without the chat template, through which a server puts all messages.
    """
    data = prompt_settings(read_run(folder / "config.yaml").data, RunFolder(folder))
    if not data.labels:
        return list(messages)
    if data.chat_template == "off":
        raise ConfigError("This run was trained without the chat template, which is used here. Take its answers on “Take away”.")

    def prompted(message: Any) -> Any:
        if not isinstance(message, dict) or message.get("role") != "user":
            return message
        return {**message, "content": trained_prompt(str(message.get("content", "")), data, data.labels)}

    return [prompted(message) for message in messages]


def shown_template(folder: Path) -> str:
    """data.template of a run with labels, if it adds anything to the text; else an empty string."""
    data = prompt_settings(read_run(folder / "config.yaml").data, RunFolder(folder))
    plain = data.template.strip() in ("{text}", f"{{{data.text_column}}}")
    return "" if plain or not data.labels else data.template


def running_beside(queue: Queue) -> str:
    """What runs now and shares memory and cores with a model that is loaded; empty if nothing does."""
    titles = [job.title for job, state in queue.going() if state == "running" and job.words[:1] != ("serve",)]
    return ", ".join(titles)
