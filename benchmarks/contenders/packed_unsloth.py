"""unsloth on packed rows, as its documentation has it; runs in an environment of its own, where Lorakeet is not installed."""

from __future__ import annotations

from typing import Any

from unsloth import FastLanguageModel  # isort: skip  (asks to be imported before all others)
from datasets import Dataset
from harness.steps import StepLog, contender
from harness.trainer import lora_settings, packed_arguments, tokenised, train_with
from harness.workload import Workload
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


def train_unsloth(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps in bf16 or NF4, "unsloth" checkpointing."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=workload.model,
        max_seq_length=workload.micro_tokens,
        dtype=None,
        load_in_4bit=workload.quantize == "nf4",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **lora_settings(workload),
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=workload.seed,
    )

    def trainer(arguments: dict[str, Any]) -> SFTTrainer:
        return SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict(tokenised(workload)),
            args=SFTConfig(**packed_arguments(arguments), bf16=True),
        )

    return train_with(trainer, TrainerCallback, workload)


if __name__ == "__main__":
    contender(train_unsloth)
