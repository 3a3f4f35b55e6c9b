"""TRL's steps of preference_vs_trl: a trainer as documented, or at its best: bf16 weights, the reference computed once."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from harness.steps import StepLog, installed, peak_bytes
from harness.trainer import start_from
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


class Prepared:
    """Takes token ids as they are, so that both trainers see the same."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class Pairs(Prepared, DPOTrainer):  # type: ignore[misc]
    pass


class Rated(Prepared, KTOTrainer):  # type: ignore[misc]
    pass


class AnswersAlone(ORPOTrainer):  # type: ignore[misc]
    """Takes token ids as they are, and leaves the prompt out of the loss of the chosen answer, each of which weighs the same."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        prompt, found = feature["prompt_ids"], {}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            ids = [*prompt, *answer]
            found[f"{side}_input_ids"], found[f"{side}_attention_mask"] = ids, [1] * len(ids)
            found[f"{side}_labels"] = [-100] * len(prompt) + list(answer)
        return {**found, "prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        found = super().concatenated_forward(model, batch)
        return (*found[:4], -found[0].mean(), *found[5:])


def trainer_for(objective: str, best: bool, **given: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer, its configuration with the settings `given`, and what the dataset's columns are called."""
    if objective == "orpo":
        return AnswersAlone, ORPOConfig(max_length=1 << 20, remove_unused_columns=False, **given), {}
    kind, config, names = Pairs, DPOConfig, {}
    if objective == "kto":
        kind, config = Rated, KTOConfig
        names = {"chosen_ids": "completion_ids", "rejected_ids": "KL_completion_ids", "wanted": "label"}
    given |= {"max_length": None, "precompute_ref_log_probs": best}
    return kind, config(**given), names


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds and loss of each step, seconds before the first one, and the peak."""
    log, best = StepLog(), asked["best"]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            log.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                log.losses.append(float(logs["loss"]))

    dtype = torch.bfloat16 if best and asked["dtype"] == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype)
    pairs = len(asked["steps"][0])
    at_once = min(pairs, 8)  # TRL's default
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        kind, config, names = trainer_for(
            asked["objective"], best,
            output_dir=folder, per_device_train_batch_size=at_once, gradient_accumulation_steps=pairs // at_once,
            max_steps=len(asked["steps"]), learning_rate=asked["learning_rate"], lr_scheduler_type="constant",
            max_grad_norm=1.0, beta=asked["beta"], logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            train_sampling_strategy="sequential", bf16=asked["dtype"] == "bfloat16", use_cpu=True,
            gradient_checkpointing=not best,
        )  # fmt: skip
        rows = Dataset.from_list([pair for step in asked["steps"] for pair in step])
        trainer = kind(
            model=model, processing_class=AutoTokenizer.from_pretrained(asked["model"]), args=config,
            train_dataset=rows.rename_columns(names),
            peft_config=LoraConfig(
                r=asked["rank"], lora_alpha=asked["alpha"], lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )  # fmt: skip
        start_from(trainer.model, SimpleNamespace(adapter=asked["adapter"]))  # type: ignore[arg-type]
        trainer.add_callback(Clock())
        before = time.perf_counter() - started
        trainer.train()
    return {
        "seconds": log.seconds, "losses": log.losses, "seconds_of_reference": before,
        "peak_bytes": max(log.loaded_bytes, peak_bytes()), "packages": installed(PACKAGES),
    }  # fmt: skip


if __name__ == "__main__":
    given, result = (Path(name) for name in sys.argv[1:])
    result.write_text(json.dumps(measured(json.loads(given.read_text(encoding="utf-8")))), encoding="utf-8")
