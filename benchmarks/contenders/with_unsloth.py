"""unsloth on the CPU as its documentation shows it; runs in an environment of its own, where Lorakeet is not installed."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from unsloth import FastLanguageModel, is_bfloat16_supported  # isort: skip  (asks to be imported before all others)
from datasets import Dataset
from harness.steps import StepLog, contender
from harness.trainer import arguments, clock, facts, prompts_and_completions, require_same_rows, start_from
from harness.workload import Workload
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


def train_unsloth(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps on 16-bit weights where this CPU has them (unsloth's own choice), "unsloth" checkpointing."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=workload.model, max_seq_length=max(512, workload.longest), dtype=None, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=workload.rank,
        target_modules=list(workload.target_modules),
        lora_alpha=workload.alpha,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=workload.seed,
    )
    log = StepLog()
    with TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict(prompts_and_completions(workload)),
            args=SFTConfig(**arguments(workload, folder), bf16=is_bfloat16_supported()),
            callbacks=[clock(TrainerCallback, log)],
        )
        require_same_rows(trainer.train_dataset, workload)
        start_from(trainer.model, workload)
        log.notes = facts(trainer)
        trainer.train()
    return log


if __name__ == "__main__":
    contender(train_unsloth)
