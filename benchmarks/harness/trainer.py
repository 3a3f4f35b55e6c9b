"""What the contenders that use TRL's SFTTrainer share: dataset, arguments, clock, training. Imports no trainer itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.steps import StepLog
from harness.workload import Workload

UNCUT: dict[str, Any] = {"max_length": None}  # for packed rows: a padding-free trainer takes no length to cut at
ADAPTER = "adapter_model.safetensors"  # PEFT's name for it


def train_with(trainer_for: Callable[[dict[str, Any]], Any], callback: type, workload: Workload) -> StepLog:
    """Trains the workload with the trainer that `trainer_for` makes of the shared arguments; `callback` is TrainerCallback."""
    log = StepLog(gpu=workload.device == "cuda")
    with TemporaryDirectory() as folder:
        trainer = trainer_for(arguments(workload, folder))
        trainer.add_callback(clock(callback, log, workload))
        require_same_rows(trainer.train_dataset, workload)
        start_from(trainer.model, workload)
        log.notes = facts(trainer)
        trainer.train()
    return log


def lora_settings(workload: Workload) -> dict[str, Any]:
    """The workload's pairs in the words that PEFT and unsloth share."""
    return {
        "r": workload.rank,
        "lora_alpha": workload.alpha,
        "target_modules": list(workload.target_modules),
        "lora_dropout": 0,
    }


def prompts_and_completions(workload: Workload) -> dict[str, list[str]]:
    """The columns of a prompt-completion dataset, whose completions alone are targets by default."""
    return {
        "prompt": [row.prompt for row in workload.rows],
        "completion": [row.completion for row in workload.rows],
    }


def tokenised(workload: Workload) -> dict[str, list[list[int]]]:
    """The columns of a dataset that is tokenised already, -100 where there is no target."""
    targets = [set(row.targets) for row in workload.rows]
    return {
        "input_ids": [list(row.ids) for row in workload.rows],
        "labels": [
            [token if place in places else -100 for place, token in enumerate(row.ids)]
            for row, places in zip(workload.rows, targets, strict=True)
        ],
    }


def arguments(workload: Workload, folder: str) -> dict[str, Any]:
    """What both runs must have equal. Everything else is left at the library's default, gradient checkpointing included."""
    at_once = min(workload.rows_at_once or workload.batch_size, workload.batch_size)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": workload.batch_size // at_once,
        "max_steps": len(workload.steps),
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": workload.clip_norm,
        "adam_beta1": workload.betas[0],
        "adam_beta2": workload.betas[1],
        "adam_epsilon": workload.epsilon,
        "weight_decay": workload.weight_decay,
        "train_sampling_strategy": "sequential",
        "seed": workload.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def clock(base: type, log: StepLog, workload: Workload) -> Any:
    """A TrainerCallback (its class is `base`) that hands steps and losses to the log, and now and then writes the adapter."""

    class Clock(base):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            log.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            log.step()
            log.save_adapter(workload, lambda folder: write_adapter(more["model"], folder))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                log.losses.append(float(logs["loss"]))

    return Clock()


def require_same_rows(dataset: Any, workload: Workload) -> None:
    """SystemExit where the trainer's own tokenizing gave other ids or other targets than the workload's."""
    for number, (theirs, row) in enumerate(zip(dataset, workload.rows, strict=True)):
        if list(theirs["input_ids"]) != list(row.ids):
            raise SystemExit(f"Row {number}: the trainer has the ids {theirs['input_ids']}, the workload {list(row.ids)}.")
        mask = theirs["completion_mask"] if "completion_mask" in theirs else [label != -100 for label in theirs["labels"]]
        if [place for place, value in enumerate(mask) if value] != list(row.targets):
            raise SystemExit(f"Row {number}: the trainer learns other tokens than the workload's {list(row.targets)}.")


def start_from(model: Any, workload: Workload) -> None:
    """Puts the workload's A and B into a PEFT model, so that its losses can be compared step by step."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(workload.adapter, device="cpu"))


def write_adapter(model: Any, folder: Path) -> None:
    """A PEFT model's A and B, by PEFT's names."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    found = get_peft_model_state_dict(model)
    save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, folder / ADAPTER)


def facts(trainer: Any) -> dict[str, object]:
    """What the library made of the settings."""
    parameters = list(trainer.model.parameters())
    return {
        "weights": str(next(each.dtype for each in parameters if not each.requires_grad)).removeprefix("torch."),
        "products": "bfloat16" if trainer.args.bf16 else "float32",
        "gradient checkpointing": trainer.args.gradient_checkpointing,
        "rows lie": "flat" if getattr(trainer.data_collator, "padding_free", False) else "padded",
        "trained parameters": sum(each.numel() for each in parameters if each.requires_grad),
    }
