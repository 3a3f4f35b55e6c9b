"""PEFT in its best manual setting: a plain loop, little padding, sdpa, and the head on supervised positions only, in chunks.

What a careful user can do with PEFT and plain PyTorch: rows of one step are sorted by length and cut into parts of at most
`micro_tokens` tokens, padding included; padding is on the right, so causal attention needs no mask and sdpa takes its fast
path; the decoder runs without the head, and cross-entropy is computed from the few supervised hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from harness.steps import StepLog, contender
from harness.trainer import lora_settings, write_adapter
from harness.workload import Row, Workload
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

CHUNK = 256  # supervised positions that have logits at one time


def train_peft(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps with PEFT's modules; A and B stay in fp32, as PEFT does by default."""
    model = adapted_model(workload, torch.float32 if dtype == "float32" else torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=workload.learning_rate,
        betas=workload.betas,
        eps=workload.epsilon,
        weight_decay=workload.weight_decay,
        fused=True,
    )
    log = StepLog(
        notes={"weights": dtype, "products": dtype, "trained parameters": sum(parameter.numel() for parameter in trained)}
    )
    log.begin()
    for rows in workload.steps:
        targets = sum(len(row.targets) for row in rows)
        total = 0.0
        for part in parts(rows, workload.micro_tokens):
            loss = summed_loss(model.get_base_model(), part)
            (loss / targets).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, workload.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.step()
        log.losses.append(total / targets)
        log.save_adapter(workload, partial(write_adapter, model))
    return log


def adapted_model(workload: Workload, dtype: torch.dtype) -> Any:
    """The base with PEFT's adapter, which begins at the workload's A and B."""
    base = AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    model = get_peft_model(
        base,
        LoraConfig(**lora_settings(workload), task_type="CAUSAL_LM"),
    )
    set_peft_model_state_dict(model, load_peft_weights(workload.adapter, device="cpu"))
    return model.train()


def parts(rows: tuple[Row, ...], tokens: int) -> Iterator[list[Row]]:
    """The rows from long to short, in parts of at most `tokens` tokens with their padding."""
    part: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if part and (len(part) + 1) * len(part[0].ids) > tokens:
            yield part
            part = []
        part.append(row)
    yield part


def summed_loss(causal: Any, rows: list[Row]) -> Tensor:
    """The sum of −log p over the targets of the rows, from the longest to the shortest."""
    longest = len(rows[0].ids)
    padded = torch.tensor([list(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    places = [(number, target) for number, row in enumerate(rows) for target in row.targets]
    row_of, target_at = (torch.tensor(column) for column in zip(*places, strict=True))
    hidden = causal.model(input_ids=padded, use_cache=False).last_hidden_state[row_of, target_at - 1]  # (targets, hidden)
    wanted = padded[row_of, target_at]
    total = torch.zeros(())
    for start in range(0, len(wanted), CHUNK):
        part = slice(start, start + CHUNK)
        total = total + checkpoint(_chunk_loss, causal.lm_head, hidden[part], wanted[part], use_reentrant=False)
    return total


def _chunk_loss(head: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), wanted, reduction="sum")


if __name__ == "__main__":
    contender(train_peft)
