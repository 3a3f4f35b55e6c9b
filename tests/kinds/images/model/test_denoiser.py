"""A UNet filled from its files, packed or not, and what is wrong with files that do not fit."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.kinds.images.model.denoiser import denoiser_files, load_denoiser, packing_of_denoiser
from lorakeet.kinds.images.model.diffusers_import import new_denoiser
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from tiny.images import noise_of, tiny_unet

NAME = "diffusion_pytorch_model.safetensors"


def packed(folder: Path, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_denoiser(denoiser_files(folder), new_denoiser, dtype, spec, say=lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_unet().save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.mark.parametrize("spec", [QuantSpec(method="int8"), QuantSpec(method="nf4", block_size=32)])
def test_it_computes_what_its_unpacked_weights_compute(folder: Path, spec: QuantSpec) -> None:
    model = packed(folder, spec)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert set(layers) == set(packing_of_denoiser(tiny_unet(), spec)) and not any(p.is_meta for p in model.parameters())
    assert not any(path.startswith("time_embedding") for path in layers) and any(path.endswith("to_q") for path in layers)
    same = tiny_unet()
    with torch.no_grad():
        for path, layer in layers.items():
            same.get_submodule(path).weight.copy_(layer.weight)
    assert (noise_of(model) - noise_of(same)).abs().max() < 1e-5
    assert (noise_of(model) - noise_of(tiny_unet())).abs().max() > 1e-5


def test_what_is_not_packed_has_the_requested_dtype(folder: Path) -> None:
    model = packed(folder, QuantSpec(method="int8"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not packing_of_denoiser(model, QuantSpec())


def test_one_tensor_of_the_file_is_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    reads = SafeFile.read

    def counted(file: SafeFile, name: str) -> torch.Tensor:
        alive.append(sum(tensor() is not None for tensor in given))
        found = reads(file, name)
        given.append(weakref.ref(found))
        return found

    monkeypatch.setattr(SafeFile, "read", counted)
    for spec in (QuantSpec(), QuantSpec(method="int8")):
        packed(folder, spec)
    assert len(alive) == 2 * len(tiny_unet().state_dict()) and max(alive) == 0


def test_shards_are_read(folder: Path, tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, other = packed(folder, QuantSpec(method="int8")), packed(tmp_path / "shards", QuantSpec(method="int8"))
    assert torch.equal(noise_of(one), noise_of(other))
    last = max((tmp_path / "shards").glob("*.safetensors"))
    kept = load_file(last)
    save_file({name: kept[name] for name in list(kept)[1:]}, last)
    with pytest.raises(DataError, match="lists 1 tensors that their files do not have"):
        denoiser_files(tmp_path / "shards")


def test_files_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = load_file(folder / NAME)
    tensors["extra.weight"] = torch.zeros(2)
    del tensors["conv_in.bias"]
    save_file(tensors, folder / NAME)
    with pytest.raises(
        DataError, match=r"2 problems[\s\S]*'conv_in\.bias' is missing[\s\S]*'extra\.weight' is \(2,\); expected none"
    ):
        packed(folder, QuantSpec(method="int8"))
