"""vLLM's process: found by its variable, waited for, ended with what it started; its end is one message."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models.text.load import load_tokenizer
from lorakeet.verbs.vllm import vllm_process
from lorakeet.verbs.vllm.vllm_process import VARIABLE, base_url, running_vllm, vllm_python
from tiny.exports import write_model
from tiny.fake_vllm import fake_python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_environment_is_the_named_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"expected the Python of an environment with vLLM. make vllm builds"):
        vllm_python()
    program = fake_python(tmp_path, "dies")
    monkeypatch.setenv(VARIABLE, str(program))
    assert vllm_python() == program
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(vllm_process, "find_spec", lambda _: None)
    assert vllm_python() is None


def test_addresses() -> None:
    assert base_url("0.0.0.0", 8) == "http://127.0.0.1:8" and base_url("::1", 8) == base_url("::", 8) == "http://[::1]:8"


def test_a_start_that_fails_is_one_message(tmp_path: Path) -> None:
    program, port = fake_python(tmp_path, "dies"), free_port()
    with (
        pytest.raises(EnvironmentProblem, match=r"ended with exit code 7 before it answered; what it said stands above"),
        running_vllm(program, ["vllm", "serve", "m"], f"http://127.0.0.1:{port}"),
    ):
        pass
    given = json.loads((tmp_path / "words.json").read_text())
    assert given["words"] == ["-m", "vllm.entrypoints.cli.main", "serve", "m"]
    assert given["environment"] == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": None}, "any client could replace a verified adapter"


@pytest.mark.parametrize(("loading", "given"), [(None, "1"), (True, "True"), (False, "False")])
def test_loading_later_is_on_only_if_it_is_meant(
    loading: bool | None, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    program, url = fake_python(tmp_path, "dies"), f"http://127.0.0.1:{free_port()}"
    dead = pytest.raises(EnvironmentProblem, match="ended with exit code 7")
    with dead, running_vllm(program, ["vllm", "serve", "m"], url, loading=loading):
        pass
    assert json.loads((tmp_path / "words.json").read_text())["environment"] == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": given}


@pytest.mark.slow
def test_it_ends_with_the_context_and_one_that_is_not_ready_in_time_is_ended(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_process, "PAUSE", 0.02)
    file = write_model(tiny_llama_folder, None, tmp_path / "m.gguf", tokenizer=load_tokenizer(tiny_llama_folder))
    program, port = fake_python(tmp_path, "serves", file, tiny_llama_folder), free_port()
    words, url = ["vllm", "serve", "m", "--port", str(port)], f"http://127.0.0.1:{port}"
    with running_vllm(program, words, url) as process:
        assert process.poll() is None
    assert process.poll() is not None
    late = pytest.raises(EnvironmentProblem, match=r"did not answer at .*/health within 0 s")
    with late, running_vllm(program, words, url, longest=0):
        pass
    given: Any = json.loads((tmp_path / "words.json").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(given["pid"], 0)
