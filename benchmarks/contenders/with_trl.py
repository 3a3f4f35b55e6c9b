"""TRL's SFTTrainer with PEFT as TRL's documentation shows it: a model name, a prompt-completion dataset and a LoraConfig."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from harness.steps import StepLog, contender
from harness.trainer import lora_settings, prompts_and_completions, train_with
from harness.workload import Workload
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


def train_trl(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps; bfloat16 is the trainer's `bf16` (TRL's default), float32 switches it off."""

    def trainer(arguments: dict[str, Any]) -> SFTTrainer:
        return SFTTrainer(
            model=workload.model,
            args=SFTConfig(**arguments, bf16=dtype == "bfloat16", use_cpu=True),
            train_dataset=Dataset.from_dict(prompts_and_completions(workload)),
            peft_config=LoraConfig(**lora_settings(workload), task_type="CAUSAL_LM"),
        )

    return train_with(trainer, TrainerCallback, workload)


if __name__ == "__main__":
    contender(train_trl)
