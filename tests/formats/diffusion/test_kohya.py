"""Kohya's files: keys, alphas, convolutions, metadata, LyCORIS; what diffusers computes with them is in test_diffusers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.compare import compare_adapters
from lorakeet.formats.compress import CompressionTarget
from lorakeet.formats.diffusion import kohya
from lorakeet.formats.files.base_model import check_fits, open_base
from tiny.adapters import random_pair
from tiny.images import diffusers as diffusers_package
from tiny.portable import image_adapter, text_adapter

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
TE = "lora_te_text_model_encoder_layers_3_mlp_fc1"
CONV = "lora_unet_mid_block_resnets_0_conv1"


def good() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for key, rank, alpha in ((Q, 4, 12.0), (K, 2, 12.0), (TE, 4, 4.0)):
        tensors |= {f"{key}.lora_down.weight": torch.randn(rank, 8), f"{key}.lora_up.weight": torch.randn(6, rank)}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def saved(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    return tmp_path / "a.safetensors"


def test_each_module_has_its_own_alpha_and_rank(tmp_path: Path) -> None:
    pairs = kohya.read(saved(tmp_path, good())).pairs
    scales = {path.rpartition(".")[2]: pair.scale for path, pair in pairs.items()}
    assert scales == {"to_q": 3.0, "to_k": 6.0, "fc1": 1.0}
    assert "text_encoder.text_model.encoder.layers.3.mlp.fc1" in pairs


def test_without_any_alpha_the_scale_is_one_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    tensors = {name: tensor for name, tensor in good().items() if not name.endswith("alpha")}
    pairs = kohya.read(saved(tmp_path, tensors), say=said.append).pairs
    assert {pair.scale for pair in pairs.values()} == {1.0}
    assert len(said) == 1 and "no alpha for any module" in said[0]


def test_a_convolution_in_tucker_form_is_multiplied_out(tmp_path: Path) -> None:
    down, mid, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(6, 3, 1, 1)
    tensors = {f"{CONV}.lora_down.weight": down, f"{CONV}.lora_mid.weight": mid, f"{CONV}.lora_up.weight": up}
    pair = kohya.read(saved(tmp_path, {**tensors, f"{CONV}.alpha": torch.tensor(6.0)})).pairs["unet.mid_block.resnets.0.conv1"]
    x = torch.randn(1, 5, 7, 7)
    slow = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up) * 2
    torch.testing.assert_close(torch.conv2d(x, pair.delta(), padding=1), slow, atol=1e-4, rtol=1e-4)


def test_metadata_stays_but_for_hashes_of_the_old_file(tmp_path: Path) -> None:
    notes = {"ss_network_dim": "4", "ss_tag_frequency": '{"ä": 1}', "modelspec.title": "x", "sshs_legacy_hash": "0f"}
    said: list[str] = []
    adapter = kohya.read(saved(tmp_path, good(), notes), say=said.append)
    kohya.write(adapter, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        kept = file.metadata()
    assert {key: kept[key] for key in notes if key in kept} == {key: notes[key] for key in list(notes)[:3]}
    assert set(kept) - set(notes) == {"format", "ss_network_module", "ss_network_alpha", "sshs_model_hash"}
    assert said == ["Left out sshs_legacy_hash: hashes of a file that is written anew."]


def test_sdxl_is_written_in_the_names_that_diffusers_maps(tmp_path: Path) -> None:
    """diffusers' own reader takes the keys of Stability's code apart; its paths must be ours."""
    diffusers_package()
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils import convert_unet_state_dict_to_peft

    adapter = image_adapter(sdxl=True)
    kohya.write(adapter, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert "lora_unet_input_blocks_0_0.alpha" in tensors and any(name.startswith("lora_te2_") for name in tensors)

    class Config:
        layers_per_block = 2

    state, alphas = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, Config()))
    state = convert_unet_state_dict_to_peft({key: value for key, value in state.items() if key.startswith("unet.")})
    paths = {path for path in adapter.pairs if path.startswith("unet.")}
    assert {key.rpartition(".lora_A")[0] for key in state if ".lora_A" in key} == paths
    for path in paths:
        A, B = state[f"{path}.lora_A.weight"].flatten(1), state[f"{path}.lora_B.weight"].flatten(1)
        torch.testing.assert_close(12 / A.shape[0] * B @ A, adapter.pairs[path].delta().flatten(1))
    assert len(alphas) == len(adapter.pairs) and set(alphas.values()) == {12.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{K}.alpha": None}, rf"1 of 3 modules have no alpha \({K}\), so their scale is unknown"),
        ({f"{K}.alpha": torch.ones(3)}, r"alpha has the shape \(3,\); expected one number"),
        ({f"{K}.lora_up.weight": None}, "has alpha, lora_down but no lora_up"),
        ({f"{K}.lora_up.weight": torch.ones(6, 5)}, r"A \(2, 8\) and B \(6, 5\)"),
        ({f"{K}.lora_up.weight": torch.full((6, 2), float("inf"))}, r"lora_up\.weight has NaN or infinite values"),
        ({f"{K}.alpha": torch.tensor(float("nan"))}, r"to_k\.alpha has NaN or infinite"),
        ({f"{K}.lora_dwon.weight": torch.ones(2, 8)}, r"of tensor that is not known here\. Did you mean 'lora_down\.weight'"),
        ({f"{K}x.lora_down.weight": torch.ones(2, 8), f"{K}x.lora_up.weight": torch.ones(6, 2), f"{K}x.alpha": torch.tensor(1.0)},
         r"to_kx is no module of Stable Diffusion 1\.x, SDXL, SD3 or FLUX\. Did you mean .*--base"),
        ({f"{TE.replace('te_', 'te1_')}.lora_down.weight": torch.ones(2, 8), f"{TE.replace('te_', 'te1_')}.lora_up.weight":
          torch.ones(6, 2), f"{TE.replace('te_', 'te1_')}.alpha": torch.tensor(1.0)}, "is a second spelling of text_encoder"),
        ({f"{K}.dora_scale": torch.ones(1, 8)}, r"dora_scale \(1, 8\); only one length for each of the 6 rows"),
        ({f"{Q}.lora_mid.weight": torch.ones(9, 9, 3, 3)}, "which do not go together"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in {**good(), **changes}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        kohya.read(saved(tmp_path, tensors))


def test_loha_needs_a_request_and_states_its_error(tmp_path: Path) -> None:
    torch.manual_seed(1)
    factors = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{CONV.replace('conv1', 'time_emb_proj')}.{name}": torch.randn(shape) for name, shape in factors.items()}
    tensors |= {f"{CONV.replace('conv1', 'time_emb_proj')}.alpha": torch.tensor(6.0), **good()}
    path = saved(tmp_path, tensors)
    with pytest.raises(ConfigError, match=r"holds LoHa, .* for 1 modules: .*time_emb_proj\. .*--rank 16, or --error"):
        kohya.read(path)
    said: list[str] = []
    read = kohya.read(path, compression=CompressionTarget(rank=4), say=said.append)
    exact = read.pairs["unet.mid_block.resnets.0.time_emb_proj"]
    a1, b1, a2, b2 = (tensors[f"{CONV.replace('conv1', 'time_emb_proj')}.{name}"] for name in factors)
    torch.testing.assert_close(exact.delta(), 3 * (a1 @ b1) * (a2 @ b2), atol=1e-4, rtol=1e-4)
    assert len(said) == 1 and "LoHa compressed to rank 4, relative error" in said[0]


def loha_of_convolutions() -> dict[str, torch.Tensor]:
    """As LyCORIS writes LoHa and LoKr of 3×3 and 1×1 convolutions without Tucker's form: (out, in·k·k) as matrices."""
    torch.manual_seed(2)
    block = "lora_unet_down_blocks_0"
    tensors = {
        f"{block}_{module}.{name}": torch.randn(shape)
        for module, width in (("resnets_0_conv1", 8 * 9), ("attentions_0_proj_in", 8))
        for name, shape in {"hada_w1_a": (8, 2), "hada_w1_b": (2, width), "hada_w2_a": (8, 2), "hada_w2_b": (2, width)}.items()
    }
    factors = {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4 * 9)}
    tensors |= {f"{block}_resnets_0_conv2.{name}": torch.randn(shape) for name, shape in factors.items()}
    return {**tensors, **{f"{key}.alpha": torch.tensor(4.0) for key in {name.partition(".")[0] for name in tensors}}}


