"""`verification.merged_model`: what the certificates measure, and that they fail when something is wrong."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.peft import peft
from lorakeet.merging.merged_folder import merge_into
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.verification.merged_model import (
    StoredAs,
    WeightDifference,
    certify_merge,
    check_weights,
    difference,
    weight_differences,
)
from tiny.runs import quiet

SPEC = EvaluateSpec(resamples=100)


@pytest.fixture
def live(finished: Any) -> TextModel:
    return open_adapter(finished.path).text_model(quiet(), dtype="float32")


def merged(finished: Any, out: Path, **more: Any) -> TextModel:
    merge_into(finished.model, peft.read(finished.path / "adapter"), out, **more)
    return load_text_model(ModelSpec(str(out), dtype="float32", products="float32"))


def rows_of(finished: Any) -> Any:
    return finished.result.setup.held_out.examples


def test_a_faithful_merge_differs_by_nothing(finished: Any, live: TextModel, tmp_path: Path) -> None:
    whole = merged(finished, tmp_path / "merged")
    differences = weight_differences(live, NAME, whole)
    assert set(differences) == {name for name, _ in whole.model.named_parameters(remove_duplicate=False)}
    assert max(found.mean for found in differences.values()) < 1e-6 and max(found.row for found in differences.values()) < 1e-5
    found = certify_merge((live, NAME), whole, rows_of(finished), out=tmp_path / "merged", spec=SPEC)
    assert found.passed, found.checks


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_in_half_precision_is_compared_as_it_is_stored(
    finished: Any, live: TextModel, tmp_path: Path, dtype: str
) -> None:
    whole = merged(finished, tmp_path / "merged", dtype=dtype)
    assert StoredAs.of(whole).usual == dtype and whole.dtype == torch.float32
    assert all(found.mean < 1e-6 and found.row < 1e-5 for found in weight_differences(live, NAME, whole).values())


def test_equal_weights_under_other_settings_are_distinguished(finished: Any, live: TextModel, tmp_path: Path) -> None:
    merged(finished, tmp_path / "merged")
    config = tmp_path / "merged" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    other = load_text_model(ModelSpec(str(tmp_path / "merged"), dtype="float32"))
    found = certify_merge((live, NAME), other, rows_of(finished), out=tmp_path / "merged", spec=SPEC)
    assert [check.passed for check in found.checks] == [False, True]
    assert "the configuration or the tokenizer differs" in found.checks[0].detail


def test_a_weight_of_another_shape_or_with_a_hole_is_the_worst(finished: Any, live: TextModel, tmp_path: Path) -> None:
    whole = merged(finished, tmp_path / "merged")
    whole.model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    assert weight_differences(live, NAME, whole)["model.norm.weight"] == WeightDifference(math.inf, math.inf)
    whole.model.model.norm.weight = live.model.get_parameter("model.norm.weight")
    with torch.no_grad():
        whole.model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = math.nan
    check = check_weights(weight_differences(live, NAME, whole), between=("a", "b"))
    assert not check.passed and "model.layers.0.mlp.up_proj.weight" in check.detail
    certificate = Certificate("merged", (check,))
    certificate.write(tmp_path / "certificate.json")
    assert not read_certificate(tmp_path / "certificate.json").passed


def test_no_weight_at_all_is_no_pass() -> None:
    assert not check_weights({}, between=("a", "b")).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_row_of_a_large_matrix_is_found(dtype: torch.dtype) -> None:
    """Half of a pair's change is missing in one of 4,000 rows: the mean over the matrix hides it."""
    torch.manual_seed(0)
    weight, change = torch.randn(4000, 64), torch.randn(4000, 64) * 1e-2
    wanted = (weight + change).to(dtype).float()
    given = wanted.clone()
    given[1234] = (weight[1234] + change[1234] / 2).to(dtype).float()
    found = difference(given, wanted, dtype)
    check = check_weights({"model.up_proj.weight": found}, between=("a", "b"))
    assert found.mean < 1e-5 and found.row > 1e-3 and not check.passed
    assert check.exceeded() == ("row_difference",)
    assert check.detail.startswith("In one row of it: The worst layer is model.up_proj.weight")


@pytest.mark.parametrize("width", [4, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_in_another_order_pass(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    weight, A, B = torch.randn(2000, width) * 0.05, torch.randn(4, width) * 0.01, torch.randn(2000, 4)
    one, other = (weight + B @ A).to(dtype).float(), (weight.double() + B.double() @ A.double()).to(dtype).float()
    found = difference(one, other, dtype)
    assert width == 4 or not torch.equal(one, other)
    assert check_weights({"x": found}, between=("a", "b")).passed


def test_rows_of_zeros_are_no_difference() -> None:
    weight = torch.zeros(3, 4)
    weight[0] = 1.0
    assert difference(weight, weight, torch.float32) == WeightDifference(0.0, 0.0)


def test_a_model_in_several_shards_of_mixed_dtype_is_compared_as_it_is_stored(finished: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(finished.model, base)
    model = transformers.AutoModelForCausalLM.from_pretrained(finished.model)
    for parameter in model.model.layers.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="30kB")
    assert len(list(base.glob("*.safetensors"))) > 2
    opened = open_adapter(finished.path, base=str(base), uncertified=True)
    live = opened.text_model(quiet(), dtype="float32")
    merge_into(base, opened.adapter, tmp_path / "merged")
    whole = load_text_model(ModelSpec(str(tmp_path / "merged"), dtype="float32", products="float32"))
    stored = StoredAs.of(whole)
    assert stored.dtype("model.norm.weight") == torch.float32
    assert stored.dtype("model.layers.1.mlp.up_proj.weight") == torch.bfloat16
    found = certify_merge((live, NAME), whole, rows_of(finished), out=tmp_path / "merged", spec=SPEC)
    assert found.passed, found.checks
