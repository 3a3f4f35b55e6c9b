"""diffusers' files: diffusers computes with ours what base and adapter compute; its own are read right in three spellings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.compare import compare_adapters
from lorakeet.formats.diffusion import diffusers, kohya
from tiny.images import fold_images, load_into, noise_of, sd_adapter, states_of, tiny_clip, tiny_unet
from tiny.portable import image_adapter, text_adapter

GOLDEN = Path(__file__).parents[2] / "golden"
Writer = Callable[[Adapter, Path], None]


@pytest.mark.parametrize(
    ("write", "dora"),
    [(diffusers.write, False), (diffusers.write, True), (kohya.write, False)],  # diffusers leaves out dora_scale of kohya's
    ids=["diffusers", "diffusers dora", "kohya"],
)
def test_diffusers_computes_what_base_and_adapter_compute(write: Writer, dora: bool, tmp_path: Path) -> None:
    unet, clip = tiny_unet(), tiny_clip()
    before = noise_of(unet), states_of(clip)
    adapter = sd_adapter(unet, clip, dora=dora)
    if dora:  # transformers adds the pairs of the text encoder, without DoRA
        adapter = Adapter({path: pair for path, pair in adapter.pairs.items() if path.startswith("unet.")})
    write(adapter, tmp_path / "a.safetensors")
    load_into(tmp_path / "a.safetensors", unet, None if dora else clip)
    after = noise_of(unet), states_of(clip)
    folded, text = tiny_unet(), tiny_clip()
    fold_images(adapter, folded, text)
    for ours, theirs, without in zip((noise_of(folded), states_of(text)), after, before, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5
        assert dora or (theirs - without).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["diffusers", "kohya", "diffusers_spelled"])
def test_reads_what_diffusers_wrote(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    adapter = kohya.read(path) if name == "kohya" else diffusers.read(path)
    trained = diffusers.read(GOLDEN / "diffusers.safetensors")
    expected = load_file(GOLDEN / "sd.delta.safetensors")
    assert adapter.pairs.keys() == expected.keys()
    for module, delta in expected.items():
        scale = trained.pairs[module].scale if name == "diffusers_spelled" else 1.0  # that file has no alpha, so scale 1
        torch.testing.assert_close(adapter.pairs[module].delta() * scale, delta, atol=1e-5, rtol=1e-5)
    assert {pair.rank for pair in adapter.pairs.values()} == {2, 4}


def test_mixed_ranks_without_alpha_have_scale_one_each(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "diffusers.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    assert {pair.scale for pair in diffusers.read(tmp_path / "bare.safetensors").pairs.values()} == {1.0}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("unet.a.to_q.lora_A.weight", ("unet.a.to_q", "A")),
        ("unet.a.to_q.lora.up.weight", ("unet.a.to_q", "B")),
        ("unet.a.attn1.processor.to_out_lora.down.weight", ("unet.a.attn1.to_out.0", "A")),
        ("unet.a.attn1.processor.to_k_lora.up.weight", ("unet.a.attn1.to_k", "B")),
        ("text_encoder.t.self_attn.to_q_lora.up.weight", ("text_encoder.t.self_attn.q_proj", "B")),
        ("text_encoder.t.self_attn.to_out_lora.down.weight", ("text_encoder.t.self_attn.out_proj", "A")),
        ("text_encoder_2.t.fc1.lora_linear_layer.down.weight", ("text_encoder_2.t.fc1", "A")),
        ("unet.a.to_q.lora_magnitude_vector.weight", ("unet.a.to_q", "magnitude")),
        ("unet.a.to_q.alpha", ("unet.a.to_q", "alpha")),
        ("unet.a.to_q.weight", None),
    ],
)
def test_every_spelling_of_a_key(key: str, expected: tuple[str, str] | None) -> None:
    assert diffusers.parse_key(key) == expected


def bare(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    """A small good file, with tensors replaced, added, or (None) taken out."""
    tensors: dict[str, torch.Tensor] = {}
    for module in ("unet.mid_block.resnets.0.conv1", "unet.mid_block.resnets.1.conv1"):
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = torch.ones(2, 4, 3, 3), torch.ones(4, 2, 1, 1)
    for name, value in changes.items():
        key = name if "." in name else f"unet.mid_block.resnets.0.conv1.{name}"
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": torch.tensor(3.0)}, r"resnets\.1\.conv1 has no alpha, and other modules have one"),
        ({"lora_B.weight": None, "unet.mid_block.resnets.0.conv1.lora_B.weight": None}, r"has A but no lora_B"),
        ({"unet.mid_block.resnets.0.conv1.lora_A.weight": torch.ones(3, 4, 3, 3)}, r"has A \(3, 4, 3, 3\) and B \(4, 2, 1, 1\)"),
        ({"unte.a.to_q.lora_A.weight": torch.ones(2, 2)}, r"begins with no component; expected one of unet, text_encoder"),
        ({"unet.a.weight": torch.ones(2, 2)}, r"unet\.a\.weight \(2, 2\) is a kind of tensor that is not known here"),
        ({"unet.mid_block.resnets.0.conv1.lora_B.weight": torch.full((4, 2, 1, 1), float("nan"))}, r"lora_B\.weight has NaN"),
        ({"unet.mid_block.resnets.0.conv1.lora_magnitude_vector": torch.ones(7)}, r"DoRA magnitude \(7,\)"),
        ({"unet.mid_block.resnets.0.conv1.lora_magnitude_vector": torch.ones(4)}, r"1 of 2 modules have a DoRA magnitude"),
        (
            {"unet.mid_block.resnets.0.conv1.lora.down.weight": torch.ones(2, 4, 3, 3)},
            r"conv1\.lora_A\.weight and unet\.mid_block\.resnets\.0\.conv1\.lora\.down\.weight are two spellings of one tensor",
        ),
        (
            {
                "unet.mid_block.resnets.1.conv1.lora_B.weight": None,
                "unet.mid_block.resnets.1.conv1.lora.up.weight": torch.ones(4, 2, 1, 1),
            },
            r"diffusers ignores 1 tensors, such as unet\.mid_block\.resnets\.1\.conv1\.lora\.up\.weight",
        ),
    ],
)
def test_tensors_that_make_no_pair_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        diffusers.read(bare(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a JSON list; expected a table"),
        (json.dumps({"unet.r": 8, "unet.lora_alpha": 8}), r"rank 2, but lora_adapter_metadata says 8, so its scale is uncertain"),
        (json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True}), r"no DoRA magnitude, and .* says use_dora True"),
        (json.dumps({"unet.r": 2}), r"unet has no lora_alpha, so the alpha and with it the scale are unknown"),
        (json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_frobnication": True}), "use_frobnication"),
    ],
)
def test_headers_that_leave_the_scale_open_are_refused(text: str, message: str, tmp_path: Path) -> None:
    tensors = load_file(bare(tmp_path))
    save_file(tensors, tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises((DataError, ConfigError), match=message):
        diffusers.read(tmp_path / "bad.safetensors")


def test_what_diffusers_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"belong to no component .* goes --to peft, gguf or mlx"):
        diffusers.write(text_adapter(), tmp_path / "a.safetensors")
    adapter = image_adapter(dora=True)
    first = next(iter(adapter.pairs))
    plain = {**adapter.pairs, first: Pair(adapter.pairs[first].A, adapter.pairs[first].B, 12.0, adapter.pairs[first].kind)}
    with pytest.raises(ConfigError, match="knows DoRA for the whole adapter only"):
        diffusers.write(Adapter(plain), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_written_files_need_no_header_for_their_scale(tmp_path: Path) -> None:
    adapter = image_adapter()
    diffusers.write(adapter, tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert compare_adapters(adapter, diffusers.read(tmp_path / "b.safetensors")).equal
