"""unsloth on the CPU as its documentation shows it; runs in an environment of its own, where Lorakeet is not installed."""

from __future__ import annotations

from typing import Any

from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip  (asks to be imported before all others)
from datasets import Dataset
from harness.steps import StepLog, contender
from harness.trainer import lora_settings, prompts_and_completions, train_with
from harness.workload import Workload
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


def train_unsloth(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps on 16-bit weights where this CPU has them (unsloth's own choice), "unsloth" checkpointing."""
    more = {"bf16": is_bfloat16_supported()}
    return trained(workload, prompts_and_completions(workload), longest=max(512, workload.longest), more=more)


def trained(workload: Workload, rows: dict[str, list[Any]], *, longest: int, more: dict[str, Any]) -> StepLog:
    """The workload's steps on a dataset of these columns, with `more` of the trainer's arguments, in NF4 if it says so."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=workload.model, max_seq_length=longest, dtype=None, load_in_4bit=workload.quantize == "nf4"
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
            train_dataset=Dataset.from_dict(rows),
            args=SFTConfig(**{**arguments, **more}),
        )

    return train_with(trainer, TrainerCallback, workload)


if __name__ == "__main__":
    contender(train_unsloth)