def test_products_of_a_convolution_have_the_shape_of_its_weight(tmp_path: Path, tiny_sd_folder: Path) -> None:
    tensors = loha_of_convolutions()
    path, base = saved(tmp_path, tensors), open_base(tiny_sd_folder)
    found = kohya.read(path, base=base, compression=CompressionTarget(rank=72), say=lambda _: None)
    check_fits(found, base)
    slots = {name.removeprefix("lora_unet_down_blocks_0_"): tensor for name, tensor in tensors.items()}
    pair = found.pairs["unet.down_blocks.0.resnets.0.conv1"]
    a1, b1, a2, b2 = (slots[f"resnets_0_conv1.hada_w{name}"] for name in ("1_a", "1_b", "2_a", "2_b"))
    assert pair.kind == "conv2d" and tuple(pair.A.shape[1:]) == (8, 3, 3)
    torch.testing.assert_close(pair.delta(), (2 * (a1 @ b1) * (a2 @ b2)).view(8, 8, 3, 3), atol=1e-3, rtol=1e-3)
    assert tuple(found.pairs["unet.down_blocks.0.attentions.0.proj_in"].A.shape[1:]) == (8, 1, 1)
    product = (slots["resnets_0_conv2.lokr_w2_a"] @ slots["resnets_0_conv2.lokr_w2_b"]).view(4, 4, 3, 3)
    wanted = torch.einsum("ab,cdkl->acbdkl", slots["resnets_0_conv2.lokr_w1"], product).reshape(8, 8, 3, 3) * 2
    torch.testing.assert_close(found.pairs["unet.down_blocks.0.resnets.0.conv2"].delta(), wanted, atol=1e-3, rtol=1e-3)


