"""Pairs of Lorakeet on a model of transformers, in a loop of your own.

python examples/trainers/plain_loop.py [MODEL] [OUT]        # a folder or hub id
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakeet as lk

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
out = sys.argv[2] if len(sys.argv) > 2 else "adapters/plain-loop"
tokenizer = AutoTokenizer.from_pretrained(name)
net = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
texts = [f"{day} May 2026. Date: 2026-05-{day:02}" for day in range(1, 9)]
rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]

print(lk.attach(net, lk.Lora(rank=8, target_modules=("q_proj", "v_proj"))))
optimizer = torch.optim.AdamW(lk.parameters(net), lr=2e-3)
losses = []
for _ in range(3):
    for ids in rows:
        loss = net(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
lk.adapter_of(net, base=name).write(out)
lk.detach(net)  # the model as it was, bit for bit
