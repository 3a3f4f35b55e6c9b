"""Servers with something between them and the live adapter: another tokenizer, a proxy that rewrites, a page of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs.options import VerifyOptions
from lorakeet.verbs.verify import verify
from tiny import servers
from tiny.exports import write_model
from tiny.hostile_server import answering
from tiny.runs import quiet
from tiny.servers import Fake, serving


@pytest.fixture(scope="module")
def right(finished: Any, loud: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(finished.model, open_adapter(loud).adapter, tmp_path_factory.mktemp("right") / "right.gguf")


class Shifted(Fake):
    """A server with another tokenizer: the same texts have other ids."""

    def vllm_tokenize(self, asked: Any) -> dict[str, Any]:
        found = super().vllm_tokenize(asked)
        return {**found, "tokens": [number + 1 for number in found["tokens"]]}


class Rewriting(Fake):
    """A proxy that puts text of its own before each prompt."""

    def completions(self, asked: Any) -> dict[str, Any]:
        return super().completions({**asked, "prompt": [*self.engine.tokenise("Be brief. "), *asked["prompt"]]})


class Dropping(Fake):
    """A proxy that takes log-probabilities out of the answers."""

    def _say(self, body: Any) -> None:
        if isinstance(body, dict):
            for choice in body.get("choices", ()):
                choice.pop("logprobs", None)
                choice.pop("prompt_logprobs", None)
        super()._say(body)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "check"), [(Shifted, "prompt ids"), (Rewriting, "log-probabilities")])
def test_another_tokenizer_and_a_proxy_that_rewrites_prompts_fail(
    finished: Any, loud: Path, right: Path, kind: type[Fake], check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    monkeypatch.setattr(servers, "Fake", kind)
    with serving(right, load_tokenizer(finished.model), "vLLM") as url, pytest.raises(VerificationFailed, match=check) as caught:
        verify(VerifyOptions(str(run), against=(url,), rows=2, modules=False), console=quiet())
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_log_probabilities_that_a_proxy_drops_are_not_checked_and_said(
    finished: Any, loud: Path, right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    monkeypatch.setattr(servers, "Fake", Dropping)
    with serving(right, load_tokenizer(finished.model), "vLLM") as url:
        found: Any = verify(VerifyOptions(str(run), against=(url,), rows=2), console=quiet())
    assert not any(check.name.endswith("log-probabilities") for check in found.certificate.checks)
    missing = {one.what for one in read_certificate(run / "certificate.json").unchecked}
    assert {"log-probabilities and their KL", "which modules are active"} <= missing


@pytest.mark.parametrize("page", [b"<html>Sign in</html>", json.dumps({"data": "no list"}).encode()])
def test_a_page_instead_of_an_answer_is_one_message_and_no_verdict(loud: Path, page: bytes, tmp_path: Path) -> None:
    run = shutil.copytree(loud, tmp_path / "run")
    with answering([page]) as url, pytest.raises(EnvironmentProblem, match=r"gives (an|no) answer") as caught:
        verify(VerifyOptions(str(run), against=(url,), rows=1), console=quiet())
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
