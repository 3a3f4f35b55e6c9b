"""Claim: LoRA on models of true size within a stated memory, their frozen 4-bit weights streamed from disk.

    python benchmarks/memory_claims.py [--claims 7b 7b-held-out 7b-dpo 13b 13b-in-memory 70b overhead] [--stores FOLDER]

Each claim runs in a process of its own, which plans its run as `lorakeet finetune --memory.budget` does. The weights are random,
in the model's true shapes, in NF4 (13B: 4-bit GPTQ, groups of 128), in a store that is made once (7B: 3.9 GB, 13B: 7 GB, 70B: 36
GB). The run is the real training loop, checkpoint and adapter on disk included; 7b-held-out chooses its best adapter by a
held-out row, and 7b-dpo computes its reference first, then a step on a pair. With --layers a model has fewer blocks of the same
width. The peak is VmHWM of /proc/self/status from the start of the process to its end: resident pages of every kind, files
included. No GPU is used: the GPU column is the planned sum of the tensors of a step, and was not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from harness.machine import origin, warn_if_busy, write_result
from harness.random_store import write_random_store

from lorakeet.config import RunConfig
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.spec import DataSpec
from lorakeet.kinds.preference.spec import PreferenceSpec
from lorakeet.kinds.preference.task import PreferenceTask, Reference
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.measure import peak_bytes
from lorakeet.memory.spec import MemorySpec
from lorakeet.memory.spill import Spill
from lorakeet.memory.store import WeightStore
from lorakeet.models.families import family_of
from lorakeet.models.files.gguf_copy import cache_folder
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.placement import products_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import Residence, open_streamed
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_of
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import TextModel
from lorakeet.planning.fit import choose
from lorakeet.planning.rehearse_text import STEP
from lorakeet.planning.text_run import LEAST, TextRun, Workload, streaming_ways
from lorakeet.quant.construct import weights_in
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import Way
from lorakeet.train.loop import Outcome, train
from lorakeet.train.progress import Record, Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask

SFT = "sft"
NF4 = QuantSpec(method="nf4")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
ADAM_BYTES = 16  # a parameter in mixed-precision full fine-tuning: 2 weight, 2 gradient, 4 master copy, 8 moments
SLOWER = 1.15


@dataclass(frozen=True)
class Claim:
    """A model, how it is trained, and the bytes that the process may hold."""

    model: str
    tokens: int
    steps: int
    budget: int
    layers: int | None = None  # fewer blocks than the model has, for what does not depend on their number
    slots: int | None = None  # blocks in memory, 0 for all; left out, as many as fit into the budget
    batches: int = 1
    gptq: bool = False  # whether the weights are in 4-bit GPTQ, else in NF4
    held_out: int = 0  # rows
    objective: str = SFT  # of preferences: `tokens` are those of a pair, a half for each of its answers


CLAIMS = {
    "7b": Claim("meta-llama/Llama-2-7b-hf", tokens=2048, steps=3, budget=2 << 30),
    "7b-held-out": Claim("meta-llama/Llama-2-7b-hf", tokens=2048, steps=1, budget=2 << 30, held_out=1),
    "7b-dpo": Claim("meta-llama/Llama-2-7b-hf", tokens=512, steps=1, budget=2 << 30, objective="dpo"),
    "13b": Claim("meta-llama/Llama-2-13b-hf", tokens=256, steps=1, budget=2_500_000_000, gptq=True),
    "13b-in-memory": Claim("meta-llama/Llama-2-13b-hf", tokens=256, steps=1, budget=10_000_000_000, gptq=True),
    "70b": Claim("meta-llama/Llama-2-70b-hf", tokens=64, steps=1, budget=6_000_000_000),
}
OVERHEAD = Claim("meta-llama/Llama-2-7b-hf", tokens=2048, steps=2, budget=4 << 30, layers=4)


class Clock(Reporter):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.last = time.perf_counter()

    def step(self, record: Record) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.losses.append(float(record["loss"]))
        self.last = now
        print(f"step {record['step']}: {self.seconds[-1]:.1f} s, peak {peak_bytes() / 1e9:.3f} GB", file=sys.stderr, flush=True)


class StreamedRun(TextRun):
    """A run that streams its blocks, also where all of its weights would fit."""

    def ways(self, budget: int) -> Iterator[Way]:
        yield from streaming_ways(self.plan, self.batches, budget)


def work(claim: Claim, stores: Path) -> dict[str, Any]:
    """Runs one claim in this process."""
    return_freed_memory()
    config, settings = model_config(claim), run_config(claim)
    planned = StreamedRun(settings, Workload(labelled=False), print, (config, None))
    choice, least = choose(planned, settings.memory.limit), planned.plan(LEAST)
    way = choice.way if choice.fits else LEAST
    slots = way.slots if claim.slots is None else claim.slots
    text = model_over(claim, config, stores, slots)
    assert text.streamed is not None
    initialise_adapter(text, plan_for(text.model, settings.lora, text.family), seed=0)
    clock = Clock()
    with TemporaryDirectory(dir=stores) as folder:
        given = {"spill": Spill(stores) if way.spilled else None, "together": way.together}
        task = task_of(claim, text, settings.train, **given)
        clock.last = time.perf_counter()
        run = RunFolder.create(Path(folder) / "run")
        outcome: Outcome = train(task, settings.train, run=run, report=clock, budget=claim.budget)
    step = planned.plan(Way(streamed=True, together=1)).forecast.phase(STEP)
    return {
        "model": claim.model, "blocks": least.blocks, "tokens": claim.tokens * claim.batches, "steps": outcome.steps,
        "seconds": clock.seconds, "losses": clock.losses, "trained": least.plan.parameters, "inputs_on_disk": way.spilled,
        "blocks_in_memory": slots or least.blocks, "budget": claim.budget,
        "planned": (choice.plan if choice.fits else least).training_peak,
        "peak": max(outcome.peak_bytes, peak_bytes()), "read_bytes": text.streamed.stream.bytes_read,
        "gpu_planned": sum(size for kind, size in step.kinds.items() if kind not in ("runtime", "allocator")),
        "parameters": weights_in(skeleton(config)), "objective": claim.objective,
    }  # fmt: skip


def task_of(claim: Claim, text: TextModel, spec: TrainSpec, **given: Any) -> TextTask:
    """The task of the claim's rows; that of preferences with its reference, computed as it starts."""
    if claim.objective == SFT:
        examples = rows(claim)
        return TextTask(text, examples[claim.held_out :], held_out=examples[: claim.held_out], spec=spec, **given)
    preference = PreferenceSpec().resolved(claim.objective)
    task = PreferenceTask(text, pairs(claim), held_out=(), spec=spec, preference=preference, **given)
    begun = time.perf_counter()
    task.reference = Reference(task.log_probs(task.train)[0], np.zeros(0), spec.micro_tokens)
    print(f"reference: {time.perf_counter() - begun:.1f} s, peak {peak_bytes() / 1e9:.3f} GB", file=sys.stderr, flush=True)
    return task


