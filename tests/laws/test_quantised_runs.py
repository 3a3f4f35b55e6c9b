"""Whole runs on quantised bases, from the settings to the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakeet.config import read_run
from lorakeet.errors import VerificationFailed
from lorakeet.evaluate.report.report import read_report
from lorakeet.evaluate.values import encode
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.verbs.evaluate import evaluate
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.merge import merge
from lorakeet.verbs.options import EvaluateOptions, FinetuneOptions, MergeOptions, QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.float_folders import fp8_folder
from tiny.runs import adapter_bytes, quiet, reviews, run, write_rows

SHORT = {"train.steps": "4", "train.evaluate_every": "2"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(60))


@pytest.fixture(scope="module")
def on_nf4(tiny_llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nf4") / "run"
    run(tiny_llama_folder, data, out, {"model.quantize": "nf4", **SHORT})
    return out


def passed(folder: Path) -> bool:
    return bool(json.loads((folder / "certificate.json").read_text())["passed"])


def test_a_run_on_nf4_is_certified_and_keeps_its_setting(on_nf4: Path) -> None:
    assert passed(on_nf4) and "method: nf4" in (on_nf4 / "config.yaml").read_text()
    tensors = load_file(on_nf4 / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(bool(tensor.any()) for tensor in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model.quantize": "int8", "lora.variant": "dora", "model.dtype": "bfloat16", "model.products": "float32"},
        {"model.quantize.method": "int8", "model.quantize.int8_products": "true"},
        {"model.quantize.method": "nf4", "model.quantize.block_size": "128", "lora.start": "pissa"},
        {"model.quantize": "nf4", "lora.target_modules": "q_proj,up_proj", "lora.scale_rule": "alpha/sqrt(rank)"},
    ],
    ids=lambda changes: " ".join(changes.values()),
)
def test_every_way_of_adapting_runs(changes: dict[str, Any], tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_llama_folder, data, tmp_path / "run", {**changes, "train.steps": "2"})
    assert passed(tmp_path / "run")


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bytes(on_nf4: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(on_nf4, again)
    shutil.rmtree(again / "checkpoints" / "step-000004")
    assert (again / "checkpoints" / "step-000002").is_dir()
    finetune(read_run(again / "config.yaml"), FinetuneOptions(resume=again), console=quiet())
    assert adapter_bytes(again) == adapter_bytes(on_nf4)
    name = "checkpoints/step-000004/trained.safetensors"
    assert (again / name).read_bytes() == (on_nf4 / name).read_bytes()


@pytest.mark.slow
def test_a_folder_in_nf4_trains_to_the_same_bytes_as_packing_while_loading(
    on_nf4: Path, tiny_llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    quantize(QuantizeOptions(str(tiny_llama_folder), method="nf4", out=tmp_path / "packed"), console=quiet())
    run(tmp_path / "packed", data, tmp_path / "run", SHORT)
    name = "adapter_model.safetensors"
    assert adapter_bytes(tmp_path / "run")[name] == adapter_bytes(on_nf4)[name]
    merged = merge(
        MergeOptions((str(tmp_path / "run"),), out=tmp_path / "merged", into="original"), console=quiet()
    )  # by its model card
    assert merged.certificate.passed and "base in nf4" in merged.to_mapping()["notes"][-1]
    assert merged.to_mapping()["into"]["base"] == "original"


@pytest.mark.slow
def test_a_run_on_a_published_fp8_folder_is_planned_certified_and_merged(
    tiny_llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    folder = fp8_folder(tiny_llama_folder, tmp_path / "fp8", block=(16, 16))
    run(folder, data, tmp_path / "run", SHORT)
    assert passed(tmp_path / "run")
    merged = merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "merged", into="dequantised"), console=quiet())
    assert merged.certificate.passed
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_the_merge_goes_into_the_unquantised_weights_and_says_so(on_nf4: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    merged = merge(MergeOptions((str(on_nf4),), out=tmp_path / "merged", into="original"), console=quiet())
    assert merged.certificate.passed and "base in nf4" in merged.notes[0]
    pair = load_file(on_nf4 / "adapter" / "adapter_model.safetensors")
    path = "model.layers.0.mlp.up_proj"
    A, B = (pair[f"base_model.model.{path}.lora_{which}.weight"] for which in "AB")
    weight = load_file(tiny_llama_folder / "model.safetensors")[f"{path}.weight"]
    found = load_file(tmp_path / "merged" / "model.safetensors")[f"{path}.weight"]
    torch.testing.assert_close(found, weight + 3 * B @ A)


def test_evaluate_measures_on_the_quantised_base(on_nf4: Path) -> None:
    measured, own = evaluate(EvaluateOptions(str(on_nf4)), console=quiet()).report, read_report(on_nf4 / "report.json")
    assert measured.systems and encode(measured.systems) == encode(own.systems)


def test_a_base_that_cuts_the_gradient_ends_the_run(
    tiny_llama_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with kernels that pack for inference for good: the loss still falls, as the last layer's pairs still learn."""
    monkeypatch.setattr(Nf4Base, "matmul_t", lambda self, grad: grad.new_zeros(len(grad), self.shape[1]))

    with pytest.raises(VerificationFailed, match=r"layers\.0\.self_attn\.q_proj"):
        run(tiny_llama_folder, data, tmp_path / "run", {"model.quantize": "nf4"})

