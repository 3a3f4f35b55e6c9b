"""Model folders: names found whatever the class calls them, and folders that cannot be a base named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakeet.errors import ConfigError, DataError
from lorakeet.merging.checkpoint import Checkpoint, copy_along, files_along, open_checkpoint

NAMES = [
    "model.layers.0.block_sparse_moe.experts.0.w1.weight", "model.layers.0.block_sparse_moe.gate.weight",
    "language_model.model.layers.0.q_proj.weight", "vision_tower.layers.0.q_proj.weight", "h.0.attn.c_attn.weight",
    "model.norm.weight", "lm_head.weight", "transformer.twice.weight", "model.twice.weight",
]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({name: torch.zeros(2, 3) for name in NAMES}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"vocab_size": 7, "model_type": "y"}}))
    return folder


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.experts.0.w1.weight", NAMES[0]),
        ("model.layers.0.mlp.gate.weight", NAMES[1]),
        ("model.language_model.layers.0.q_proj.weight", NAMES[2]),
        ("transformer.h.0.attn.c_attn.weight", NAMES[4]),
        ("twice.weight", None),
        ("layers.0.k_proj.weight", None),
        ("vision_tower.layers.0.k_proj.weight", None),
        ("orm.weight", None),
    ],
)
def test_names_are_found_under_other_wrappers(wanted: str, found: str | None, base: Path) -> None:
    assert open_checkpoint(base).find(wanted) == found


def test_settings_of_a_model_with_several_parts(base: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(base)
    assert (checkpoint.setting("model_type"), checkpoint.setting("vocab_size"), checkpoint.setting("none")) == ("x", 7, None)
    assert checkpoint.stored("lm_head.weight").shape == (2, 3)


def test_what_goes_along(base: Path, tmp_path: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "x.bin", "old.safetensors", "README.md", "y.index.json"):
        (base / name).write_text(name)
    (base / "additional_chat_templates" / "tools.jinja").write_text("t")
    (tmp_path / "out").mkdir()
    copy_along(files_along(base, None), tmp_path / "out")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()) == [
        "LICENSE", "additional_chat_templates/tools.jinja", "chat_template.jinja", "tokenizer.json",
    ]  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").write_text("own")
    names = {path.name: path.parent for path in files_along(base, run)}
    assert names["tokenizer.json"] == run and "chat_template.jinja" not in names and names["LICENSE"] == base


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("pickle", DataError, r"pytorch_model\.bin: pickle files, which are never opened"),
        ("quantised", ConfigError, r"quantised weights \(gptq\)"),
        ("cut", DataError, r"model\.safetensors is .* bytes long.*cut off"),
        ("missing", ConfigError, "is not a folder"),
        ("outside", DataError, r"files outside of its folder: \.\./x"),
        ("no map", DataError, "has no weight_map"),
        ("lost", DataError, "lists 1 tensors that their files do not have: ghost"),
        ("config", DataError, r"config\.json is not JSON"),
    ],
)
def test_bases_that_cannot_be_used(change: str, kind: type[Exception], message: str, base: Path) -> None:
    weights, index = base / "model.safetensors", base / "model.safetensors.index.json"
    if change == "pickle":
        weights.rename(base / "pytorch_model.bin")
    elif change == "quantised":
        (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif change == "missing":
        shutil.rmtree(base)
    elif change == "config":
        (base / "config.json").write_text("{")
    else:
        maps = {
            "outside": {"weight_map": {"a": "../x.safetensors"}},
            "no map": {},
            "lost": {"weight_map": {"ghost": weights.name}},
        }
        index.write_text(json.dumps(maps[change]))
    with pytest.raises(kind, match=message):
        open_checkpoint(base)