def model_config(claim: Claim) -> Any:
    config = config_of(ModelSpec(path=claim.model), say=print)
    if claim.layers is not None:
        config.num_hidden_layers = claim.layers
    if claim.gptq:
        config.quantization_config = GPTQ
    return config


def run_config(claim: Claim) -> RunConfig:
    """Rank 16 on every linear layer; rows of `tokens` tokens, one a micro-batch."""
    length = claim.tokens if claim.objective == SFT else claim.tokens // 2
    return RunConfig(
        model=ModelSpec(path=claim.model, dtype="bfloat16", device="cpu", quantize=QuantSpec() if claim.gptq else NF4),
        lora=LoraSpec(rank=16, alpha=32.0),
        data=DataSpec(train="random rows", max_tokens=length),
        memory=MemorySpec(budget=f"{claim.budget / 1024}KiB"),
        train=TrainSpec(
            steps=claim.steps, batch_size=claim.batches, micro_tokens=claim.tokens, learning_rate=1e-4, objective=claim.objective
        ),
    )


def model_over(claim: Claim, config: Any, stores: Path, slots: int) -> TextModel:
    """The model over its store, which is made by a process of its own where it is missing."""
    path = store_of(claim, stores)
    if not path.is_file():
        make = [sys.executable, __file__, "--make-store", json.dumps(claim.__dict__), "--stores", str(stores)]
        subprocess.run(make, check=True)
    family, device = family_of(config), torch.device("cpu")
    model, blocks = open_streamed(
        WeightStore(path), config, torch.bfloat16, family, residence=Residence(slots or config.num_hidden_layers)
    )
    set_attention(model, "varlen")
    products = products_for(run_config(claim).model, torch.bfloat16, device)
    return TextModel(model, None, claim.model, Path(), family, device, torch.bfloat16, products, streamed=blocks)


def store_of(claim: Claim, stores: Path) -> Path:
    return stores / f"{claim.model.rpartition('/')[2]}-{claim.layers or 'all'}{'-gptq' if claim.gptq else ''}.safetensors"


def rows(claim: Claim) -> list[Example]:
    """Random rows; every token but the first is a target."""
    draw = np.random.default_rng(0)
    supervised = np.arange(claim.tokens) > 0
    return [
        Example(draw.integers(5, 31_000, size=claim.tokens), supervised, str(number), None, False)
        for number in range(claim.held_out + claim.steps * claim.batches)
    ]


