"""One program that trains packed rows over a model made in memory: `python -m first_hour.contender ASKED.json FOUND.json`.

Each size of pack is measured in the same process and written as it is found. Lorakeet and PEFT compute on equal weights if these
are dense; in NF4 each packs or draws its own. A program gets the GPU for itself.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from contenders.packed_workload import RANK, RATE, drawn_steps, example_of
from harness.made_up_model import dense_model, frozen_text
from torch import Tensor, nn

from first_hour.findings import failure
from first_hour.goals import OURS, PEERS
from first_hour.shapes import training_flops
from lorakeet.config import RunConfig, read_run
from lorakeet.core.spec import LoraSpec
from lorakeet.memory.cuda import gpu_peak_bytes
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.planning.rehearse_text import silent_training
from lorakeet.train.text.task import TextTask

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROBES = 3  # passes whose host and GPU times are taken apart

Step = Callable[[int], float]  # trains on the rows of a step and gives its loss


class NotHere(Exception):
    """What a program needs and this machine lacks."""


def main(arguments: Sequence[str]) -> None:
    asked = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    path, found = Path(arguments[1]), {}
    device = torch.device(asked["device"])
    measured = _ours if asked["program"] == OURS else _peer
    try:
        model = measured(asked, device)
        for tokens in asked["tokens"]:
            found[str(tokens)] = _measured(asked, device, model, tokens)
            path.write_text(json.dumps(found), encoding="utf-8")
            print(asked["program"], tokens, json.dumps(found[str(tokens)]), flush=True)
    except NotHere as why:
        found["not_run"] = str(why)
    except torch.OutOfMemoryError as error:
        found["failed" if asked["program"] == OURS else "not_run"] = f"out of memory: {failure(error)}"
    path.write_text(json.dumps(found), encoding="utf-8")


def _measured(asked: dict[str, Any], device: torch.device, make: Callable[[list[Any]], Any], tokens: int) -> dict[str, Any]:
    rows = drawn_steps(tokens, asked["steps"], 0, words=(3, min(4000, asked["shape"]["vocab_size"])))
    on_gpu = device.type == "cuda"
    step, passes = make([row for each in rows for row in each])
    losses, seconds = [], []
    for number in range(asked["steps"]):
        if number == asked["skip"] and on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # of what was needed to make the model
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        losses.append(step(number))
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    typical = statistics.median(seconds[asked["skip"] :])
    lengths = [len(row.ids) for row in rows[0]]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"the losses are {losses}; expected finite ones")
    found: dict[str, Any] = {
        "tokens_per_second": tokens / typical, "seconds_a_step": typical, "first_loss": losses[0], "last_loss": losses[-1],
        "share_of_rate": training_flops(asked["shape"], lengths, RANK) / typical / asked["rate"],
    }  # fmt: skip
    if on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["process_bytes"] = gpu_peak_bytes(device)  # with the context as it is planned
    host, gpu = zip(*(_apart(passes, device) for _ in range(PROBES)), strict=True)
    return {**found, "host_seconds": min(host), "gpu_seconds": min(gpu) if on_gpu else None}


def _apart(passes: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until the host has launched both passes of a micro-batch, and those that the GPU takes for them."""
    if device.type != "cuda":
        began = time.perf_counter()
        passes()
        return time.perf_counter() - began, 0.0
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    start.record()
    passes()
    host = time.perf_counter() - began
    stop.record()
    torch.cuda.synchronize(device)
    return host, float(start.elapsed_time(stop)) / 1e3


def settings_of(tokens: int, steps: int, rows: int, **more: str) -> RunConfig:
    """The settings of Lorakeet's training, as a run file has them."""
    values = {
        "data.train": "none", "data.max_tokens": tokens, "model.path": "random", "lora.rank": RANK, "lora.alpha": 2.0 * RANK,
        "train.batch_size": rows, "train.micro_tokens": tokens, "train.schedule": "constant", "train.warmup_fraction": 0.0,
        "train.length_grouping": False, "train.learning_rate": RATE, "train.steps": steps,
    }  # fmt: skip
    return read_run(None, {**{name: str(value) for name, value in values.items()}, **more})


