"""Stage i: steps of LoRA on the UNets of Stable Diffusion 1.5 (512²) and SDXL (1,024²) at batch 1: seconds, and memory."""

from __future__ import annotations

import statistics
import time
from importlib.util import find_spec
from typing import Any

import torch

from first_hour.findings import Findings

STEPS, SKIPPED = 8, 3
TINY: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (32, 32), "cross_attention_dim": 16, "attention_head_dim": 4, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def run(found: Findings) -> None:
    if find_spec("diffusers") is None:
        found.add("not_run", "diffusers is not installed")
        return
    from contenders.image_step import SHAPES

    if found.toy:
        SHAPES["toy"] = TINY
    for shape in ("toy",) if found.toy else ("SD 1.5", "SDXL"):
        found.attempt(shape, lambda shape=shape: _steps(found, shape))


def _steps(found: Findings, shape: str) -> dict[str, Any]:
    from contenders.image_step import image_task, one_step

    asked = {"shape": shape, "dtype": str(found.dtype).removeprefix("torch."), "targets": ["attention"], "checkpointing": True}
    task, optimizer = image_task(asked, device=str(found.device))
    if not found.toy:
        torch.cuda.reset_peak_memory_stats(found.device)
    seconds, losses = [], []
    for _ in range(3 if found.toy else STEPS):
        began = time.perf_counter()
        losses.append(one_step(task, optimizer))
        found.synchronize()
        seconds.append(time.perf_counter() - began)
    result: dict[str, Any] = {"seconds_a_step": statistics.median(seconds[1 if found.toy else SKIPPED :]), "losses": losses}
    if not found.toy:
        result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(found.device)
    return result
