"""`lorakeet push` with the real huggingface_hub against a strict hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakeet.evaluate.certificate import read_certificate
from lorakeet.exporting.hub import Uploaded
from lorakeet.runs.certified import of_model
from lorakeet.verbs.push import Pushed
from tiny.model_hub import TOKEN, Hub, serving
from tiny.runs import reviews, run, write_rows

BASE = "plants/tiny"
WORKER = """
import contextlib, io, json, os, sys, time
time.sleep = lambda seconds: None  # huggingface_hub waits before it tries again
from lorakeet.cli.main import main

for line in sys.stdin:
    order, said = json.loads(line), io.StringIO()
    os.environ["HF_TOKEN"] = order["token"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["push", *order["words"]])
    print(json.dumps([code, " ".join(said.getvalue().split()), "torch" in sys.modules]), flush=True)
"""
SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "certificate.json", "report.html"}


@pytest.fixture(scope="module")
def finished(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with a text in place of what exports would write beside it."""
    folder = tmp_path_factory.mktemp("pushed")
    run(tiny_llama_folder, write_rows(folder / "rows.jsonl", reviews(40)), folder / "mine", {"train.steps": "2"})
    merged = folder / "merged"
    merged.mkdir()
    card = "---\ntags: [lora]\n---\n# Merged\n"
    for name, content in {"config.json": "{}", "model.safetensors": "weights", "README.md": card}.items():
        (merged / name).write_text(content)
    (folder / "mine.gguf").write_bytes(b"GGUF")
    certificate = read_certificate(folder / "mine" / "certificate.json")
    of_model(certificate, merged).write(merged / "certificate.json")
    of_model(certificate, folder / "mine.gguf").write(folder / "mine.certificate.json")
    return folder


