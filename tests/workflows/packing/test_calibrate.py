"""`lorakeet quantize --method gptq`: the folder that it writes is read back to the same numbers, and adapters train on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, DataError
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.workflows.options import QuantizeOptions
from lorakeet.workflows.packing.calibrate import write_gptq
from lorakeet.workflows.quantize import quantize
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, run, write_rows


def loaded(folder: Path) -> TextModel:
    spec = ModelSpec(path=str(folder), dtype="float32", products="float32", attention="eager")
    return load_text_model(spec, say=lambda line: None)


def bases_of(text: TextModel) -> dict[str, GptqBase]:
    return {path: module for path, module in text.model.named_modules() if isinstance(module, GptqBase)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(60))


@pytest.fixture(scope="module")
def made(tiny_llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made through the command line: 4 bits in groups of 16, symmetric."""
    out = tmp_path_factory.mktemp("gptq") / "made"
    words = ["quantize", str(tiny_llama_folder), "--method", "gptq", "--group-size", "16", "--calibration", str(data)]
    assert main([*words, "--out", str(out)]) == 0
    return out


def test_the_folder_has_the_standard_layout(made: Path, tiny_llama_folder: Path) -> None:
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True, "checkpoint_format": "gptq",
    }  # fmt: skip
    tensors, before = load_file(made / "model.safetensors"), load_file(tiny_llama_folder / "model.safetensors")
    down = "model.layers.1.mlp.down_proj"
    shapes = {part: (tensors[f"{down}.{part}"].dtype, tuple(tensors[f"{down}.{part}"].shape)) for part in ("qweight", "qzeros")}
    assert shapes == {"qweight": (torch.int32, (6, 32)), "qzeros": (torch.int32, (3, 4))}
    assert tensors[f"{down}.scales"].dtype == torch.float16 and tensors[f"{down}.g_idx"].tolist() == [c // 16 for c in range(48)]
    assert bool((tensors[f"{down}.qzeros"] == 0x77777777).all()), "zero point 8, kept as 7"
    kept = set(before) & set(tensors)
    assert all(torch.equal(before[name], tensors[name]) for name in kept)
    assert len(set(before) - kept) == 14 and all(name.endswith("proj.weight") for name in set(before) - kept)


def test_a_budget_changes_nothing_of_it_and_is_reported(
    made: Path, tiny_llama_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(tiny_llama_folder), "--method", "gptq", "--group-size", "16", "--calibration", str(data)]
    assert main([*words, "--out", str(out), "--memory", "12GiB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "planned of 12GiB for quantising" in said and "in use at most, of 12GiB allowed" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {path.name: path.read_bytes() for path in made.iterdir()}


@pytest.mark.parametrize(
    "layout",
    [
        GptqLayout(2, 16, True, True),
        GptqLayout(3, -1, False, False, "gptq_v2"),
        GptqLayout(8, 16, True, False, "gptq_v2"),
        GptqLayout(4, 16, False, False, "gptq"),
    ],
    ids=str,
)
def test_every_layout_is_read_back(layout: GptqLayout, data: Path, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source", intermediate_size=64, num_key_value_heads=4)
    options = QuantizeOptions(str(source), "gptq", tmp_path / "out", calibration=str(data), calibration_rows=40)
    _, errors = write_gptq(options, layout, quiet())
    dense, text = loaded(source), loaded(tmp_path / "out")
    bases = bases_of(text)
    assert len(bases) == len(errors) == 14 and {base.bits for base in bases.values()} == {layout.bits}
    allowed = {2: 0.9, 3: 0.5, 4: 0.2, 8: 0.02}[layout.bits]
    for path, base in bases.items():
        weight = dense.model.get_submodule(path.removesuffix(".base")).weight
        assert 0 < float((base.dense() - weight).norm() / weight.norm()) < allowed
        assert bool((base.g_idx.sort().values == base.g_idx).all()) or layout.desc_act


def test_training_reaches_every_adapter_tensor(made: Path, data: Path, tmp_path: Path) -> None:
    run(made, data, tmp_path / "run", {"train.steps": "4", "train.evaluate_every": "2"})
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(bool(tensor.any()) for tensor in tensors.values())
    assert json.loads((tmp_path / "run" / "certificate.json").read_text())["passed"]


def test_damaged_folders_are_refused_with_every_tensor(made: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(made, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"] = torch.zeros(5, 48, dtype=torch.float16)
    del tensors["model.layers.1.self_attn.q_proj.qzeros"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError) as caught:
        loaded(broken)
    assert "up_proj.scales' is float16 (5, 48)" in str(caught.value) and "q_proj.qzeros' is missing" in str(caught.value)


def test_the_settings_may_lie_in_a_file_of_their_own(made: Path, tmp_path: Path) -> None:
    older = shutil.copytree(made, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    settings = config.pop("quantization_config")
    (older / "config.json").write_text(json.dumps(config))
    (older / "quantize_config.json").write_text(json.dumps({key: settings[key] for key in ("bits", "group_size", "sym")}))
    ours, theirs = bases_of(loaded(older)), bases_of(loaded(made))
    assert len(ours) == 14 and all(torch.equal(base.dense(), theirs[path].dense()) for path, base in ours.items())


def test_wrong_settings_are_all_said_and_nothing_is_written(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError) as caught:
        quantize(
            QuantizeOptions(str(tiny_llama_folder), method="gptq", out=out, bits=5, group_size=0, head="quantize"),
            console=quiet(),
        )
    for words in ("--bits is 5", "--group-size is 0", "--head is quantize", "--calibration is missing"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="down_proj' has 48 inputs, no multiple of the group size 32"):
        quantize(
            QuantizeOptions(str(tiny_llama_folder), method="gptq", out=out, group_size=32, calibration=str(data)), console=quiet()
        )
    with pytest.raises(DataError, match="the widest layer has 48 inputs"):
        few = {"calibration": str(data), "calibration_rows": 1, "calibration_tokens": 20}
        quantize(QuantizeOptions(str(tiny_llama_folder), method="gptq", out=out, group_size=16, **few), console=quiet())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_is_not_packed_again(made: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds quantised weights \(gptq\)"):
        quantize(
            QuantizeOptions(str(made), method="gptq", out=tmp_path / "out", group_size=16, calibration=str(data)), console=quiet()
        )
