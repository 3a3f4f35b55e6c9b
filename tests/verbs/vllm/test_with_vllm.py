"""`lorakeet serve --engine vllm`: starts it, verifies each adapter before it says so, and stops with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.formats.files.digest import sha256_of
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs.options import ServeOptions
from lorakeet.verbs.vllm import vllm_process, with_vllm
from lorakeet.verbs.vllm.vllm_process import VARIABLE
from lorakeet.verbs.vllm.with_vllm import serve_with_vllm, vllm_command
from lorakeet.verification.certify import HowCompared
from tiny.exports import write_model
from tiny.fake_vllm import TESTS, fake_python
from tiny.prepared import Prepared
from tiny.runs import quiet
from verbs.vllm.test_vllm_process import free_port


def test_a_gguf_model_is_named_by_its_dense_copy(
    finished: Any, loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM cannot load package:… and .gguf names; the copy has the model's own name in requests."""
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    file = write_model(finished.model, None, tmp_path / "small.gguf")
    options = ServeOptions(model=str(file), adapter=(f"a={loud}",), engine="vllm", uncertified=True)  # in another file format
    words = list(vllm_command(options, {"a": loud}, quiet()).words)
    model = Path(words[2])
    assert (model / "config.json").is_file() and sha256_of(*model.glob("*.safetensors"))
    assert words[words.index("--served-model-name") + 1] == "small.gguf"
    away = vllm_command(ServeOptions(model="/elsewhere/m", adapter=(f"a={loud}",), engine="vllm"), {"a": loud}, quiet())
    assert away.words[2] == "/elsewhere/m" and "--served-model-name" not in away.words


@pytest.mark.slow
def test_a_wrong_adapter_there_is_not_served(finished: Any, loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "PAUSE", 0.02)
    monkeypatch.setattr(with_vllm, "CHECK_ROWS", 1)
    base = write_model(finished.model, None, tmp_path / "base.gguf", tokenizer=load_tokenizer(finished.model))
    monkeypatch.setenv(VARIABLE, str(fake_python(tmp_path, "serves", base, finished.model)))
    options = ServeOptions(model=str(finished.model), adapter=(f"tiny={loud}",), engine="vllm", port=free_port())
    with pytest.raises(VerificationFailed, match="the adapter is not applied"):
        serve_with_vllm(options, {"tiny": loud}, quiet())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_other_machines_are_not_let_in_without_a_key(
    host: str, loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(fake_python(tmp_path, "dies")))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    options = ServeOptions(model="/elsewhere/m", adapter=(f"a={loud}",), engine="vllm", host=host, port=free_port())
    with pytest.raises(ConfigError, match=r"opens vLLM to other machines. Set VLLM_API_KEY"):
        serve_with_vllm(options, {"a": loud}, quiet())
    assert not (tmp_path / "words.json").exists()


@contextmanager
def pretended(given: dict[str, Any], *arguments: Any, **more: Any) -> Iterator[None]:
    """In place of running_vllm."""
    given |= more
    try:
        yield
    finally:
        given["ended"] = True


@pytest.mark.parametrize(("host", "loading"), [("127.0.0.1", None), ("0.0.0.0", False)])
def test_the_key_goes_to_the_verification_and_ctrl_c_in_it_is_no_success(
    host: str, loading: bool | None, loud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def interrupted(opened: Any, against: Any, how: HowCompared, console: Any, *, of: str) -> None:
        given["key"] = how.key
        raise KeyboardInterrupt

    monkeypatch.setenv("VLLM_API_KEY", "sesame-sesame")
    monkeypatch.setattr(with_vllm, "vllm_python", lambda: Path(sys.executable))
    monkeypatch.setattr(with_vllm, "running_vllm", partial(pretended, given))
    monkeypatch.setattr(with_vllm, "open_adapter", lambda *_, **__: None)
    monkeypatch.setattr(with_vllm, "certify_artefacts", interrupted)
    options = ServeOptions(model="/elsewhere/m", adapter=(f"a={loud}",), engine="vllm", host=host, port=free_port())
    with pytest.raises(KeyboardInterrupt):
        serve_with_vllm(options, {"a": loud}, quiet())
    assert given == {"loading": loading, "key": "sesame-sesame", "ended": True}


@pytest.mark.slow
def test_it_says_that_it_serves_once_verified_and_ends_with_sigterm(
    finished: Any, loud: Path, tmp_path: Path, prepared: Prepared
) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    right = write_model(finished.model, open_adapter(run).adapter, tmp_path / "r.gguf", tokenizer=load_tokenizer(finished.model))
    program = fake_python(tmp_path, "serves", right, finished.model)
    command = ["serve", "--engine", "vllm", "--model", finished.model, "--adapter", f"tiny={run}", "--port", free_port()]
    environment = {**os.environ, VARIABLE: str(program), "PYTHONPATH": str(TESTS.parent / "src"), "OMP_NUM_THREADS": "1"}
    with prepared.lorakeet(*command, env=environment, merged=True) as process:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "vLLM serves 1 adapter at" in line:
                process.send_signal(signal.SIGTERM)
        code = process.wait()
    said = "".join(lines)
    assert "each compared with the live adapter" in said and "by vLLM 0.11.0" in said, said
    assert said.index("by vLLM 0.11.0") < said.index("vLLM serves 1 adapter")
    assert code == 0
    pid = json.loads((tmp_path / "words.json").read_text())["pid"]
    assert not Path(f"/proc/{pid}").exists()
