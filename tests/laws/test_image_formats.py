"""A file written here draws in the real diffusers what it draws here, and a kohya file loads here with the right scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorakeet.core.spec import LoraSpec
from lorakeet.formats.components import with_components, without_component
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.peft import peft
from lorakeet.kinds.images.model.diffusers_import import quiet_diffusers
from lorakeet.kinds.images.model.kinds import packed_latents, unpacked_latents
from lorakeet.kinds.images.model.model import ImageModel, image_plan, load_image_model, put_image_adapter
from lorakeet.kinds.images.model.sample import Sampler, draw_latents
from lorakeet.models.inject import adapter_of, eject, inject, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions
from tiny.images import diffusers
from tiny.originals import from_original, original_layout
from tiny.peft_oracle import into_peft

SAMPLER = Sampler(steps=4, guidance=3.0, size=(16, 16))
MIXED = LoraSpec(
    rank=4, alpha=12.0, target_modules=("all-linear", "conv"), rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 20.0, "to_q": 3.0}
)
# What diffusers' readers of kohya's files drop: see the test; FLUX's joined layer of single blocks only at FLUX's own width.
UNREAD = {
    "sdxl": ("add_embedding",),
    "flux": (
        r"transformer\.(x_embedder|context_embedder|norm_out\.linear|proj_out|time_text_embed\..*)",
        r"transformer\.single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp)",
    ),
}


def trained(
    folder: Path,
    *,
    text_encoder: bool = False,
    targets: tuple[str, ...] = MIXED.target_modules,
    without: tuple[str, ...] = (),
) -> ImageModel:
    """A pipeline with an adapter of mixed ranks and alphas on linear layers and convolutions, begun at random."""
    model = load_image_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda _: None)
    targets = ("all-linear",) if model.kind.name == "flux" else targets  # FLUX has no convolutions
    spec = replace(MIXED, target_modules=targets, exclude_modules=without)
    inject(model.parts, image_plan(model, spec, text_encoder=text_encoder), "trained")
    with torch.no_grad():
        for name, parameter in trained_parameters(model.parts, "trained").items():
            if name.endswith(".B"):
                parameter.normal_(0, 0.03, generator=torch.Generator().manual_seed(len(name)))
    return model


def as_run(model: ImageModel, folder: Path) -> Path:
    folder.mkdir()
    peft.write(without_component(with_components(adapter_of(model.parts, "trained"))), folder)
    return folder


def in_diffusers(model: ImageModel, file: Path) -> torch.Tensor:
    """What the same prompt and noise give in a pipeline of diffusers' own that has loaded `file`."""
    with quiet_diffusers():
        pipeline: Any = getattr(diffusers(), type(model.pipeline).__name__).from_pretrained(model.name)
        pipeline.set_progress_bar_config(disable=True)
        before = drawn(pipeline)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        after = drawn(pipeline)
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    return after


def drawn(pipeline: Any) -> torch.Tensor:
    noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(1))[None]
    flux = type(pipeline).__name__ == "FluxPipeline"
    with torch.no_grad():
        found = pipeline(
            "red box", latents=packed_latents(noise) if flux else noise, num_inference_steps=4, guidance_scale=3.0, height=16,
            width=16,
            output_type="latent",
        ).images  # fmt: skip
    return unpacked_latents(found, 8, 8) if flux else found


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "to", "text_encoder"),
    [
        ("sd", "diffusers", True),
        ("sd", "kohya", True),
        ("sd", "kohya", False),
        ("sdxl", "diffusers", True),
        ("sdxl", "diffusers", False),
        ("sdxl", "kohya", True),
        ("sdxl", "kohya", False),
        ("sd3", "diffusers", True),
        ("sd3", "diffusers", False),
        ("flux", "diffusers", True),
        ("flux", "diffusers", False),
        ("flux", "kohya", True),
        ("flux", "kohya", False),
    ],
)
def test_the_real_diffusers_draws_the_same(
    kind: str, to: str, text_encoder: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(f"tiny_{kind}_folder")
    # A UNet with SDXL's own blocks is written in LDM's names, label_emb_0_0; this small one in its own, and of these diffusers'
    # reader knows all but add_embedding's.
    without = UNREAD.get(kind, ()) if to == "kohya" else ()
    model = trained(base, text_encoder=text_encoder, without=without)
    ours = draw_latents(model, ["red box"], [1], SAMPLER)
    file = tmp_path / "written.safetensors"
    convert(ConvertOptions(as_run(model, tmp_path / "adapter"), file, to=to, base=base), console=Console(quiet=True))  # type: ignore[arg-type]
    assert apart(in_diffusers(model, file), ours) < 1e-4
    eject(model.parts)
    put_image_adapter(model, read_adapter(file, base=open_base(base)), "read")  # kohya's keys of this small SDXL need its modules
    assert apart(draw_latents(model, ["red box"], [1], SAMPLER), ours) < 1e-5


def test_a_kohya_file_of_sd3_means_the_same_in_the_original_checkpoint(tiny_sd3_folder: Path, tmp_path: Path) -> None:
    """diffusers reads no such file: scale·up·down is added to SD3's own matrices, which diffusers' converter then reads."""
    model = trained(tiny_sd3_folder)
    ours = draw_latents(model, ["red box"], [1], SAMPLER)
    file = tmp_path / "written.safetensors"
    convert(
        ConvertOptions(as_run(model, tmp_path / "adapter"), file, to="kohya", base=tiny_sd3_folder), console=Console(quiet=True)
    )
    with quiet_diffusers():
        pipeline: Any = diffusers().StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder)
        pipeline.set_progress_bar_config(disable=True)
        checkpoint = original_layout(pipeline.transformer.state_dict(), "sd3")
        places = {name.removesuffix(".weight").replace(".", "_"): name for name in checkpoint if name.endswith(".weight")}
        written = load_file(file)
        keys = {name.partition(".")[0] for name in written}
        for key in keys:
            down, up = written[f"{key}.lora_down.weight"], written[f"{key}.lora_up.weight"]
            change = up.flatten(1) @ down.flatten(1) * (written[f"{key}.alpha"] / len(down))
            name = places[key.removeprefix("lora_unet_")]
            checkpoint[name] = checkpoint[name] + change.view_as(checkpoint[name])
        pipeline.transformer.load_state_dict(from_original(checkpoint, "sd3"))
        assert apart(drawn(pipeline), ours) < 1e-4
    eject(model.parts)
    put_image_adapter(model, read_adapter(file), "read")
    assert apart(draw_latents(model, ["red box"], [1], SAMPLER), ours) < 1e-5


@pytest.mark.parametrize(
    ("kind", "targets"), [("sd", "attention"), ("sd", "all"), ("sdxl", "all"), ("sd3", "all"), ("flux", "all")]
)
def test_the_real_peft_draws_the_same(kind: str, targets: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """PEFT's folder goes onto the denoiser by PeftModel: `load_lora_weights` reads files of diffusers and kohya only."""
    base = request.getfixturevalue(f"tiny_{kind}_folder")
    model = trained(base, targets=("attention",) if targets == "attention" else MIXED.target_modules)
    ours = draw_latents(model, ["red box"], [1], SAMPLER)
    folder = as_run(model, tmp_path / "adapter")
    with quiet_diffusers():
        pipeline: Any = getattr(diffusers(), type(model.pipeline).__name__).from_pretrained(base)
        pipeline.set_progress_bar_config(disable=True)
        into_peft(getattr(pipeline, model.kind.denoiser), folder)  # PEFT's layers are now in it
        assert apart(drawn(pipeline), ours) < 1e-4


def test_a_file_by_kohyas_key_scheme_has_its_scales(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """Written by hand: `lora_unet_…` keys, alpha apart from rank, ranks and alphas of their own."""
    model = load_image_model(ModelSpec(path=str(tiny_sd_folder), dtype="float32", device="cpu"), say=lambda _: None)
    generator = torch.Generator().manual_seed(0)
    prefix = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    tensors, wanted = {}, {}
    for name, rank, alpha in (("to_q", 2, 6.0), ("to_k", 4, 1.0), ("to_v", 3, 12.0)):
        down, up = torch.randn((rank, 8), generator=generator), torch.randn((8, rank), generator=generator)
        tensors |= {f"{prefix}_{name}.lora_down.weight": down, f"{prefix}_{name}.lora_up.weight": up}
        tensors[f"{prefix}_{name}.alpha"] = torch.tensor(alpha)
        wanted[name] = alpha / rank * up @ down
    save_file(tensors, tmp_path / "kohya.safetensors")
    put_image_adapter(model, read_adapter(tmp_path / "kohya.safetensors", say=lambda _: None), "kohya")
    held = adapter_of(model.parts, "kohya")
    for name, change in wanted.items():
        pair = held.pairs[f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}"]
        assert torch.allclose(pair.delta(), change, atol=1e-5)
    x = torch.randn(1, 3, 8, generator=generator)
    layer = model.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert torch.allclose(layer(x), layer.original(x) + x @ wanted["to_q"].t(), atol=1e-5)
