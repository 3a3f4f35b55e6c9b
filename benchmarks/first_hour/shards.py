"""Stage h: a base that is sharded over two processes (FSDP2) ends with the losses of one process.

Two GPUs exchange by NCCL, which refuses two processes on one GPU: with one, both compute on the CPU and exchange by gloo.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import torch
from harness.made_up_model import write_model, write_rows

from first_hour.findings import Findings
from first_hour.losses import small_shape
from first_hour.process import PAUSE, Started, wait
from first_hour.runs import QUICK

STEPS = 3
CLOSE = 0.02  # nats, on GPUs in bf16


def run(found: Findings) -> None:
    gpus = 0 if found.toy else torch.cuda.device_count()
    place = "two GPUs over NCCL" if gpus > 1 else "two processes on the CPU over gloo"
    found.add("where", place if gpus > 1 or found.toy else f"{place}: there is one GPU, and NCCL refuses two processes on it")
    device = "cuda" if gpus > 1 else "cpu"
    write_model(small_shape(toy=found.toy), found.folder / "small", "cpu")
    write_rows(found.folder / "few.jsonl", 48)
    one = found.attempt("one process", lambda: _losses(found, 1, device))
    two = found.attempt("two processes", lambda: _losses(found, 2, device))
    if isinstance(one, list) and isinstance(two, list):
        found.add("largest gap", max(abs(a - b) for a, b in zip(one, two, strict=True)))


def _losses(found: Findings, count: int, device: str) -> list[float]:
    """The loss of each step by so many processes; ValueError if they fail."""
    out = found.folder / f"shard{count}"
    model, rows = found.folder / "small", found.folder / "few.jsonl"
    command = ["finetune", "--model", str(model), "--data.train", str(rows), "--out", str(out)]
    command += ["--train.steps", str(STEPS), "--train.batch_size", "4", "--train.evaluate_every", str(STEPS), *QUICK]
    command += ["--data.max_tokens", "64", "--model.device", "auto" if device == "cuda" else "cpu"]
    command += ["--model.dtype", "bfloat16" if device == "cuda" else "float32"] + (["--train.shard", "true"] if count > 1 else [])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [found.folder / f"shard{count}-{rank}.log" for rank in range(count)]
    started = []
    for rank, log in enumerate(logs):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        more = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        started.append(Started("first_hour.one_run", ["0", *command], log, more if count > 1 else None))
    try:
        hows = [wait(each, max(1.0, found.left - 2)) for each in started]
    finally:
        for each in started:
            if not each.ended():
                each.end()
    said = [log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists()]
    print("\n".join(said))
    time.sleep(PAUSE)
    if hows != ["done"] * count:
        raise ValueError(f"the processes ended with {hows}: {' '.join(text.strip()[-300:] for text in said)}")
    return _of_steps(out)


def _of_steps(out: Path) -> list[float]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "tokens_per_second" in line]
