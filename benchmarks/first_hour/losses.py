"""Stage c: the losses of the same steps on the CPU in fp32 and on the GPU, over the same weights, rows, A and B."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from contenders.packed_lorakeet import train_packed
from contenders.packed_workload import RANK, RATE, drawn_steps, lorakeet_on
from harness.made_up_model import write_model
from harness.workload import Workload
from plan_accuracy import published_shape

from first_hour.findings import Findings

MODEL = "HuggingFaceTB/SmolLM2-135M"
TOY: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 320, "head_dim": 16,
}  # fmt: skip
GAP = 0.05  # nats


def small_shape(*, toy: bool) -> dict[str, Any]:
    """The smallest published shape; in a rehearsal two narrow blocks of it."""
    return published_shape(MODEL, **(TOY if toy else {}))


def run(found: Findings) -> None:
    shape = small_shape(toy=found.toy)
    folder = write_model(shape, found.folder / "small", "cpu")
    tokens, steps = (64, 3) if found.toy else (512, 20)
    words = (3, shape["vocab_size"] - 1) if found.toy else (3, 4000)
    workload = Workload(
        model=str(folder), adapter="", rank=RANK, alpha=2.0 * RANK, target_modules=(), learning_rate=10 * RATE, clip_norm=1.0,
        betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, seed=0, micro_tokens=tokens, shuffled=True, instructed=False,
        training_rows=None, held_out=(), save_after=(), steps=drawn_steps(tokens, steps, 0, words=words),
    )  # fmt: skip
    there = str(found.device)
    dtype = str(found.dtype).removeprefix("torch.")
    for base in ("none", "nf4"):
        kept = replace(workload, quantize=base)
        word = "dense" if base == "none" else base
        mine = found.attempt(f"{word}, CPU, float32", lambda kept=kept: _losses(kept, "float32"))
        name, moved = f"{word}, GPU, {dtype}", replace(kept, device=there)
        theirs = found.attempt(name, lambda moved=moved: _losses(moved, dtype))
        if isinstance(mine, list) and isinstance(theirs, list):
            found.add(f"{name}: largest gap", max(abs(a - b) for a, b in zip(mine, theirs, strict=True)))
    found.attempt("fused modules", lambda: _fused(workload, there, dtype))


def _losses(workload: Workload, dtype: str) -> list[float]:
    return train_packed(workload, dtype).losses


def _fused(workload: Workload, device: str, dtype: str) -> dict[str, int]:
    """How many modules of each kind the model has; fused ones are named Fused…."""
    counts: dict[str, int] = {}
    for module in lorakeet_on(replace(workload, device=device), dtype=dtype).task.text.model.modules():
        counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts
