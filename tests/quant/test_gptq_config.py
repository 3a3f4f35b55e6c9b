"""The settings and tensors of GPTQ checkpoints: what is read, and how everything that does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.errors import ConfigError, DataError
from lorakeet.quant.gptq import PARTS, GptqBase
from lorakeet.quant.gptq_config import GptqConfig, base_from, gptq_mapping, layer_problems, parse
from lorakeet.quant.gptq_grid import groups_in_order, quantise_to_nearest

STORED: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    """The parts of a layer of 16 outputs and 64 inputs."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    base = GptqBase.of(*quantise_to_nearest(weight, 4, True, groups_in_order(64, 32), 2), bits=4, sym=True)
    return {**{part: base.get_buffer(part) for part in PARTS}, **changes}


def problems(parts: dict[str, Tensor], config: GptqConfig) -> list[str]:
    return layer_problems("q", {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}, config)


def test_the_settings_of_every_writer_are_read() -> None:
    assert parse(STORED, "x") == GptqConfig(4, 32)
    assert parse({**STORED, "checkpoint_format": "gptq_v2", "sym": False}, "x") == GptqConfig(4, 32, False, False, "gptq_v2")
    autogptq = {"bits": 3, "group_size": -1, "damp_percent": 0.01, "desc_act": True, "static_groups": False, "sym": True,
                "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}  # fmt: skip
    assert parse(autogptq, "x") == GptqConfig(3, -1, True)
    ours = gptq_mapping(GptqConfig(8, 128, True, False, "gptq_v2"), damping=0.01, version="1")
    assert parse(ours, "x") == GptqConfig(8, 128, True, False, "gptq_v2")


def test_everything_wrong_is_said_at_once() -> None:
    stored = {"bits": 5, "group_size": 0, "sym": "yes", "checkpoint_format": "marlin", "pack_dtype": "int16", "sparse": "2:4"}
    with pytest.raises(ConfigError) as caught:
        parse(stored, "config.json")
    for words in ("bits is 5; expected one of 2, 3, 4, 8", "group_size is 0", "sym is 'yes'", "'marlin'", "'int16'", "'sparse'"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="'marlin'"):
        parse({**STORED, "is_marlin_format": True}, "x")


def test_single_layers_may_differ() -> None:
    config = parse({**STORED, "dynamic": {"-:.*down": {}, "+:.*up": {"bits": 8}, ".*gate": {"group_size": -1}}}, "x")
    assert config.for_layer("a.down") is None and config.for_layer("a.q") == config
    up, gate = config.for_layer("a.up"), config.for_layer("a.gate")
    assert up is not None and up.bits == 8 and gate is not None and gate.group_size == -1
    with pytest.raises(ConfigError, match="changes 'lora'"):
        parse({**STORED, "dynamic": {"+:.*up": {"lora": 1}}}, "x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qweight": torch.zeros(8, 17, dtype=torch.int32)}, "'q.qweight' is int32 (8, 17), but 4 bits in groups of 32 need"),
        ({"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, "need int32 (2, 2)"),
        ({"scales": torch.zeros(1, 16, dtype=torch.float16)}, "need float16 (2, 16)"),
        ({"scales": torch.zeros(2, 16, dtype=torch.int32)}, "'q.scales' is int32"),
        ({"g_idx": torch.zeros(60, dtype=torch.int32)}, "do not fit"),
    ],
)
def test_each_tensor_that_does_not_fit_is_named(change: dict[str, Tensor], said: str) -> None:
    assert said in "\n".join(problems(tensors(**change), GptqConfig(4, 32)))
    assert problems(tensors(), GptqConfig(4, 32)) == []


def test_g_idx_may_be_missing_only_without_desc_act() -> None:
    parts = tensors()
    whole = base_from("q", parts, GptqConfig(4, 32)).dense()
    del parts["g_idx"]
    assert torch.equal(base_from("q", parts, GptqConfig(4, 32)).dense(), whole)
    assert problems(parts, GptqConfig(4, 32)) == []
    assert "'q.g_idx' is missing, and desc_act is true" in problems(parts, GptqConfig(4, 32, desc_act=True))[0]


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="names groups 0 to 7; there are 2"):
        base_from("q", tensors(g_idx=torch.arange(64, dtype=torch.int32) // 8), GptqConfig(4, 32))
    with pytest.raises(DataError, match="not finite"):
        base_from("q", tensors(scales=torch.full((2, 16), 1e9)), GptqConfig(4, 32))
