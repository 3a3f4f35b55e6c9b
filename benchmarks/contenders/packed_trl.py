"""TRL's SFTTrainer with PEFT on packed rows: padding-free where flash-attn is installed, chunked loss, NF4 by bitsandbytes."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from datasets import Dataset
from harness.steps import StepLog, contender
from harness.trainer import UNCUT, lora_settings, tokenised, train_with
from harness.workload import Workload
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


def train_trl(workload: Workload, dtype: str, *, recomputing: bool = True) -> StepLog:
    """The workload's steps in bf16, with gradient checkpointing as is TRL's default, or without."""
    flash = find_spec("flash_attn") is not None
    loaded: dict[str, Any] = {"dtype": "bfloat16", "attn_implementation": "flash_attention_2" if flash else "sdpa"}
    if workload.quantize == "nf4":
        loaded["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )

    def trainer(arguments: dict[str, Any]) -> SFTTrainer:
        return SFTTrainer(
            model=workload.model,
            args=SFTConfig(
                **arguments,
                **UNCUT,
                use_cpu=workload.device == "cpu",
                bf16=True,
                padding_free=flash,
                gradient_checkpointing=recomputing,
                model_init_kwargs=loaded,
            ),
            train_dataset=Dataset.from_dict(tokenised(workload)),
            peft_config=LoraConfig(**lora_settings(workload), task_type="CAUSAL_LM"),
        )

    return train_with(trainer, TrainerCallback, workload)


if __name__ == "__main__":
    contender(train_trl, keeping=partial(train_trl, recomputing=False))  # more memory, nothing computed twice
