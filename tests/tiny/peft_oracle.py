"""Adapters written and loaded by the installed PEFT, and what tests compare them by."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

IDS = torch.tensor([[1, 5, 9, 33, 60, 7, 90, 12]])
TOLERANCE = 1e-5
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class TinyConvNet(nn.Module):
    """A convolution, an activation and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def by_peft(folder: Path, model: Any, randomise: bool = True, **config: Any) -> Any:
    """A PEFT model around `model` with random weights in every pair, saved to `folder`."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **config})).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if randomise and ("lora_" in name and "magnitude" not in name):
                    parameter.normal_(0, 0.1)
                elif randomise and ("magnitude" in name or "trainable_tokens_delta" in name or ".modules_to_save." in name):
                    parameter.mul_(1 + 0.3 * torch.rand(parameter.shape))
        wrapped.save_pretrained(folder)
    return wrapped


def into_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, folder)
    return loaded.eval()


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
