"""Evaluates saved adapters for benchmarks/finetune_vs_peft.py: their held-out loss, by the same code for every contender.

    python -m contenders.judge WORKLOAD RESULT FOLDER

FOLDER has a folder for each step, with an adapter by PEFT's names. Step 0, the base alone, is evaluated too, unless RESULT exists
from an earlier contender and has it. The adapter is merged into the weights, W + alpha/rank·B·A, and transformers computes with
these in fp32: no contender's own code is used.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from harness.trainer import ADAPTER
from harness.workload import Workload, read_workload
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from contenders.with_peft import parts, summed_loss

NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_A\.weight")


def main(workload: str, result: str, folder: str) -> None:
    known = json.loads(Path(result).read_text(encoding="utf-8"))["0"] if Path(result).exists() else None
    found = judged(read_workload(Path(workload)), Path(folder), base_loss=known)
    Path(result).write_text(json.dumps(found), encoding="utf-8")


def judged(workload: Workload, folder: Path, *, base_loss: float | None) -> dict[str, float]:
    """Nats a target, by the step after which the adapter was written."""
    model = AutoModelForCausalLM.from_pretrained(
        workload.model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2}
    base = {name: parameter.detach().clone() for name, parameter in weights.items()}
    found = {"0": held_out_loss(model, workload) if base_loss is None else base_loss}
    for step in sorted(int(each.name) for each in folder.iterdir()):
        deltas = changes(load_file(folder / str(step) / ADAPTER), workload.alpha / workload.rank)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(base[name])
            for path, delta in deltas.items():
                weights[f"{path}.weight"].add_(delta)
        found[str(step)] = held_out_loss(model, workload)
    return found


def changes(adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """scale·B·A of every module by its path in the model; SystemExit where there is anything but pairs."""
    paths = [found["path"] for found in map(NAME.fullmatch, adapter) if found]
    if 2 * len(paths) != len(adapter):
        raise SystemExit(f"{len(adapter)} tensors are not those of {len(paths)} pairs: {', '.join(sorted(adapter)[:4])} ...")
    names = {path: f"base_model.model.{path}.lora_" for path in paths}
    return {path: scale * adapter[f"{name}B.weight"].float() @ adapter[f"{name}A.weight"].float() for path, name in names.items()}


@torch.no_grad()
def held_out_loss(model: Any, workload: Workload) -> float:
    """The mean of −log p over the targets of the held-out rows."""
    total = sum(summed_loss(model, part).item() for part in parts(workload.held_out, workload.micro_tokens))
    return total / sum(len(row.targets) for row in workload.held_out)


if __name__ == "__main__":
    main(*sys.argv[1:])
