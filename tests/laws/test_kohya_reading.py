"""A file of kohya's format is read as sd-scripts and LyCORIS compute it, or refused: random files, some of them odd."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import DataError, LorakeetError
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.diffusion import kohya
from tiny.dense import folded
from tiny.fuzz import case_folder, fuzzed
from tiny.images import tiny_clip, tiny_unet
from tiny.kohya_oracle import NotComputed, weights_after

ENDS = ("to_q", "to_k", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj")
ODDITIES = [
    "no alpha", "alpha 0", "alpha of one in a list", "two alphas", "no up", "no down", "other rank", "bare name", "alpha.weight",
    "unknown module", "unknown tensor", "bias", "column lengths", "lengths in a row", "mid", "mid of another rank", "LoHa",
    "diff", "1x1 as a matrix", "second spelling", "upper case",
]  # fmt: skip


@cache
def modules() -> dict[str, tuple[str, Any]]:
    """Path and module by kohya's key: of a UNet whose modules are a part of SD 1.x's, and of CLIP."""
    torch.manual_seed(3)
    layers = (nn.Linear, nn.Conv2d)
    unet = {path: one for path, one in tiny_unet().named_modules() if isinstance(one, layers) and path.endswith(ENDS)}
    clip = {f"text_model.{path.removeprefix('text_model.')}": one for path, one in tiny_clip().named_modules()
            if isinstance(one, layers) and "encoder" in path}  # fmt: skip
    found = {f"lora_unet_{path.replace('.', '_')}": (f"unet.{path}", one) for path, one in unet.items()}
    return {**found, **{f"lora_te_{path.replace('.', '_')}": (f"text_encoder.{path}", one) for path, one in clip.items()}}


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    return {
        "keys": draw(st.lists(st.sampled_from(sorted(modules())), min_size=1, max_size=4, unique=True)),
        "ranks": draw(st.lists(st.integers(1, 4), min_size=4, max_size=4)),
        "alphas": draw(st.lists(st.sampled_from([1.0, 4.0, 0.5, -2.0, 8.0]), min_size=4, max_size=4)),
        "alpha": draw(st.sampled_from(["each"] * 4 + ["none"])),
        "dora": draw(st.sampled_from(["none"] * 3 + ["each", "first"])),
        "oddities": draw(st.lists(st.sampled_from(ODDITIES), max_size=2, unique=True)) if draw(st.booleans()) else [],
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        "network": draw(st.sampled_from([None, "networks.lora", "lycoris.kohya"])),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def tensors_of(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(case["seed"])
    found: dict[str, torch.Tensor] = {}
    for number, key in enumerate(case["keys"]):
        weight, rank = modules()[key][1].weight, case["ranks"][number]
        found[f"{key}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:]) * 0.3
        found[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2)) * 0.3
        if case["alpha"] == "each":
            found[f"{key}.alpha"] = torch.tensor(case["alphas"][number])
        if case["dora"] == "each" or (case["dora"] == "first" and not number):
            found[f"{key}.dora_scale"] = 1 + torch.rand(weight.shape[0], *[1] * (weight.dim() - 1))
    for oddity in case["oddities"]:
        change(found, case["keys"][0], case["ranks"][0], oddity)
    return {name: tensor.to(case["dtype"]).contiguous() for name, tensor in found.items()}


def change(found: dict[str, torch.Tensor], key: str, rank: int, oddity: str) -> None:
    """Makes the first module's tensors odd."""
    weight = modules()[key][1].weight
    kernel, ones = weight.shape[2:], [1] * (weight.dim() - 2)
    down, up, alpha = f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"
    other = f"lora_unet_{modules()[key][0].partition('.')[2].replace('_', '.').replace('.', '_')}x"
    made: dict[str, dict[str, torch.Tensor]] = {
        "alpha 0": {alpha: torch.tensor(0.0)}, "alpha of one in a list": {alpha: torch.tensor([2.0])},
        "two alphas": {alpha: torch.tensor([1.0, 2.0])}, "other rank": {up: torch.randn(weight.shape[0], rank + 1, *ones)},
        "unknown module": {f"{other}.lora_down.weight": torch.randn(rank, 4), f"{other}.lora_up.weight": torch.randn(4, rank)},
        "unknown tensor": {f"{key}.lora_gate.weight": torch.randn(3)},
        "bias": {f"{key}.lora_up.bias": torch.randn(weight.shape[0])},
        "column lengths": {f"{key}.dora_scale": 1 + torch.rand(1, weight.shape[1], *ones)},
        "lengths in a row": {f"{key}.dora_scale": 1 + torch.rand(weight.shape[0])},
        "mid": {f"{key}.lora_mid.weight": torch.randn(rank, rank, *kernel), down: torch.randn(rank, weight.shape[1], *ones)},
        "mid of another rank": {f"{key}.lora_mid.weight": torch.randn(rank, rank + 1, *kernel)},
        "LoHa": {f"{key}.hada_w1_a": torch.randn(weight.shape[0], 2)}, "diff": {f"{key}.diff": torch.randn(weight.shape)},
        "alpha.weight": {f"{alpha}.weight": torch.tensor(3.0)}, "1x1 as a matrix": {},
    }  # fmt: skip
    found.update(made.get(oddity, {}))
    if oddity in ("no alpha", "alpha.weight"):
        found.pop(alpha, None)
    elif oddity in ("no up", "no down"):
        found.pop(up if oddity == "no up" else down, None)
    elif oddity == "bare name" and down in found:
        found[f"{key}.lora_down"] = found.pop(down)
    elif oddity == "1x1 as a matrix" and up in found:
        found[up] = found[up].flatten(1)
    elif oddity == "second spelling" and down in found and up in found:
        found |= {f"{key.replace('lora_te_', 'lora_te1_')}.{side}": found[f"{key}.{side}"].clone()
                  for side in ("lora_down.weight", "lora_up.weight")}  # fmt: skip
    elif oddity == "upper case":
        found |= {name.replace(key, key.upper()): found.pop(name) for name in list(found) if name.startswith(f"{key}.")}


