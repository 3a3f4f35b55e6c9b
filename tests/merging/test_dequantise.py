"""`merge.dequantise`: the dense numbers are those that a model computes with which was packed as it was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError
from lorakeet.merging.checkpoint import open_checkpoint
from lorakeet.merging.dequantise import open_dequantised, rounding_steps
from lorakeet.merging.merged_folder import merge_into
from lorakeet.models.modules import original_modules
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.verbs.options import QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, write_rows

SPECS = [QuantSpec("nf4"), QuantSpec("nf4", block_size=32, double_quant=False), QuantSpec("int8")]


def packed_weights(folder: Path, spec: QuantSpec) -> dict[str, torch.Tensor]:
    text = load_text_model(ModelSpec(str(folder), dtype="float32", quantize=spec), say=lambda said: None)
    return {f"{path}.weight": m.base.dense() for path, m in original_modules(text.model) if isinstance(m, PackedLinear)}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.method}-{spec.block_size}")
def test_a_merge_of_nothing_writes_what_the_packed_model_means(spec: QuantSpec, tiny_llama_folder: Path, tmp_path: Path) -> None:
    wanted = packed_weights(tiny_llama_folder, spec)
    before: Any = rounding_steps(tiny_llama_folder, spec)
    assert set(before) == set(wanted) and len(wanted) == 14
    merge_into(tiny_llama_folder, Adapter({}), tmp_path / "merged", before=before)
    base, merged = open_checkpoint(tiny_llama_folder), open_checkpoint(tmp_path / "merged")
    for name in base.home:
        old, new = (c.shards[c.home[name]].read(name) for c in (base, merged))
        assert torch.equal(new, wanted.get(name, old)), name
        assert torch.equal(new, old) is (name not in wanted)


def test_half_precision_is_packed_as_it_is_stored(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "base")
    merge_into(folder, Adapter({}), tmp_path / "half", dtype="bfloat16", tokenizer=folder)
    wanted = packed_weights(tmp_path / "half", QuantSpec("nf4"))
    merge_into(tmp_path / "half", Adapter({}), tmp_path / "merged", before=rounding_steps(tmp_path / "half", QuantSpec("nf4")))
    merged = open_checkpoint(tmp_path / "merged")
    for name, weight in wanted.items():
        assert torch.equal(merged.shards[merged.home[name]].read(name), weight.bfloat16())


@pytest.mark.parametrize("method", ["nf4", "int8", "gptq"])
def test_a_quantised_folder_is_seen_as_the_dense_model_of_it(method: Any, tiny_llama_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", reviews(20))
    layout = {"group_size": 16, "calibration": str(rows)} if method == "gptq" else {}
    quantize(QuantizeOptions(str(tiny_llama_folder), method=method, out=tmp_path / "packed", **layout), console=quiet())
    (tmp_path / "packed" / "quantize_config.json").write_text("{}")
    wanted = packed_weights(tmp_path / "packed", QuantSpec())
    merge_into(open_dequantised(tmp_path / "packed"), Adapter({}), tmp_path / "merged")
    base, merged = open_checkpoint(tiny_llama_folder), open_checkpoint(tmp_path / "merged")  # which refuses quantised folders
    assert set(merged.home) == set(base.home) and len(wanted) == 14
    for name in base.home:
        old, new = (c.shards[c.home[name]].read(name) for c in (base, merged))
        assert new.dtype == old.dtype and torch.equal(new, wanted.get(name, old)), name
    assert not (tmp_path / "merged" / "quantize_config.json").exists()
    text = load_text_model(ModelSpec(str(tmp_path / "merged"), dtype="float32"), say=lambda said: None)
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(text.model.get_parameter(up), wanted[up])


def test_a_dense_folder_is_not_taken_for_a_quantised_one(tiny_llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a quantised model folder"):
        open_dequantised(tiny_llama_folder)
