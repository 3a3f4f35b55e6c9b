"""Stage f: by torch's profiler, the 25 kernels that take longest in a step, and how long the GPU is idle."""

from __future__ import annotations

import re
import time
from typing import Any

from contenders.packed_workload import drawn_steps, example_of
from harness.made_up_model import frozen_text
from torch.profiler import ProfilerActivity, profile

from first_hour.contender import settings_of
from first_hour.findings import Findings
from first_hour.shapes import shape_of
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.planning.rehearse_text import silent_training
from lorakeet.train.text.task import TextTask

WARM, PROFILED, MOST = 3, 2, 25
KINDS = {  # by words in a kernel's name, the first that fits
    "products": "gemm|cutlass|cublas|nvjet|sm80_xmma|sm90_xmma|wgmma|::mm|aten::addmm|aten::mm",
    "attention": "flash|fmha|attention|attn",
    "dequantisation": "dequant|unpack|4bit",
    "copies": "memcpy|memset|copy",
}


def run(found: Findings) -> None:
    for model, base in (("1B", "none"),) if found.toy else (("1B", "none"), ("8B", "none"), ("8B", "nf4")):
        found.attempt(f"{model}, {base}", lambda m=model, b=base: _profiled(found, m, b))


def _profiled(found: Findings, model: str, base: str) -> dict[str, Any]:
    shape, tokens = shape_of(model, toy=found.toy), 64 if found.toy else 2048
    rows = [row for step in drawn_steps(tokens, WARM + PROFILED, 0, words=(3, 300)) for row in step]
    text = frozen_text(shape, found.device, found.dtype, base=base)
    config = settings_of(tokens, WARM + PROFILED, len(rows) // (WARM + PROFILED))
    text = initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0)
    examples = [example_of(row) for row in sorted(rows, key=lambda row: int(row.prompt))]
    training = silent_training(TextTask(text, examples, held_out=(), spec=config.train), config.train)
    for _ in range(WARM):
        training.step()
    on_gpu = found.device.type == "cuda"
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if on_gpu else [ProfilerActivity.CPU]
    found.synchronize()
    with profile(activities=activities) as seen:
        began = time.perf_counter()
        for _ in range(PROFILED):
            training.step()
        found.synchronize()
        wall = time.perf_counter() - began
    lines = [(each.key, _seconds(each, on_gpu), each.count) for each in seen.key_averages()]
    lines = sorted((line for line in lines if line[1] > 0), key=lambda line: -line[1])
    busy = sum(seconds for _, seconds, _ in lines)
    if not busy:
        return {"not_run": "torch's profiler saw no kernel: a container or its driver may not allow it (CUPTI)"}
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, seconds, _ in lines:
        kinds[next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "other")] += seconds
    return {
        "seconds_a_step": wall / PROFILED, "idle_share": max(0.0, 1 - busy / wall) if on_gpu else None,
        "launches_a_step": sum(count for _, _, count in lines) / PROFILED,
        "share_of_busy_time": {kind: seconds / busy for kind, seconds in kinds.items()},
        "longest": [{"kernel": name[:160], "seconds_a_step": seconds / PROFILED, "times": count / PROFILED}
                    for name, seconds, count in lines[:MOST]],
    }  # fmt: skip


def _seconds(each: Any, on_gpu: bool) -> float:
    """Of a kernel on the GPU: operators of the host, which the profiler lists too, have none of their own, and spans with a name
    (`Optimizer.step#AdamW.step`) are the time from their first kernel to their last."""
    if not on_gpu:
        return float(each.self_cpu_time_total) / 1e6
    own = getattr(each, "device_type", None)
    kernel = own is not None and own.name == "CUDA" and not each.is_user_annotation
    return float(each.self_device_time_total) / 1e6 if kernel else 0.0