@pytest.mark.slow
@fuzzed(quick=150, many=20_000)
@given(case=cases())
def test_kohyas_files_are_computed_the_same_or_refused(case: dict[str, Any]) -> None:
    tensors = tensors_of(case)
    with case_folder() as folder:
        file = folder / "a.safetensors"
        save_file(tensors, file, metadata={"ss_network_module": case["network"]} if case["network"] else None)
        try:
            adapter = read_adapter(file, say=lambda line: None)
        except LorakeetError:
            event("kohya: refused")
            return
    named = {name.partition(".")[0] for name in tensors}  # the programs leave all other modules as they are
    changed = {key: (path, module) for key, (path, module) in modules().items() if key in named or path in adapter.pairs}
    try:
        theirs = weights_after(tensors, {key: module for key, (_, module) in changed.items()})
    except NotComputed:
        event("kohya: not computed by its own programs")
        return
    event("kohya: same")
    assert set(adapter.pairs) <= {path for path, _ in modules().values()}
    for key, (path, module) in changed.items():
        ours = folded(module.weight.detach(), adapter.pairs[path]) if path in adapter.pairs else module.weight.detach().double()
        torch.testing.assert_close(ours, theirs[key], rtol=1e-5, atol=1e-6)


def test_what_is_written_is_what_the_programs_compute(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pairs = {}
    for number, (path, module) in enumerate(modules().values()):
        shape, rank = module.weight.shape, 1 + number % 3
        A, B = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
        pairs[path] = Pair(A, B, (6.0, 0.0, 3.0)[number % 3], "conv2d" if len(shape) == 4 else "linear")
    for name, some in (("all", pairs), ("nothing", {path: pair for path, pair in pairs.items() if not pair.alpha})):
        kohya.write(Adapter(some, metadata={"sd_family": "sd1"}), tmp_path / f"{name}.safetensors")
        theirs = weights_after(load_file(tmp_path / f"{name}.safetensors"), {key: one for key, (_, one) in modules().items()})
        for key, (path, module) in modules().items():
            weight = module.weight.detach()
            ours = folded(weight, some[path]) if path in some else weight.double()
            torch.testing.assert_close(ours, theirs[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("slot", "tensor", "said"), [
    ("alpha", torch.tensor(0.0), "alpha is 0, which sd-scripts and LyCORIS read as the rank and other programs as no change"),
    ("lora_down", torch.ones(2, 16), "kind of tensor that is not known"),
    ("alpha.weight", torch.tensor(1.0), "kind of tensor that is not known"),
])  # fmt: skip
def test_what_programs_read_otherwise_is_refused_by_name(slot: str, tensor: torch.Tensor, said: str, tmp_path: Path) -> None:
    key = next(key for key, (_, module) in modules().items() if module.weight.shape == (16, 16))
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2), f"{key}.{slot}": tensor}
    if slot == "lora_down":
        del tensors[f"{key}.lora_down.weight"]
    save_file(tensors, tmp_path / "a.safetensors", metadata={"x": json.dumps(1)})
    with pytest.raises(DataError, match=said):
        read_adapter(tmp_path / "a.safetensors", say=lambda line: None)