def _ours(asked: dict[str, Any], device: torch.device) -> Callable[[list[Any]], tuple[Step, Callable[[], object]]]:
    """Lorakeet's own training step."""
    text = frozen_text(asked["shape"], device, getattr(torch, asked["dtype"]), base=asked["base"])
    plan = plan_for(text.model, LoraSpec(rank=RANK, alpha=2.0 * RANK), text.family)
    text = initialise_adapter(text, plan, seed=0)

    def make(rows: list[Any]) -> tuple[Step, Callable[[], object]]:
        count = len(rows) // asked["steps"]
        tokens = sum(len(row.ids) for row in rows[:count])
        config = settings_of(tokens, asked["steps"], count)
        examples = [example_of(row) for row in sorted(rows, key=lambda row: int(row.prompt))]
        task = TextTask(text, examples, held_out=(), spec=config.train)
        training = silent_training(task, config.train)
        recorded: list[float] = []
        training.metrics.write = lambda record: recorded.append(float(record["loss"] or 0))  # type: ignore[union-attr,method-assign]
        (batch,) = task.batches(0)

        def step(_: int) -> float:
            training.step()
            return recorded[-1]

        def passes() -> None:
            task.loss(batch).backward()
            for parameter in training.parameters.values():
                parameter.grad = None

        return step, passes

    return make


def _peer(asked: dict[str, Any], device: torch.device) -> Callable[[list[Any]], tuple[Step, Callable[[], object]]]:
    """PEFT in its best manual setting: flat rows, varlen attention, Liger's kernels and its head without logits."""
    if find_spec("peft") is None:
        raise NotHere("PEFT is not installed")
    from peft import LoraConfig, get_peft_model

    dtype = getattr(torch, asked["dtype"])
    on_gpu = device.type == "cuda"
    if on_gpu and find_spec("liger_kernel") is None:
        raise NotHere("liger-kernel is not installed")
    model = dense_model(asked["shape"], device, dtype, attn_implementation=_attention() if on_gpu else "sdpa")
    if asked["base"] == "nf4":
        _pack(model, dtype)
    if on_gpu:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, settings).train()
    if asked["program"] == PEERS[1]:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def make(rows: list[Any]) -> tuple[Step, Callable[[], object]]:
        count = len(rows) // asked["steps"]
        packs = [_flat(rows[place : place + count], device) for place in range(0, len(rows), count)]

        def loss_of(number: int) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # A and B are fp32, as PEFT has them
                found: Tensor = adapted(**packs[number]).loss
            return found

        def step(number: int) -> float:
            loss = loss_of(number)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss)

        def passes() -> None:
            loss_of(0).backward()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()

        return step, passes

    return make


def _flat(rows: list[Any], device: torch.device) -> dict[str, Any]:
    """The rows one after another, positions from 0 in each; the first token of a row is no target."""
    ids = torch.tensor([[token for row in rows for token in row.ids]])
    places = torch.cat([torch.arange(len(row.ids)) for row in rows])[None]
    labels = ids.masked_fill(places == 0, -100)
    lengths = torch.tensor([0, *(len(row.ids) for row in rows)], dtype=torch.int32)
    found: dict[str, Any] = {"input_ids": ids, "position_ids": places, "labels": labels}
    found = {name: each.to(device) for name, each in found.items()} | {"use_cache": False}
    if device.type == "cuda":
        starts = lengths.cumsum(0, dtype=torch.int32).to(device)
        longest = int(lengths.max())
        found |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return found


def _attention() -> str:
    """The name of attention by torch's public varlen function, which reads where rows start as FlashAttention 2 does."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
        starts, longest = given["cu_seq_lens_q"], given["max_length_q"]
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:  # its argument for groups is younger than torch 2.11
            k, v = (states.repeat_interleave(groups, 1) for states in (k, v))
        found = varlen_attn(q, k, v, starts, starts, longest, longest, **_options(varlen_attn, given.get("scaling")))
        return found[None], None

    AttentionInterface.register("varlen by hand", attend)
    return "varlen by hand"


def _options(function: Any, scale: float | None) -> dict[str, Any]:
    """The arguments for a causal mask, whose name changed between releases of torch, and for the factor of the scores.

    Without the second the function takes 1/√d, which is Llama's.
    """
    import inspect

    known = inspect.signature(function).parameters
    mask: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return mask | ({"scale": scale} if "scale" in known else {})


def _pack(model: Any, dtype: torch.dtype) -> None:
    """Puts bitsandbytes' NF4 with double quantisation in place of the decoder's linear layers."""
    if find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    import bitsandbytes

    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS:
            device = module.weight.device
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
                compress_statistics=True,
            )  # fmt: skip
            packed.weight = bitsandbytes.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
            )
            model.set_submodule(path, packed.to(device))
    model.is_loaded_in_4bit = True  # by which PEFT knows


if __name__ == "__main__":
    main(sys.argv[1:])
