"""Reading and writing PEFT's folders, against the installed PEFT in both directions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.dense import fold_into
from tiny.models import tiny_model
from torch import nn

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats import peft as lorakeet_peft

IDS = torch.tensor([[1, 5, 9, 33, 60, 7, 90, 12]])
TOLERANCE = 1e-5


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
    peft = pytest.importorskip("peft")
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
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, folder)
    return loaded.eval()


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": ALL}),
    "rslora": ("llama", {}, {"target_modules": ALL, "use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {"target_modules": ALL, "rank_pattern": {r"layers\.1\..*_proj": 6, "q_proj": 2}, "alpha_pattern": {"self_attn.*": 20}},
    ),
    "rslora patterns": ("llama", {}, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "dora": ("llama", {}, {"target_modules": ALL, "use_dora": True}),
    "bias": ("qwen2", {}, {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}),
    "embedding": ("llama", {}, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "gemma embedding": ("gemma2", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "whole head": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "token rows": ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 90]}),
    "named token rows": ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 9, 90]}}),
    "tied token rows": ("qwen3", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 90]}),
    "some layers": ("llama", {}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 dora": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "bare experts": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
    "down experts": ("mixtral", {}, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "expert ranks": (
        "qwen3_moe",
        {},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "alpha_pattern": {"experts.down_proj": 20}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_writes(case: str, tmp_path: Path) -> None:
    family, changes, config = CASES[case]
    theirs = logits(by_peft(tmp_path, tiny_model(family, **changes), task_type="CAUSAL_LM", **config))
    base = tiny_model(family, **changes)
    before = logits(base)
    ours = logits(fold_into(base, lorakeet_peft.read(tmp_path)))
    assert (theirs - before).abs().max() > 1e-2
    assert (theirs - ours).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write(case: str, tmp_path: Path) -> None:
    family, changes, config = CASES[case]
    theirs = logits(by_peft(tmp_path / "theirs", tiny_model(family, **changes), task_type="CAUSAL_LM", **config))
    lorakeet_peft.write(lorakeet_peft.read(tmp_path / "theirs"), tmp_path / "ours")
    back = logits(into_peft(tiny_model(family, **changes), tmp_path / "ours"))
    assert (theirs - back).abs().max() <= TOLERANCE
