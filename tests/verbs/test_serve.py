"""`lorakeet serve`: a server as a user starts it, killed and started again, and the command for vLLM."""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.limits import misread_by_vllm
from lorakeet.formats.peft import peft
from lorakeet.models import servable
from lorakeet.models.servable import REMEDY
from lorakeet.models.text import load
from lorakeet.verbs import serve as serve_module
from lorakeet.verbs.options import VerifyOptions
from lorakeet.verbs.serve import existing_objects_frozen
from lorakeet.verbs.verify import verify
from tiny.adapters import random_adapter
from tiny.family_columns import saved
from tiny.models import tiny_model
from tiny.prepared import Forked, Prepared
from tiny.runs import quiet

BODY = {"model": "a", "prompt": "This drug", "temperature": 0, "max_tokens": 8}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    bare = tiny_model("llama", vocab_size=320)
    for seed, name in enumerate(("a", "b")):
        peft.write(random_adapter(bare, seed=seed), tmp_path / name)
    return tmp_path


@contextmanager
def server(prepared: Prepared, *arguments: object) -> Iterator[tuple[Forked, str]]:
    """The verb in a process of its own, and where it answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
    command = ["serve", "--json", "--dtype", "float32", "--port", "0", *arguments]
    with prepared.lorakeet(*command, env=environment, merged=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith('{"address"'):
                break
        else:
            raise AssertionError("".join(said))
        found = json.loads(said[-1])
        assert found["address"] == f"http://127.0.0.1:{found['port']}/v1"
        yield process, found["address"].removesuffix("/v1")


@contextmanager
def crowd(url: str, count: int) -> Iterator[None]:
    """So many connections that say nothing, half a header, half a body, or ask for a stream and do not read it."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**BODY, "max_tokens": 4, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    said = ["", head, f"{head}\r\n{body[: len(body) // 2]}", f"{head}\r\n{body}"]
    with ExitStack() as opened:
        for number in range(count):
            one = opened.enter_context(socket.create_connection((host, int(port)), timeout=60))
            one.sendall(said[3 if number % 50 == 0 else number % 3].encode())
        yield


def text(url: str, model: str) -> str:
    answer = httpx.post(f"{url}/v1/completions", json={**BODY, "model": model}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


@pytest.mark.slow
def test_killed_and_started_again(prepared: Prepared, tiny_llama_folder: Path, adapters: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny_llama_folder, "--adapters-dir", tmp_path / "kept")
    with server(prepared, *arguments, "--adapter", f"a={adapters / 'a'}") as (process, url):
        files = {file: adapters / "b" / file for file in ("adapter_config.json", peft.MODEL_NAME)}
        for file, path in files.items():
            httpx.put(f"{url}/v1/adapters/sent/{file}", content=path.read_bytes())
        digests = {file: sha256_of(path) for file, path in files.items()}
        assert httpx.post(f"{url}/v1/adapters/sent", json={"sha256": digests}).status_code == 200
        assert httpx.post(f"{url}/v1/adapters/sent/pin", json={}).status_code == 200
        texts = {name: text(url, name) for name in ("a", "sent", "llama")}
        assert len(set(texts.values())) == 3
        with crowd(url, 500):
            assert {name: text(url, name) for name in texts} == texts
        for _ in range(600):
            if "lorakeet_running_texts 0" in (page := httpx.get(f"{url}/metrics", timeout=60).text):
                break
            time.sleep(0.1)
        assert "lorakeet_running_texts 0" in page and "lorakeet_waiting_texts 0" in page
        process.send_signal(signal.SIGKILL)
        process.wait()
    with server(prepared, *arguments) as (process, url):
        assert httpx.get(f"{url}/v1/adapters/sent").json()["loaded"], "what is pinned is in memory, also after a restart"
        assert {name: text(url, name) for name in texts} == texts
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_a_run_is_served_as_it_was_trained_and_its_certificate_says_so(
    prepared: Prepared, finished: Any, tmp_path: Path
) -> None:
    run = shutil.copytree(finished.path, tmp_path / "run")
    wrong = shutil.copytree(finished.path, tmp_path / "wrong")
    config = wrong / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 4}))
    given = [f"--adapter={name}={folder / 'adapter'}" for name, folder in (("run", run), ("wrong", wrong))]
    with server(prepared, "--model", finished.model, *given, "--uncertified") as (_, url):
        assert text(url, "run") != text(url, finished.model.name)
        answer = httpx.post(f"{url}/v1/completions", json={**BODY, "model": "wrong"}, timeout=60)
        assert answer.status_code == 422 and "does not compute what" in answer.json()["error"]["message"]
        with pytest.raises(ConfigError, match=rf"serves {finished.model.name}, run, wrong; say which .* --against {url}#NAME"):
            verify(VerifyOptions(str(run), against=(url,), precision="float32", rows=2), console=quiet())
        found: Any = verify(VerifyOptions(str(run), against=(f"{url}/v1#run",), precision="float32", rows=4), console=quiet())
        assert found.certificate.checks[0].n > 2
        with pytest.raises(VerificationFailed, match="greedy text"):
            third = shutil.copytree(run, tmp_path / "third")
            verify(VerifyOptions(str(third), against=(f"{url}#{finished.model.name}",), rows=2), console=quiet())
        assert httpx.post(f"{url}/v1/adapters/run/certificate", timeout=60).json()["passed"]
        page = httpx.get(f"{url}/metrics", timeout=60).text
        assert 'lorakeet_adapter_checks_total{adapter="run",result="same"} 1' in page
        assert 'lorakeet_adapter_checks_total{adapter="wrong",result="different"} 1' in page
    certificate = read_certificate(run / "certificate.json")
    asked = ("prompt ids", "greedy text", "log-probabilities", "answers", "modules", "scale")
    assert [check.name for check in certificate.checks[-7:]] == [*(f"{url}/v1#run: {what}" for what in asked), "served"]
    served = certificate.checks[-1]
    assert served.right == "the record of the training" and served.measured["logprob_difference"] < 2e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_the_collector_looks_at_what_comes_and_not_at_what_there_was(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 7 * frozen)
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, partial(calls.append, name))
    with existing_objects_frozen():
        assert calls == ["collect", "freeze"]
    assert calls[2:] == ([] if frozen else ["unfreeze"]), "what others froze stays so"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "a"], "expected name=PATH"),
        (["--adapter", "../a=x"], "cannot be used"),
        (["--adapter", "a=nowhere"], "nowhere does not exist"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 opens the server to other machines"),
        (["--slots", "0"], "--slots is 0"),
        (["--out", "x"], "--out is for --engine vllm"),
        (["--memory", "2"], "without a unit"),
        (["--context", "100000"], "--context is 100000"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(tiny_llama_folder), "--dtype", "float32", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("jamba", "its JambaMambaMixer carries a state from token to token"),
        ("deepseek_v32", "its indexer chooses by a mask which tokens are attended to"),
        ("stablelm", "its code does not tell its attention where a text of the batch begins"),
        ("diffllama", "its blocks attend twice"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_before_it_is_loaded(
    kind: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's command is printed for it all the same: vLLM may have what is missing here."""
    monkeypatch.setattr(serve_module, "load_text_model", lambda *_, **__: pytest.fail("its weights were read"))
    folder = str(saved(kind, tmp_path))
    assert main(["serve", "--model", folder, "--dtype", "float32"]) == 2
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert f"'{kind}' model, which cannot be served here: {reason}" in said and "Serving " not in captured.out
    assert " ".join(REMEDY.split()) in said
    peft.write(random_adapter(tiny_model("llama", vocab_size=320)), tmp_path / "a")
    command = ["serve", "--engine", "vllm", "--command-only", "--model", folder, "--adapter", f"a={tmp_path / 'a'}"]
    assert main([*command, "--json"]) == 0
    assert shlex.split(json.loads(capsys.readouterr().out)["command"])[:3] == ["vllm", "serve", folder]


@pytest.mark.parametrize(("places", "given", "remedy"), [
    ("load_text_model", [], "take --quantize nf4, or give fewer --slots (16 now) or a shorter --context (2,048 now), since keys"),
    ("Engine", ["--quantize", "nf4", "--slots", "3"], "use it, give fewer --slots (3 now) or a shorter --context (2,048 now)"),
])  # fmt: skip
def test_a_gpu_that_is_too_small_is_said_with_what_would_help(
    places: str, given: list[str], remedy: str, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8 GiB")

    monkeypatch.setattr(serve_module, places, full)
    assert main(["serve", "--model", str(tiny_llama_folder), "--dtype", "float32", "--port", "0", *given]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tiny_llama_folder} cannot be served. The device ran out of memory: CUDA out of memory. Tried" in said
    assert remedy in said and "train.micro_tokens" not in said


def test_a_start_reads_the_model_s_folder_and_configuration_once(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check before loading reads both; the start ends after loading, by its --context."""
    read: list[str] = []
    for name in ("find_source", "read_config"):
        does = getattr(load, name)
        for module in (load, servable):
            monkeypatch.setattr(module, name, lambda *given, does=does, name=name: (read.append(name), does(*given))[1])
    assert main(["serve", "--model", str(tiny_llama_folder), "--dtype", "float32", "--context", "100000"]) == 2
    assert "--context is 100000" in capsys.readouterr().err and sorted(read) == ["find_source", "read_config"]


def test_texts_longer_than_a_chunk_are_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4 attends within chunks of 8 tokens here, and the cache has no chunks: a longer text would be wrong."""
    monkeypatch.setattr("lorakeet.serve.routes.http.run_server", lambda *_, **__: pytest.fail("it listens"))
    command = ["serve", "--model", str(saved("llama4_text", tmp_path)), "--dtype", "float32"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "a text may have 256 tokens. Limit them: --context 8" in " ".join(captured.err.split())
    assert "Serving " not in captured.out


def test_the_command_for_vllm(adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tiny_model("llama", vocab_size=320)
    mixed = {**random_adapter(bare, "q_proj").pairs, **random_adapter(bare, "v_proj", rank=9).pairs}
    peft.write(type(read_adapter(adapters / "a"))(mixed), adapters / "mixed")
    command = ["serve", "--engine", "vllm", "--model", "org/base", "--adapter", f"a={adapters / 'a'}"]
    assert main([*command, "--json"]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["command"])
    assert words[:4] == ["vllm", "serve", "org/base", "--enable-lora"] and words[5] == "8"
    assert words[-2:] == ["--lora-modules", f"a={(adapters / 'a').resolve()}"]
    assert words[words.index("--host") + 1] == "127.0.0.1", "vLLM would listen everywhere without it"
    wrong = [*command, "--adapter", f"m={adapters / 'mixed'}"]
    assert main(wrong) == 2 and "'m': vLLM would compute wrong scales" in " ".join(capsys.readouterr().err.split())
    assert main([*wrong, "--out", str(tmp_path / "for-vllm"), "--json"]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["command"])
    assert words[5] == "16" and words[-1] == f"m={(tmp_path / 'for-vllm' / 'm').resolve()}"
    assert not misread_by_vllm(read_adapter(tmp_path / "for-vllm" / "m"))
    peft.write(random_adapter(bare, dora=True), adapters / "dora")
    assert main([*command, "--adapter", f"d={adapters / 'dora'}"]) == 2
    assert "DoRA" in capsys.readouterr().err
    assert main(["serve", "--engine", "vllm", "--model", "x"]) == 2
    assert main([*command, "--host", "0.0.0.0", "--port", "9", "--dtype", "bfloat16", "--context", "512", "--json"]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["command"])
    kept = ["--max-model-len", "512", "--host", "0.0.0.0", "--port", "9", "--dtype", "bfloat16"]
    assert words[words.index("--max-model-len") : words.index("--lora-modules")] == kept
    assert main([*command, "--keys", "k.json", "--adapters-dir", str(tmp_path), "--slots", "4"]) == 2
    assert "cannot pass on --adapters-dir, --keys, --slots" in " ".join(capsys.readouterr().err.split())