def test_without_a_base_they_are_refused_and_sdxls_linear_projections_are_not(tmp_path: Path) -> None:
    path = saved(tmp_path, loha_of_convolutions())
    with pytest.raises(DataError, match=r"3 changes may be of convolutions.*conv1 \(8, 72\).*Name the folder .* with --base"):
        kohya.read(path, compression=CompressionTarget(rank=4), say=lambda _: None)
    key = "lora_unet_input_blocks_4_1_proj_in"
    factors = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    other = saved(tmp_path, {f"{key}.{name}": torch.randn(shape) for name, shape in factors.items()})
    [pair] = kohya.read(other, compression=CompressionTarget(rank=4), say=lambda _: None).pairs.values()
    assert pair.kind == "linear"


LINEAR_KEY = "lora_unet_down_blocks_1_attentions_0_proj_in"
TO_K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def loha(key: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    shapes = {"hada_w1_a": (rows, 2), "hada_w1_b": (2, columns), "hada_w2_a": (rows, 2), "hada_w2_b": (2, columns)}
    return {f"{key}.{name}": torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "beside",
    [
        loha(TO_K, 8, 1024), loha(TO_K, 8, 2048),
        {f"{TO_K}.lokr_w1": torch.ones(2, 2), f"{TO_K}.lokr_w2": torch.ones(4, 512)},
        {f"{TO_K}.lora_down.weight": torch.ones(2, 1024), f"{TO_K}.lora_up.weight": torch.ones(8, 2)},
        loha("lora_te2_text_model_encoder_layers_0_mlp_fc1", 8, 8),
    ],
)  # fmt: skip
def test_projections_of_sd_2_and_sdxl_in_diffusers_names_are_linear(beside: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path, {**loha(LINEAR_KEY, 8, 8), **beside})
    found = kohya.read(path, compression=CompressionTarget(rank=4), say=lambda _: None)
    assert found.pairs["unet.down_blocks.1.attentions.0.proj_in"].kind == "linear" and len(found.pairs) == 2


@pytest.mark.parametrize("beside", [loha(TO_K, 8, 768), loha(TO_K.replace("attn2", "attn1"), 8, 1024), {}])
def test_projections_may_be_convolutions_where_nothing_tells(beside: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path, {**loha(LINEAR_KEY, 8, 8), **beside})
    with pytest.raises(DataError, match=r"1 changes may be of convolutions.*proj_in \(8, 8\)"):
        kohya.read(path, compression=CompressionTarget(rank=4), say=lambda _: None)


def test_a_base_of_another_shape_brings_its_own_modules(tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    (tmp_path / "base" / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "cross_attention_dim": 16}')
    save_file({"my_blocks.0.to_q.weight": torch.ones(8, 8)}, tmp_path / "base" / "unet" / "model.safetensors")
    base = open_base(tmp_path / "base")
    adapter = Adapter({"unet.my_blocks.0.to_q": random_pair("linear", torch.ones(8, 8))})
    kohya.write(adapter, tmp_path / "a.safetensors", base=base)
    assert "lora_unet_my_blocks_0_to_q.alpha" in load_file(tmp_path / "a.safetensors")
    assert compare_adapters(adapter, kohya.read(tmp_path / "a.safetensors", base=base)).equal
    with pytest.raises(DataError, match="name its folder with --base"):
        kohya.read(tmp_path / "a.safetensors")


def test_alphas_that_differ_are_written_as_one(tmp_path: Path) -> None:
    """diffusers 0.42.1 takes the most frequent alpha for attention and text encoder, whatever their own is."""
    adapter = image_adapter()
    assert len({pair.alpha for pair in adapter.pairs.values()}) == 2
    kohya.write(adapter, tmp_path / "a.safetensors")
    back = kohya.read(tmp_path / "a.safetensors")
    assert {pair.alpha for pair in back.pairs.values()} == {12.0} and compare_adapters(adapter, back).equal
    silent = Adapter({path: dataclasses.replace(pair, alpha=0.0) for path, pair in adapter.pairs.items()})
    kohya.write(silent, tmp_path / "b.safetensors")
    back = kohya.read(tmp_path / "b.safetensors")  # an alpha of 0 would be read as the rank
    assert {pair.alpha for pair in back.pairs.values()} == {1.0} and not any(pair.B.any() for pair in back.pairs.values())


def test_what_kohya_does_not_have_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    nowhere = Adapter({"unet.mid_block.attentions.0.proj_ni": random_pair("linear", torch.ones(4, 4))})
    both = Adapter({"unet.mid_block.resnets.0.conv1": random_pair("conv2d", torch.ones(4, 4, 3, 3))})
    extra = Adapter(image_adapter().pairs, extras={"unet.conv_in.bias": torch.ones(3)})
    for adapter, message in (
        (nowhere, r"belong neither to the UNet of SD 1\.x nor .* Did you mean 'mid_block\.attentions\.0\.proj_in'"),
        (both, "whether the 1 pairs of the UNet belong to SD 1.x or to SDXL"),
        (extra, r"kohya cannot hold whole parameters \(modules_to_save\): unet\.conv_in\.bias\. Merge"),
        (text_adapter(), "is no module of Stable Diffusion"),
        (
            Adapter({"transformer.transformer_blocks.0.attn.to_q": random_pair("linear", torch.ones(4, 4))}),
            r"Nothing says whether the 1 pairs of the transformer belong to FLUX or to SD3",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            kohya.write(adapter, out)
        assert not out.exists()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"dora_scale": torch.ones(6, 1)}, r"dora_scale \(6, 1\)"),
        ({"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(6, 2)}, r"lora_down \(2, 8\), lora_up \(6, 2\)"),
        ({"hada_w1_a": torch.ones(6, 2)}, r"lokr_w1 \(2, 2\), lokr_w2 \(3, 4\)"),
    ],
)
def test_tensors_beside_a_product_that_would_be_lost_are_refused(
    extra: dict[str, torch.Tensor], named: str, tmp_path: Path
) -> None:
    tensors = {f"{Q}.{name}": tensor for name, tensor in {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 4)}.items()}
    assert len(kohya.read(saved(tmp_path, tensors), compression=CompressionTarget(rank=2), say=lambda _: None).pairs) == 1
    tensors |= {f"{Q}.{name}": tensor for name, tensor in extra.items()}
    with pytest.raises(DataError, match=rf"{Q} is Lo.., but has tensors that are not understood beside it: {named}\. .*Train"):
        kohya.read(saved(tmp_path, tensors), compression=CompressionTarget(rank=2))


def test_one_tensor_in_two_spellings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{K}\.lora_down .* not known here. Did you mean 'lora_down\.weight'"):
        kohya.read(saved(tmp_path, {**good(), f"{K}.lora_down": torch.ones(2, 8)}))


BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
UNET_Q, K2, UNET_CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", "unet.down_blocks.1.resnets.0.conv1"


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
    adapter = Adapter({UNET_Q: linear(16), K2: linear(width)}, metadata={"sd_family": "sd1"})
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
    found = written(Adapter({K2: linear(768), UNET_CONV: conv}), tmp_path / "a.safetensors")
    assert found["ss_network_dim"] == "4" and json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "12.0"}
    dora = written(image_adapter(dora=True), tmp_path / "b.safetensors")
    assert dora["ss_network_module"] == "lycoris.kohya" and json.loads(dora["ss_network_args"])["dora_wd"] == "True"


def test_a_version_that_nothing_tells_is_not_made_up(tmp_path: Path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    config = tmp_path / "base" / "unet" / "config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "cross_attention_dim": 16}))
    adapter = Adapter({UNET_Q: linear(16)})
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