def pairs(claim: Claim) -> list[Example]:
    """Random pairs: one prompt, and two answers of an eighth of a row's tokens after it."""
    draw, found = np.random.default_rng(0), []
    length = claim.tokens // 2
    answer = length // 8
    supervised = np.arange(length) >= length - answer
    for number in range(claim.steps * claim.batches):
        prompt = draw.integers(5, 31_000, size=length - answer)
        for _ in range(2):
            ids = np.concatenate([prompt, draw.integers(5, 31_000, size=answer)])
            found.append(Example(ids, supervised, str(number), None, False))
    return found


def in_own_process(claim: Claim, stores: Path) -> dict[str, Any]:
    """The result of `work` in a fresh process, whose peak is that of the claim alone."""
    command = [sys.executable, __file__, "--worker", json.dumps(claim.__dict__), "--stores", str(stores)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def overhead(stores: Path, pairs: int) -> dict[str, Any]:
    """Streamed against the same computation with every block in memory, alternated; the second step of each run is timed."""
    seconds: dict[str, list[float]] = {"resident": [], "streamed": []}
    losses = set()
    for _ in range(pairs):
        for name, slots in (("resident", 0), ("streamed", 2)):
            found = in_own_process(replace(OVERHEAD, slots=slots), stores)
            seconds[name].append(found["seconds"][-1])
            losses.add(tuple(found["losses"]))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratio = medians["streamed"] / medians["resident"]
    return {"seconds": seconds, "ratio": ratio, "kept": ratio <= SLOWER, "same_losses": len(losses) == 1}


def hiding_tokens(stores: Path, found: dict[str, Any]) -> dict[str, float]:
    """Tokens a step from which computing takes longer than reading: seconds to read the bytes / seconds a token."""
    (path, *_) = sorted(stores.glob("*.safetensors"), key=lambda file: file.stat().st_size, reverse=True)
    buffer = bytearray(64 << 20)
    begun, count = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while count < 2 << 30 and (size := file.readinto(buffer)):
            count += size
    rate = count / (time.perf_counter() - begun)
    a_token = found["seconds"][-1] / found["tokens"]
    return {"read_bytes_a_second": rate, "tokens": found["read_bytes"] / found["steps"] / rate / a_token}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | tokens | steps | planned | process peak | allowed | kept | of full fine-tuning | GPU, planned, not run |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for one in found.values():
        full = ADAM_BYTES * one["parameters"]
        lines.append(
            f"| {one['model']} | {one['tokens']:,} | {one['steps']} | {one['planned'] / 1e9:.2f} GB | "
            f"{one['peak'] / 1e9:.2f} GB | "
            f"{one['budget'] / 1e9:.2f} GB | {'yes' if one['peak'] <= one['budget'] else 'NO'} | "
            f"1/{full / one['peak']:.0f} of {full / 1e9:,.0f} GB | {one['gpu_planned'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--claims", nargs="+", default=[*CLAIMS, "overhead"], choices=[*CLAIMS, "overhead"])
    parser.add_argument("--stores", type=Path, default=cache_folder() / "claims", help="folder for stores and scratch files")
    parser.add_argument("--layers", type=int, help="blocks of each model; left out, all")
    parser.add_argument("--pairs", type=int, default=3, help="alternated pairs behind the overhead")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--make-store", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.stores.mkdir(parents=True, exist_ok=True)
    if given.make_store:
        claim = Claim(**json.loads(given.make_store))
        config, quantize = model_config(claim), run_config(claim).model.quantize
        write_random_store(store_of(claim, given.stores), config, torch.bfloat16, quantize=quantize, family=family_of(config))
        return 0
    if given.worker:
        print(json.dumps(work(Claim(**json.loads(given.worker)), given.stores)))
        return 0
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    found: dict[str, dict[str, Any]] = {}
    for name in given.claims:  # each is written when it is known: together they take hours
        content: dict[str, Any]
        if name == "overhead":
            content = {name: overhead(given.stores, given.pairs)}
            print(f"Streamed / the same with every block in memory: {content[name]['ratio']:.3f}")
        else:
            found[name] = in_own_process(replace(CLAIMS[name], layers=given.layers or CLAIMS[name].layers), given.stores)
            content = {"claims": {name: found[name]}, "hiding": hiding_tokens(given.stores, found[name])}
            print(f"{name}: reading is hidden from {content['hiding']['tokens']:,.0f} tokens a step on.")
        what = name if given.layers is None else f"{name}-of-{given.layers}-blocks"
        print(f"Written: {write_result(f'memory_claims_{what}', content, seed=0, about=about, folder=given.results)}", flush=True)
    print(table(found))
    return 0 if all(one["peak"] <= one["planned"] <= one["budget"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
