"""TRL's SFTTrainer with PEFT as TRL's documentation shows it: a model name, a prompt-completion dataset and a LoraConfig."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from datasets import Dataset
from harness.steps import StepLog, contender
from harness.trainer import arguments, clock, facts, prompts_and_completions, require_same_rows, start_from
from harness.workload import Workload
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


def train_trl(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps; bfloat16 is the trainer's `bf16` (TRL's default), float32 switches it off."""
    log = StepLog()
    with TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=workload.model,
            args=SFTConfig(**arguments(workload, folder), bf16=dtype == "bfloat16", use_cpu=True),
            train_dataset=Dataset.from_dict(prompts_and_completions(workload)),
            peft_config=LoraConfig(
                r=workload.rank,
                lora_alpha=workload.alpha,
                target_modules=list(workload.target_modules),
                lora_dropout=0.0,
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock(TrainerCallback, log)],
        )
        require_same_rows(trainer.train_dataset, workload)
        start_from(trainer.model, workload)
        log.notes = facts(trainer)
        trainer.train()
    return log


if __name__ == "__main__":
    contender(train_trl)
