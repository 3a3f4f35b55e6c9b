"""Small models whose decoder blocks train, each in one call of C."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakeet.core.fused.trained_block import TrainedBlock
from lorakeet.core.spec import LoraSpec
from lorakeet.kernels import choose
from lorakeet.kernels.cpu import dense, int8_rows
from lorakeet.models import modules
from lorakeet.models.files.quantized import packable
from lorakeet.models.fuse import fuse_blocks
from lorakeet.models.inject import trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq import GptqBase, quantise_to_nearest
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase, PackedLinear

LORA = LoraSpec(rank=5, alpha=10.0)
SHAPE = {
    "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 160,
    "num_hidden_layers": 2,
}  # fmt: skip


def use_c_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are computed in C also on a processor with AMX, where oneDNN would compute them."""
    monkeypatch.setattr(dense, "multiplies", lambda: True)
    monkeypatch.setattr(choose, "CANDIDATES", {})
    monkeypatch.setattr(int8_rows, "AMX", "no such feature")


def load(folder: Path, lora: LoraSpec = LORA, names: tuple[str, ...] = ("default",), kind: str = "") -> TextModel:
    """With blocks that train, and B's that are not zero; over packed weights of that kind."""
    text = load_text_model(ModelSpec(path=str(folder), dtype="bfloat16", device="cpu"))
    for path, module in packable(text.model, head=False).items() if kind else ():
        if not (kind == "mixed" and path.endswith(("q_proj", "up_proj"))):
            modules.replace(text.model, path, PackedLinear(packed(module.weight, kind, path), module.bias))
    for number, name in enumerate(names):
        initialise_adapter(text, plan_for(text.model, lora, text.family), seed=number, name=name)
        generator = torch.Generator().manual_seed(number)
        for key, parameter in trained_parameters(text.model, name).items():
            parameter.requires_grad_(True)
            if key.endswith(".B"):
                parameter.data.normal_(0, 0.05, generator=generator)
    fuse_blocks(text.model, text.family, TrainedBlock)
    text.model.train()
    return text


def packed(weight: Tensor, kind: str, path: str) -> PackedBase:
    if kind in ("nf4", "mixed") and not path.endswith("o_proj"):
        return Nf4Base.of(weight)
    if kind in ("int8", "mixed"):
        return Int8Base.of(weight)
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // 32
    codes, grid = quantise_to_nearest(weight.float(), 4, False, groups, int(groups.max()) + 1)
    return GptqBase.of(codes, grid, bits=4, sym=False)


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 1
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
