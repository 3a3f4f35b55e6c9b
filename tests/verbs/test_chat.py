"""`lorakeet chat` over a pipe and in a terminal, on a run, an adapter, a model and a server."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import lorakeet as lk
from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, DataError
from lorakeet.replying import speakers
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs.chat import chat
from lorakeet.verbs.options import ChatOptions
from tiny.exports import certified_anew, write_model
from tiny.hostile_server import answering
from tiny.runs import chats, run, write_rows

QUICK = {"max_tokens": 8, "temperature": 0.0, "context": 200}


@pytest.fixture(scope="module")
def talks(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on conversations."""
    place = tmp_path_factory.mktemp("talks")
    run(tiny_llama_folder, write_rows(place / "chats.jsonl", chats(40)), place / "talks", {"train.steps": "8"})
    return place / "talks"


class Terminal(io.StringIO):
    """Standard input of a terminal."""

    def isatty(self) -> bool:
        return True


def answers(options: ChatOptions, lines: str, monkeypatch: pytest.MonkeyPatch, *, terminal: bool = False) -> tuple[str, object]:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(lines))
    found = chat(options, console=Console(file=shown, width=120))
    return shown.getvalue(), found


def test_each_line_of_a_pipe_is_a_prompt(talks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [lk.open_run(talks).generate(text, max_tokens=8) for text in ("alder birch", "cedar daisy")]
    shown, _ = answers(ChatOptions(target=str(talks), **QUICK), "alder birch\ncedar daisy\n", monkeypatch)
    assert shown == "".join(f"{text}\n" for text in expected)
    shown, _ = answers(ChatOptions(target=str(talks / "adapter"), **QUICK), "/both\nalder birch\n", monkeypatch)
    assert f"talks: {expected[0]}\n" in shown and "base: " in shown


def test_lines_go_into_the_template_of_labelled_rows(talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of_labels = tmp_path / "labelled"
    shutil.copytree(talks, run_of_labels)
    config, split = ((run_of_labels / name) for name in ("config.yaml", "split.json"))
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**settings, "data": {**settings["data"], "template": "Review: {text}\nOpinion:"}}))
    split.write_text(json.dumps({**json.loads(split.read_text()), "labels": ["good", "bad"]}))
    certified_anew(run_of_labels)
    expected = lk.open_run(talks).generate("Review: alder\nOpinion:", max_tokens=8)
    bare = lk.open_run(talks).generate("alder", max_tokens=8)
    assert answers(ChatOptions(target=str(run_of_labels), **QUICK), "alder\n", monkeypatch)[0] == f"{expected}\n" != f"{bare}\n"
    assert answers(ChatOptions(target=str(run_of_labels), plain=True, **QUICK), "alder\n", monkeypatch)[0] == f"{bare}\n"
    shown, _ = answers(ChatOptions(target=str(run_of_labels), **QUICK), "/quit\n", monkeypatch, terminal=True)
    assert "Each line is put into the template of the training rows" in shown and "--plain" in shown


def test_a_terminal_keeps_the_conversation(talks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "alder birch\n/nothing\n/both\ncedar\n/base\nelder\n/quit\nnever\n"
    shown, found = answers(ChatOptions(target=str(talks), **QUICK), lines, monkeypatch, terminal=True)
    said = found.to_mapping()["messages"]  # type: ignore[attr-defined]
    assert [one["content"] for one in said if one["role"] == "user"] == ["alder birch", "cedar", "elder"]
    assert "There is no command /nothing" in shown and "talks" in shown and said[1]["content"] in shown


@pytest.mark.slow
def test_models_and_further_adapters(talks: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lk.load(tiny_llama_folder).generate("alder", max_tokens=8)
    options = ChatOptions(target=str(tiny_llama_folder), adapter=(f"mine={talks}",), **QUICK)
    shown, _ = answers(options, "/base\nalder\n/adapter mine\nalder\n", monkeypatch)
    lines = shown.splitlines()
    assert lines[0] == "The base answers." and base in shown and "mine answers." in lines and lines[-1] != base
    merged = lk.merge(talks, out=talks.parent / "merged", quiet=True).out
    shown, _ = answers(ChatOptions(target=str(merged), **QUICK), "alder\n", monkeypatch)
    assert shown.strip() and shown.strip() != base
    file = write_model(tiny_llama_folder, open_adapter(talks).adapter, talks.parent / "talks.gguf")
    assert answers(ChatOptions(target=str(file), **QUICK), "alder\n", monkeypatch)[0] == shown


def test_the_command_reads_a_pipe(talks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("alder birch\n"))
    assert main(["chat", str(talks), "--max-tokens", "8", "--temperature", "0", "--context", "200"]) == 0
    assert lk.open_run(talks).generate("alder birch", max_tokens=8) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "./nowhere"}, "nowhere"),
        ({"target": "http://x", "memory": "2GiB", "adapter": ("a=b",)}, "is a server with a model of its own"),
        ({"target": "x", "adapter": ("a=none",)}, "none does not exist"),
        ({"target": "x", "max_tokens": 0}, "--max-tokens is 0"),
    ],
)
def test_mistakes_are_one_message(options: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        chat(ChatOptions(**options), console=Console(quiet=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_hostile_server_writes_no_control_sequences(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = "\x1b]0;title\x07\x1b[2J\x9b31mred \ud800"
    event = {"choices": [{"delta": {"content": attack}}], "data": [{"id": "smol"}, {"id": attack}]}
    body = b"data: " + json.dumps(event).encode() + b"\n\n"
    monkeypatch.setattr(speakers, "read_answer", lambda response: response.read()[6:])
    with answering([body]) as url:
        monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)("hi\n/adapters\n/both\nhi\n/nothing\x1b[2J\n"))
        code = main(["chat", url])
    found = capsys.readouterr()
    assert code == (0 if terminal else 2) and "\\x9b31mred" in found.out
    assert not set(found.out + found.err) & {"\x1b", "\x07", "\x9b", "\ud800"}
