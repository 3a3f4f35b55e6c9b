"""`formats.kohya_metadata`: what A1111 and kohya's tools read is there, is true, and stays what it was where a file said it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.formats.diffusion import kohya
from lorakeet.formats.files.base_model import open_base
from tiny.adapters import random_pair
from tiny.portable import image_adapter

BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
Q, K2, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", "unet.down_blocks.1.resnets.0.conv1"


def written(adapter: Adapter, path: Path, **more: Any) -> dict[str, str]:
    kohya.write(adapter, path, **more)
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def linear(width: int, rank: int = 4, alpha: float = 12.0) -> Pair:
    return dataclasses.replace(random_pair("linear", torch.ones(16, width), rank=rank), alpha=alpha)


def a1111s_version(metadata: dict[str, str]) -> str:
    """The rule of A1111's network.py (NetworkOnDisk.detect_version)."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if metadata.get("ss_v2") == "True" else "SD1" if metadata else "Unknown"


def hash_by_a1111(path: Path) -> str:
    """SHA-256 of all that follows the header, as A1111 and kohya's sd-scripts compute it of a file."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize(("width", "version"), [(768, ("SD1", "sd_v1")), (1024, ("SD2", "sd_v2"))])
def test_a_new_file_says_what_it_is(width: int, version: tuple[str, str], tmp_path: Path) -> None:
    adapter = Adapter({Q: linear(16), K2: linear(width)}, metadata={"sd_family": "sd1"})
    found = written(adapter, tmp_path / "a.safetensors")
    assert found == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "12.0",
        "ss_base_model_version": version[1],
        "ss_v2": str(version[0] == "SD2"),
        "sshs_model_hash": hash_by_a1111(tmp_path / "a.safetensors"),
    }
    assert a1111s_version(found) == version[0]


def test_sdxl_is_distinguished_from_sd1_which_a1111_assumes(tmp_path: Path) -> None:
    found = written(image_adapter(sdxl=True), tmp_path / "a.safetensors")
    assert found["ss_base_model_version"] == "sdxl_base_v1-0" and a1111s_version(found) == "SDXL"
    assert found["ss_network_dim"] == "Dynamic" and found["ss_output_name"] == "tiny"
    assert a1111s_version({"format": "pt"}) == "SD1"


def test_convolutions_and_dora_are_in_the_arguments(tmp_path: Path) -> None:
    conv = dataclasses.replace(random_pair("conv2d", torch.ones(16, 8, 3, 3), rank=2), alpha=12.0)
    found = written(Adapter({K2: linear(768), CONV: conv}), tmp_path / "a.safetensors")
    assert found["ss_network_dim"] == "4" and json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "12.0"}
    dora = written(image_adapter(dora=True), tmp_path / "b.safetensors")
    assert dora["ss_network_module"] == "lycoris.kohya" and json.loads(dora["ss_network_args"])["dora_wd"] == "True"


def test_a_version_that_nothing_tells_is_not_made_up(tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    config = tmp_path / "base" / "unet" / "config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "cross_attention_dim": 16}))
    adapter = Adapter({Q: linear(16)})
    assert "ss_v2" not in written(adapter, tmp_path / "a.safetensors", base=open_base(tmp_path / "base"))
    config.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "cross_attention_dim": 1024}))
    assert written(adapter, tmp_path / "b.safetensors", base=open_base(tmp_path / "base"))["ss_base_model_version"] == "sd_v2"


def test_what_a_file_said_stays_unless_its_tensors_contradict_it(tmp_path: Path) -> None:
    said = {"ss_network_module": "networks.dylora", "ss_base_model_version": "sd_v1_v"}
    said |= {"ss_network_alpha": "12", "ss_network_dim": "4"}
    adapter = Adapter({K2: linear(768)}, metadata=said)
    found = written(adapter, tmp_path / "a.safetensors")
    assert {key: found[key] for key in said} == said
    cut = Adapter({K2: linear(768, rank=2, alpha=6.0)}, metadata=said)
    found = written(cut, tmp_path / "b.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_network_module"]) == ("2", "6.0", "networks.dylora")


@pytest.mark.parametrize("options", [{}, {"sdxl": True}, {"dora": True}, {"clip": False}], ids=str)
def test_a_file_that_was_loaded_is_written_with_the_same_bytes(options: dict[str, bool], tmp_path: Path) -> None:
    kohya.write(image_adapter(**options), tmp_path / "a.safetensors")
    heard: list[str] = []
    kohya.write(kohya.read(tmp_path / "a.safetensors", say=heard.append), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert not heard, "a hash that is made anew is no loss"