class Desk:
    """A hub, and a process in a folder that pushes to it: huggingface_hub is imported once."""

    def __init__(self, url: str, hub: type[Hub], folder: Path, **environment: str) -> None:
        self.hub, self.folder = hub, folder
        given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        given |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200",
                  "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **environment}  # fmt: skip
        worker = [sys.executable, "-c", WORKER]
        self.process = subprocess.Popen(
            worker, cwd=folder, env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def push(self, *words: str, token: str = TOKEN) -> tuple[int, str]:
        """The exit code, and all that was printed in one line."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.process.stdin.write(json.dumps({"words": words, "token": token}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        code, said, torch = json.loads(line)
        assert not torch, "a push needs no torch"
        return int(code), str(said)

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def process(finished: Path) -> Iterator[Desk]:
    with serving() as (url, hub):
        desk = Desk(url, hub, finished)
        yield desk
        desk.close()


@pytest.fixture
def desk(process: Desk) -> Desk:
    """The process, with an empty hub."""
    for state in (process.hub.repositories, process.hub.objects, process.hub.received, process.hub.strays, process.hub.fails):
        state.clear()
    process.hub.corrupts.clear()
    return process


@pytest.mark.slow
def test_an_adapter_is_sent_in_one_commit_and_compared(desk: Desk, tiny_llama_folder: Path) -> None:
    code, said = desk.push("mine", "me/dates", "--base", BASE, "--private")
    assert code == 0, said
    repository = desk.hub.repositories["me/dates"]
    files = repository["files"]
    assert set(files) == SENT and repository["private"] and len(repository["commits"]) == 1 and not desk.hub.strays
    assert files["adapter_model.safetensors"] == (desk.folder / "mine" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    card = files["README.md"].decode()
    assert f"base_model: {BASE}\nbase_model_relation: adapter\n" in card and 'from_pretrained("me/dates")' in card
    assert not [name for name, content in files.items() if str(tiny_llama_folder).encode() in content], "paths of this machine"
    assert "to the private repository me/dates" in said and "by their hashes: 5 files are the same" in said
    assert "report.html shows rows of the data; --no-report leaves it out." in said


@pytest.mark.slow
def test_the_same_again_changes_nothing_and_other_files_are_named(desk: Desk) -> None:
    assert desk.push("mine", "me/dates", "--base", BASE)[0] == 0
    desk.hub.repositories["me/dates"]["files"]["notes.txt"] = b"of somebody else"
    code, said = desk.push("mine", "me/dates", "--base", BASE)
    assert code == 0 and len(desk.hub.received) == 1, "the large file was not sent again"
    assert "Also in the repository, unchanged: notes.txt." in said
    code, said = desk.push("mine", "me/dates", "--base", BASE, "--json")
    found, _ = json.JSONDecoder().raw_decode(said[said.index('{ "name"') :])
    assert code == 0 and found["others"] == ["notes.txt"] and set(found["files"]) == SENT


def test_a_failed_upload_goes_on_where_it_was(desk: Desk) -> None:
    """The large files arrive, the commit does not: the second push sends none of them again."""
    words = ("mine", "me/whole", "--merged", "merged", "--gguf", "mine.gguf", "--no-report", "--base", BASE)
    desk.hub.fails["/commit/"] = 500
    code, said = desk.push(*words)
    assert code == 2 and "the repository is as it was before: the hub answered 500" in said and "Run the same" in said
    assert desk.hub.repositories["me/whole"]["files"] == {} and len(desk.hub.received) == 2
    desk.hub.fails.clear()
    assert desk.push(*words)[0] == 0
    files = desk.hub.repositories["me/whole"]["files"]
    named = {"README.md", "certificate.json", "config.json", "mine.certificate.json", "mine.gguf", "model.safetensors"}
    assert set(files) == named
    assert len(desk.hub.received) == 2 and "base_model_relation: finetune" in files["README.md"].decode()


def test_what_a_link_names_is_never_sent(desk: Desk, tmp_path: Path) -> None:
    """A run of someone else could name any file of this machine by one."""
    secret = tmp_path / "secret"
    secret.write_text("a key of this machine")
    for name in ("report.html", "certificate.json", "adapter"):
        folder = desk.folder / f"linked-{name}"
        shutil.copytree(desk.folder / "mine", folder)
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(secret if name == "report.html" else tmp_path / name)
        code, said = desk.push(folder.name, "me/dates", "--base", BASE)
        assert code == 2 and f"{name} is a link, so what it names would be sent" in said and not desk.hub.repositories, said


def test_a_card_that_is_no_text_is_one_message(desk: Desk) -> None:
    folder = Path(shutil.copytree(desk.folder / "mine", desk.folder / "odd"))
    (folder / "adapter" / "README.md").write_bytes(b"\xff\xfe")
    code, said = desk.push("odd", "me/dates", "--base", BASE)
    assert code == 2 and "README.md cannot be sent: UnicodeDecodeError" in said and not desk.hub.repositories


@pytest.mark.slow
def test_a_large_file_that_does_not_arrive_leaves_the_repository_as_it_was(desk: Desk) -> None:
    desk.hub.fails["/lfs/"] = 503
    code, said = desk.push("mine", "me/dates", "--base", BASE)
    assert code == 2 and "the hub answered 503" in said and desk.hub.repositories["me/dates"]["files"] == {}
    desk.hub.fails["/lfs/"] = 413
    assert "larger than the hub takes" in desk.push("mine", "me/dates", "--base", BASE)[1]
    desk.hub.fails.clear()
    assert desk.push("mine", "me/dates", "--base", BASE)[0] == 0


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/dates", "", "There is no token for the hub. Log in with: hf auth login"),
        ("me/dates", "hf_wrong", "failed, nothing was sent: the hub does not take the token"),
        ("you/dates", TOKEN, "the token may not write to you/dates"),
    ],
)
def test_what_the_hub_refuses_is_one_message(desk: Desk, name: str, token: str, message: str) -> None:
    code, said = desk.push("mine", name, "--base", BASE, token=token)
    assert code == 2 and message in said and not desk.hub.received and not desk.hub.repositories, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "message"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({}, "failed, nothing was sent: [Errno")],
)
def test_a_hub_that_cannot_be_reached_is_one_message(finished: Path, environment: dict[str, str], message: str) -> None:
    desk = Desk("http://127.0.0.1:9", Hub, finished, **environment)
    code, said = desk.push("mine", "me/dates", "--base", BASE)
    desk.close()
    assert code == 2 and message in said, said


def test_a_public_repository_is_refused_with_private(desk: Desk) -> None:
    desk.hub.repositories["me/dates"] = {"private": False, "files": {}, "commits": []}
    code, said = desk.push("mine", "me/dates", "--base", BASE, "--private")
    assert code == 2 and "exists and is public, so --private is refused" in said and not desk.hub.received


def test_the_result_is_plain_values() -> None:
    found = Pushed("me/x", Uploaded("u", "c", {"a": 1}, private=True)).to_mapping()
    assert found == {"name": "me/x", "url": "u", "commit": "c", "files": {"a": 1}, "private": True, "others": ()}


def test_other_bytes_on_the_hub_are_noticed(desk: Desk) -> None:
    desk.hub.corrupts.add("adapter_model.safetensors")
    code, said = desk.push("mine", "me/dates", "--base", BASE)
    assert code == 3 and "The hub has other bytes than were sent to me/dates: adapter_model.safetensors" in said
