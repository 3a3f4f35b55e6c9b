"""Kohya's keys of FLUX and SD3: read, written, and the same ΔW through diffusers' own readers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.compare import compare_adapters, relative_difference
from lorakeet.formats.compress import CompressionTarget
from lorakeet.formats.detect import detect
from lorakeet.formats.diffusion import kohya
from lorakeet.formats.diffusion.kohya_keys import TransformerFamily, originals
from lorakeet.formats.diffusion.kohya_transformer import join_pairs, of_module, rows_of_parts, split, swapped
from tiny.adapters import random_pair
from tiny.images import diffusers
from tiny.originals import from_original

SINGLE = "transformer.single_transformer_blocks.7"
DOUBLE = "transformer.transformer_blocks.3"
WIDTH = 3072  # diffusers' reader takes FLUX's own for given
FLUX = {
    f"{SINGLE}.attn.to_q": (2, 12.0, WIDTH), f"{SINGLE}.attn.to_k": (4, 12.0, WIDTH), f"{SINGLE}.attn.to_v": (3, 20.0, WIDTH),
    f"{SINGLE}.proj_mlp": (4, 4.0, 4 * WIDTH), f"{SINGLE}.norm.linear": (2, 1.0, 3 * WIDTH),
    f"{DOUBLE}.attn.to_q": (4, 8.0, WIDTH), f"{DOUBLE}.attn.to_v": (4, 8.0, WIDTH), f"{DOUBLE}.attn.to_out.0": (3, 12.0, WIDTH),
    f"{DOUBLE}.attn.add_q_proj": (2, 2.0, WIDTH), f"{DOUBLE}.attn.add_k_proj": (2, 4.0, WIDTH),
    f"{DOUBLE}.attn.add_v_proj": (2, 6.0, WIDTH), f"{DOUBLE}.attn.to_add_out": (1, 3.0, WIDTH),
    f"{DOUBLE}.ff.net.0.proj": (2, 12.0, 4 * WIDTH), f"{DOUBLE}.norm1.linear": (2, 12.0, 6 * WIDTH),
    f"{DOUBLE}.norm1_context.linear": (2, 12.0, 6 * WIDTH),
}  # fmt: skip


def flux_adapter() -> Adapter:
    torch.manual_seed(0)
    pairs = {path: Pair(torch.randn(rank, WIDTH), torch.randn(rows, rank), alpha) for path, (rank, alpha, rows) in FLUX.items()}
    wide = {f"{SINGLE}.proj_out": 5 * WIDTH, f"{DOUBLE}.ff.net.2": 4 * WIDTH, f"{DOUBLE}.ff_context.net.2": 4 * WIDTH}
    pairs |= {path: Pair(torch.randn(2, width), torch.randn(WIDTH, 2), 5.0) for path, width in wide.items()}
    pairs["text_encoder.text_model.encoder.layers.0.mlp.fc1"] = random_pair("linear", torch.zeros(24, 16), rank=2)
    return Adapter(pairs)


def test_diffusers_reads_the_same_changes_from_a_flux_file(tmp_path: Path) -> None:
    adapter = flux_adapter()
    said: list[str] = []
    kohya.write(adapter, tmp_path / "a.safetensors", say=said.append)
    assert said == []  # all of it is read
    state = diffusers().FluxPipeline.lora_state_dict(tmp_path, weight_name="a.safetensors")
    found = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    for path in found & adapter.pairs.keys():
        A, B = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
        assert relative_difference(adapter.pairs[path], Pair(A, B, float(len(A)))) < 1e-6, path
    missing = {path for path in adapter.pairs if path.startswith("transformer.")} - found
    assert not missing
    extra = f"{DOUBLE}.attn.to_k"  # joined with queries and values, and nothing in it
    assert found - adapter.pairs.keys() == {extra} and not bool(state[f"{extra}.lora_B.weight"].any())
    clip = adapter.pairs["text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    name = next(name for name in state if name.startswith("text_encoder.") and ".down." in name)
    read = Pair(state[name], state[name.replace(".down.", ".up.")], float(len(state[name])))
    assert relative_difference(clip, read) < 1e-6


def test_a_flux_file_comes_back_with_its_ranks_scales_and_notes(tmp_path: Path) -> None:
    adapter = flux_adapter()
    kohya.write(adapter, tmp_path / "a.safetensors")
    back = kohya.read(tmp_path / "a.safetensors")
    assert compare_adapters(adapter, back).equal
    assert {path: pair.rank for path, pair in back.pairs.items()} == {path: pair.rank for path, pair in adapter.pairs.items()}
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["ss_network_module"] == "networks.lora_flux" and notes["ss_base_model_version"] == "flux1"
    assert detect(tmp_path / "a.safetensors").format == "kohya"
    kohya.write(back, tmp_path / "b.safetensors")  # its family is known by now
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == load_file(tmp_path / "a.safetensors").keys()


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_every_original_matrix_is_split_as_diffusers_splits_it(family: TransformerFamily) -> None:
    """One column of a checkpoint in which every row has a number of its own, against ΔW = B·1."""
    width = WIDTH if family == "flux" else 32
    checkpoint: dict[str, Tensor] = {}
    for theirs, parts in originals(family).items():
        if not any(f"blocks.{number}." in theirs for number in range(2, 40)):
            rows = _rows(theirs, parts, width)
            checkpoint[f"{theirs}.weight"] = torch.rand(rows, 1, dtype=torch.float64)
            checkpoint[f"{theirs}.bias"] = torch.rand(rows)
    for name in ("query_norm", "key_norm"):
        for block in ("double_blocks.{}.img_attn.", "double_blocks.{}.txt_attn.", "single_blocks.{}."):
            checkpoint |= {f"{block.format(number)}norm.{name}.scale": torch.rand(4) for number in (0, 1)}
    checkpoint["pos_embed"] = torch.rand(1, 4, width)
    converted = from_original(checkpoint, family)
    for theirs, parts in originals(family).items():
        weight = checkpoint.get(f"{theirs}.weight")
        if weight is None:
            continue
        pair = Pair(torch.ones(1, width), weight, 1.0)
        found = of_module(f"lora_unet_{theirs.replace('.', '_')}", parts, pair)
        assert not isinstance(found, str), found
        for path, part in found.items():
            wanted = converted.get(f"{path.removeprefix('transformer.')}.weight")
            if wanted is not None:  # the text's way out of SD3's last block is not there
                assert torch.equal(part.B, wanted), path


def _rows(theirs: str, parts: tuple[str, ...], width: int) -> int:
    if theirs.endswith("adaLN_modulation.1"):
        two = theirs.startswith("final_layer") or theirs == "joint_blocks.1.context_block.adaLN_modulation.1"
        return 2 * width if two else 6 * width
    return 7 * width if len(parts) == 4 else len(parts) * width


def saved(folder: Path, key: str, down: Tensor, up: Tensor, alpha: float, *, dotted: bool = False) -> Path:
    down_name, up_name = ("lora_A", "lora_B") if dotted else ("lora_down", "lora_up")
    tensors = {f"{key}.{down_name}.weight": down, f"{key}.{up_name}.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    save_file(tensors, folder / "k.safetensors")
    return folder / "k.safetensors"


@pytest.mark.parametrize(
    ("key", "rows", "parts"),
    [
        ("lora_unet_double_blocks_4_txt_attn_qkv", [16, 16, 16], "transformer_blocks.4.attn.add_{q,k,v}_proj"),
        ("lora_unet_single_blocks_9_linear1", [16, 16, 16, 40], "single_transformer_blocks.9.attn.to_{q,k,v}"),
        ("lora_unet_joint_blocks_2_x_block_attn2_qkv", [16, 16, 16], "transformer_blocks.2.attn2.to_{q,k,v}"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", [16, 16, 16], "transformer_blocks.0.attn.to_{q,k,v}"),
        ("lora_transformer_transformer_blocks_5_attn_to_k", [16], "transformer_blocks.5.attn.to_k"),
    ],
)  # fmt: skip
def test_a_file_by_kohyas_key_scheme_has_its_scales(key: str, rows: list[int], parts: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    down, up = torch.randn(4, 16), torch.randn(sum(rows), 4)
    pairs = kohya.read(saved(tmp_path, key, down, up, 6.0, dotted=key.startswith("diffusion"))).pairs
    assert {pair.scale for pair in pairs.values()} == {1.5} and len(pairs) == len(rows)
    whole, start = 1.5 * up @ down, 0
    names = [parts.replace("{q,k,v}", letter) for letter in "qkv"][: len(rows)]
    for name, height in zip(names, rows, strict=False):
        torch.testing.assert_close(pairs[f"transformer.{name}"].delta(), whole[start : start + height])
        start += height
    if len(rows) == 4:
        torch.testing.assert_close(pairs["transformer.single_transformer_blocks.9.proj_mlp"].delta(), whole[48:])


def test_sd3_modulations_of_two_parts_change_their_order(tmp_path: Path) -> None:
    torch.manual_seed(2)
    block = "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"
    for rows, turned in ((32, True), (96, False)):
        down, up = torch.randn(2, 16), torch.randn(rows, 2)
        [pair] = kohya.read(saved(tmp_path, block, down, up, 2.0)).pairs.values()
        assert torch.equal(pair.B, up.roll(rows // 2, 0) if turned else up)


def test_what_diffusers_leaves_out_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    flux = {"transformer.norm_out.linear": random_pair("linear", torch.zeros(32, 16)),
            "transformer.single_transformer_blocks.0.proj_out": random_pair("linear", torch.zeros(16, 80))}  # fmt: skip
    kohya.write(Adapter(flux), tmp_path / "flux.safetensors", say=said.append)
    assert len(said) == 1
    assert "1 layers outside the blocks of a kohya file of FLUX (lora_unet_final_layer_adaLN_modulation_1)" in said[0]
    assert compare_adapters(Adapter(flux), kohya.read(tmp_path / "flux.safetensors")).equal
    sd3 = {"transformer.pos_embed.proj": random_pair("conv2d", torch.zeros(16, 4, 2, 2)),
           "transformer.transformer_blocks.0.attn2.to_k": random_pair("linear", torch.zeros(16, 16)),
           "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj": random_pair("linear", torch.zeros(8, 8))}  # fmt: skip
    kohya.write(Adapter(sd3), tmp_path / "sd3.safetensors", say=said.append)
    assert "diffusers reads no kohya file of SD3" in said[1] and "--to diffusers" in said[1]
    names = load_file(tmp_path / "sd3.safetensors")
    assert "lora_unet_x_embedder_proj.alpha" in names
    assert "lora_te2_text_model_encoder_layers_1_self_attn_k_proj.alpha" in names
    assert compare_adapters(Adapter(sd3), kohya.read(tmp_path / "sd3.safetensors")).equal


def test_dora_is_joined_where_every_part_has_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    parts = {f"{SINGLE}.attn.to_{letter}": random_pair("linear", torch.randn(16, 16), dora=True) for letter in "qkv"}
    with pytest.raises(ConfigError, match=r"attn\.to_q is DoRA, but .*proj_mlp is not, and one matrix"):
        kohya.write(Adapter(parts), tmp_path / "a.safetensors")
    whole = Adapter({**parts, f"{SINGLE}.proj_mlp": random_pair("linear", torch.randn(64, 16), dora=True)})
    kohya.write(whole, tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors")["lora_unet_single_blocks_7_linear1.dora_scale"].shape == (112, 1)
    assert compare_adapters(whole, kohya.read(tmp_path / "b.safetensors")).equal


def test_lokr_of_a_joined_matrix_is_compressed_part_by_part(tmp_path: Path) -> None:
    torch.manual_seed(4)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lokr_w1": torch.randn(3, 2), f"{key}.lokr_w2": torch.randn(16, 8), f"{key}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(ConfigError, match=r"LoKr, which are not pairs, for 3 modules: transformer\.transformer_blocks\.0"):
        kohya.read(tmp_path / "k.safetensors")
    pairs = kohya.read(tmp_path / "k.safetensors", compression=CompressionTarget(rank=16), say=lambda _: None).pairs
    whole = torch.kron(tensors[f"{key}.lokr_w1"], tensors[f"{key}.lokr_w2"])
    for letter, rows in zip("qkv", whole.split(16), strict=True):
        found = pairs[f"transformer.transformer_blocks.0.attn.to_{letter}"].delta()
        torch.testing.assert_close(found, rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "rows", "message"),
    [
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 16, r"is a pair of T5, .* never adapted here"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 47, r"B \(47, 4\) and A \(4, 16\), .* split into to_q, to_k, to_v"),
        ("lora_unet_single_blocks_0_linear1", 48, r"which cannot be split into to_q, to_k, to_v, proj_mlp"),
        ("lora_unet_double_blocks_0_img_attn_qkw", 48, r"is no module of .* SD3 or FLUX\. Did you mean '.*qkv'"),
    ],
)
def test_what_cannot_be_read_is_named(key: str, rows: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        kohya.read(saved(tmp_path, key, torch.randn(4, 16), torch.randn(rows, 4), 4.0))


def test_two_spellings_of_one_module_are_refused(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {}
    for key, rows in (("lora_unet_double_blocks_0_img_attn_qkv", 48), ("lora_transformer_transformer_blocks_0_attn_to_k", 16)):
        tensors |= {f"{key}.lora_down.weight": torch.randn(4, 16), f"{key}.lora_up.weight": torch.randn(rows, 4),
                    f"{key}.alpha": torch.tensor(4.0)}  # fmt: skip
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(DataError, match=r"is a second spelling of transformer\.transformer_blocks\.0\.attn\.to_k"):
        kohya.read(tmp_path / "k.safetensors")


def test_what_cannot_be_joined_or_has_no_key_is_named(tmp_path: Path) -> None:
    uneven = {f"{DOUBLE}.attn.to_q": random_pair("linear", torch.zeros(16, 16)),
              f"{DOUBLE}.attn.to_k": random_pair("linear", torch.zeros(24, 16)),
              "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": random_pair("linear", torch.zeros(16, 16)),
              "transformer.single_transformer_blocks.0.proj_out": random_pair("linear", torch.zeros(16, 80))}  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        kohya.write(Adapter(uneven), tmp_path / "a.safetensors")
    assert "to_k has A (4, 16) and B (24, 4), which cannot be joined" in str(refused.value)
    assert "SelfAttention.q is no module of FLUX that has a key" in str(refused.value)


ROWS = [6, 6, 10]


def pairs(*ranks: int, alphas: tuple[float, ...] = (12.0, 20.0, 3.0)) -> list[Pair]:
    torch.manual_seed(1)
    sizes = zip(ranks, alphas, ROWS, strict=True)
    return [random_pair("linear", torch.randn(rows, 6), rank=rank, alpha=alpha) for rank, alpha, rows in sizes]


def test_mixed_ranks_and_alphas_join_block_by_block_and_come_back() -> None:
    parts = pairs(2, 4, 3)
    whole = join_pairs(parts, ROWS)
    assert (whole.rank, whole.scale) == (9, 1.0)
    torch.testing.assert_close(whole.delta(), torch.cat([part.delta() for part in parts]))
    assert int((whole.B != 0).sum()) == 6 * 2 + 6 * 4 + 10 * 3
    back = split(whole, ROWS)
    for part, found in zip(parts, back, strict=True):
        assert found is not None and found.rank == part.rank and torch.equal(found.A, part.A)
        torch.testing.assert_close(found.delta(), part.delta())


def test_one_scale_for_all_stays_the_scale_and_the_factors_their_bits() -> None:
    parts = pairs(2, 4, 3, alphas=(6.0, 12.0, 9.0))
    whole = join_pairs(parts, ROWS)
    assert whole.scale == 3.0
    for part, found in zip(parts, split(whole, ROWS), strict=True):
        assert found is not None and found.scale == 3.0 and torch.equal(found.A, part.A) and torch.equal(found.B, part.B)


def test_a_part_without_a_pair_has_no_rows_and_none_comes_back() -> None:
    first, _, last = pairs(2, 4, 3)
    whole = join_pairs([first, None, last], ROWS)
    assert whole.rank == 5 and not bool(whole.B[6:12].any())
    found = split(whole, ROWS)
    assert found[1] is None and [pair.rank for pair in found if pair] == [2, 3]


def test_one_A_for_all_is_kept_once() -> None:
    torch.manual_seed(2)
    dense = random_pair("linear", torch.randn(22, 6), rank=4, alpha=2.0)
    parts = split(dense, ROWS)
    assert all(part is not None and torch.equal(part.A, dense.A) and part.scale == 0.5 for part in parts)
    whole = join_pairs(parts, ROWS)
    assert (whole.rank, whole.alpha) == (4, 2.0) and torch.equal(whole.A, dense.A) and torch.equal(whole.B, dense.B)


def test_a_pair_that_changes_nothing_is_given_to_every_part() -> None:
    fresh = Pair(torch.randn(4, 6), torch.zeros(22, 4), 8.0)
    parts = split(fresh, ROWS)
    assert [part.rank if part else None for part in parts] == [4, 4, 4]


def test_dora_lengths_go_by_rows_and_must_be_on_all() -> None:
    torch.manual_seed(3)
    parts = [random_pair("linear", torch.randn(rows, 6), rank=2, dora=True) for rows in ROWS]
    whole = join_pairs(parts, ROWS)
    for part, found in zip(parts, split(whole, ROWS), strict=True):
        assert found is not None and part.magnitude is not None and found.magnitude is not None
        assert torch.equal(found.magnitude, part.magnitude)
    still = dataclasses.replace(parts[1], B=torch.zeros_like(parts[1].B))  # rescales its rows although B is 0
    assert split(join_pairs([parts[0], still, parts[2]], ROWS), ROWS)[1] is not None
    with pytest.raises(ValueError, match="only some parts"):
        join_pairs([parts[0], None, parts[2]], ROWS)


def test_halves_of_rows_are_exchanged_with_their_lengths() -> None:
    torch.manual_seed(4)
    pair = random_pair("linear", torch.randn(8, 4), dora=True)
    other = swapped(pair)
    assert pair.magnitude is not None and other.magnitude is not None
    assert torch.equal(other.B, torch.cat([pair.B[4:], pair.B[:4]])) and torch.equal(other.magnitude[:4], pair.magnitude[4:])
    assert torch.equal(swapped(other).B, pair.B)


@pytest.mark.parametrize(
    ("parts", "width", "total", "expected"),
    [
        (3, 8, 24, [8, 8, 8]), (3, 8, 25, None), (2, 9, 8, [4, 4]), (4, 8, 56, [8, 8, 8, 32]), (4, 8, 40, [8, 8, 8, 16]),
        (4, 8, 24, None),
    ],
)  # fmt: skip
def test_rows_of_parts(parts: int, width: int, total: int, expected: list[int] | None) -> None:
    assert rows_of_parts(parts, width, total) == expected
