"""Training steps of a transformers model with pairs of Lorakeet or of PEFT on it, in a process of its own: seconds and losses.

Both read the same adapter file, train with the same AdamW over the same tokens, and take the loss that transformers computes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.steps import installed
from torch import nn
from transformers import AutoModelForCausalLM


def attached(source: str, adapter: str, layers: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model in fp32 with the adapter, trainable, and what is trained."""
    net = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if layers == "lorakeet":
        import lorakeet as lk

        lk.attach(net, lk.Adapter.read(adapter))
        return net, lk.parameters(net)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(net, adapter, is_trainable=True)
    return theirs, [parameter for parameter in theirs.parameters() if parameter.requires_grad]


def steps(net: nn.Module, trained: Sequence[nn.Parameter], batches: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Seconds and loss of each step: forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.0)
    losses, seconds = [], []
    for rows in batches:
        ids = torch.tensor(rows)
        began = time.perf_counter()
        loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    return {"losses": losses, "seconds": seconds}


def main() -> None:
    given: Mapping[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    net, trained = attached(given["source"], given["adapter"], given["layers"])
    net.train()
    found = steps(net, trained, given["batches"])
    about = {"trained": sum(parameter.numel() for parameter in trained), "threads": torch.get_num_threads()}
    packages = installed(("torch", "transformers", "peft", "lorakeet"))
    Path(sys.argv[2]).write_text(json.dumps({**found, **about, "packages": packages}), encoding="utf-8")


if __name__ == "__main__":
    main()
