"""Pairs of Lorakeet on a model that the Trainer of transformers trains.

python examples/trainers/transformers_trainer.py [MODEL] [OUT]        # a folder or hub id
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lorakeet as lk

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
out = sys.argv[2] if len(sys.argv) > 2 else "adapters/transformers-trainer"
tokenizer = AutoTokenizer.from_pretrained(name)
net = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
texts = [f"{day} May 2026. Date: 2026-05-{day:02}" for day in range(1, 9)]
rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text).input_ids for text in texts)]

lk.attach(net, lk.Lora(rank=8, target_modules=("q_proj", "v_proj")))  # freezes the rest, so that the Trainer trains the pairs
arguments = TrainingArguments(
    f"{out}-checkpoints", num_train_epochs=3, per_device_train_batch_size=1, learning_rate=2e-3, report_to=[], save_strategy="no",
    logging_steps=1, lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = Trainer(net, arguments, train_dataset=rows)
trainer.train()
losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
lk.adapter_of(net, base=name).write(out)
