"""mlx-lm's folders: mlx-lm computes with ours what base and adapter compute, and its own are read right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.errors import ConfigError, DataError
from lorakeet.formats import mlx
from tiny.adapters import random_adapter
from tiny.dense import fold_into
from tiny.models import tiny_model
from tiny.peft_oracle import IDS, logits
from tiny.portable import image_adapter, text_adapter

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("options", [{"mixed": False}, {}, {"dora": True}], ids=["plain", "mixed", "dora"])
def test_mlx_lm_computes_what_base_and_adapter_compute(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="mlx is built for macOS and Linux only")
    from mlx_lm.tuner.utils import load_adapters

    from tiny.mlx_llama import mlx_llama, mlx_logits

    adapter = text_adapter(**options)
    mlx.write(adapter, tmp_path / "adapter")
    model = mlx_llama()
    before = mlx_logits(model, IDS.numpy())
    after = mlx_logits(load_adapters(model, str(tmp_path / "adapter")), IDS.numpy())
    expected = logits(fold_into(tiny_model("llama"), adapter)).numpy()
    assert np.abs(after - before).max() > 0.1
    assert np.abs(after - expected).max() <= 2e-5


def test_reads_what_mlx_lm_wrote() -> None:
    adapter = mlx.read(GOLDEN / "mlx")
    expected = load_file(GOLDEN / "mlx.delta.safetensors")
    assert adapter.pairs.keys() == expected.keys() and adapter.base == "tiny"
    for path, delta in expected.items():
        torch.testing.assert_close(adapter.pairs[path].delta(), delta, atol=1e-6, rtol=1e-5)


def test_a_scale_that_is_no_fraction_of_its_rank_survives(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model("llama"), "q_proj", rank=3, alpha=0.3)
    mlx.write(adapter, tmp_path / "one")
    mlx.write(mlx.read(tmp_path / "one"), tmp_path / "two")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 0.1
    assert (tmp_path / "one" / "adapter_config.json").read_bytes() == (tmp_path / "two" / "adapter_config.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_parameters": {"rank": 4}}, r"lora_parameters\.scale is None; expected a finite number"),
        ({"lora_parameters": {"rank": 4, "alpha": 12}}, r"Its 'alpha' is no key of mlx-lm"),
        ({"lora_parameters": None}, r"scale is None"),
        ({"lora_parameters": {"scale": float("nan")}}, r"scale is nan; expected a finite number"),
        ({"lora_parameters": {"scale": float("-inf")}}, r"scale is -inf; expected a finite number"),
        ({"lora_parameters": {"scale": 10**400}}, r"scale is 10{59}…; expected a finite number"),
        ({"num_layers": None}, r"num_layers is None; expected a whole number"),
        ({"lora_parameters": {"scale": 2, "keys": ["mlp.up_proj"]}}, r"keys leaves out 2 modules with a pair, such as model\."),
        ({"lora_parameters": {"scale": 2, "keys": "q_proj"}}, r"keys is 'q_proj'; expected a list of names"),
        ({"fine_tune_type": "dora"}, r"q_proj has no m, DoRA's magnitude, and fine_tune_type is 'dora'"),
        ({"fine_tune_type": "full"}, r"fine_tune_type is 'full'; only 'lora' and 'dora' are adapters"),
    ],
)
def test_configurations_that_leave_the_scale_open_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "mlx", tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match=message):
        mlx.read(tmp_path / "bad")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "lora"}, "q_proj has an m, DoRA's magnitude, and fine_tune_type is 'lora'"),
        ({"num_layers": 1}, r"num_layers is 1, but adapters\.safetensors has pairs in 2 layers"),
    ],
)
def test_settings_that_leave_tensors_out_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    mlx.write(random_adapter(tiny_model("llama"), "q_proj", dora=True), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(DataError, match=message):
        mlx.read(tmp_path)


def test_tensors_that_make_no_pair_are_all_named(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "mlx", tmp_path / "bad")
    tensors = load_file(GOLDEN / "mlx" / "adapters.safetensors")
    first, second, *_ = sorted({name.rpartition(".")[0] for name in tensors})
    tensors[f"{first}.lora_a"] = torch.ones(2, 3, 4)
    del tensors[f"{second}.lora_b"]
    tensors["model.norm.weight"] = torch.full((2,), float("inf"))
    save_file(tensors, tmp_path / "bad" / "adapters.safetensors")
    with pytest.raises(DataError) as caught:
        mlx.read(tmp_path / "bad")
    for words in ("lora_a (2, 3, 4)", f"{second} has lora_a but no lora_b", "model.norm.weight has NaN", "not known here"):
        assert words in str(caught.value)


def test_what_mlx_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"belong to an image model \(unet\."):
        from lorakeet.core.adapter import Adapter

        images = image_adapter(clip=False)
        mlx.write(Adapter({path: pair for path, pair in images.pairs.items() if pair.kind == "linear"}), tmp_path / "a")
    with pytest.raises(ConfigError, match="kind conv1d"):
        mlx.write(random_adapter(tiny_model("gpt2")), tmp_path / "a")
    assert not (tmp_path / "a").exists()
