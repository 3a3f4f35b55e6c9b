"""Pairs of Lorakeet on a model that TRL's SFTTrainer trains. Needs: pip install 'lorakeet[trainers]'

python examples/trainers/trl_sft_trainer.py [MODEL] [OUT]        # a folder or hub id
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lorakeet as lk

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
out = sys.argv[2] if len(sys.argv) > 2 else "adapters/trl-sft-trainer"
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
net = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
rows = Dataset.from_list([{"prompt": f"{day} May 2026. Date:", "completion": f" 2026-05-{day:02}"} for day in range(1, 9)])

lk.attach(net, lk.Lora(rank=8, target_modules=("q_proj", "v_proj")))  # instead of SFTTrainer's peft_config
arguments = SFTConfig(
    f"{out}-checkpoints", num_train_epochs=3, per_device_train_batch_size=2, learning_rate=2e-3, report_to=[], save_strategy="no",
    logging_steps=1, lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(), bf16=False,
    gradient_checkpointing=False,
)  # fmt: skip
trainer = SFTTrainer(net, args=arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
lk.adapter_of(net, base=name).write(out)
