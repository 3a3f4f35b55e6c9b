"""Tiny random Stable Diffusion pipelines in diffusers' own classes, saved as a user would have them on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lorakeet.models.files.quiet import quiet_transformers
from tiny.images import CLIP, UNET, diffusers

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
    "sample_size": 16,
}  # fmt: skip
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def save_tiny_scorer(folder: Path) -> Path:
    """A whole CLIP, of pictures and texts, with what prepares its inputs."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
              "patch_size": 8}  # fmt: skip
    torch.manual_seed(4)
    with quiet_transformers():
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

        prepared = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        CLIPModel(CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=16)).save_pretrained(folder)
        CLIPProcessor(image_processor=prepared, tokenizer=tiny_tokenizer()).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A CLIP tokenizer whose tokens are single characters."""
    from transformers import CLIPTokenizer

    pieces = [START, END, *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=12)


def save_tiny_sd(folder: Path, *, prediction: str = "epsilon") -> Path:
    """Stable Diffusion 1.x in small: 16×16 pixels, 8×8 latents of 4 channels."""
    from transformers import CLIPTextConfig, CLIPTextModel

    package = diffusers()
    tokenizer = tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        pipeline = package.StableDiffusionPipeline(
            vae=package.AutoencoderKL(**VAE),
            unet=package.UNet2DConditionModel(**UNET),
            text_encoder=CLIPTextModel(CLIPTextConfig(**{**CLIP, "vocab_size": len(tokenizer)})),
            tokenizer=tokenizer,
            scheduler=package.DDIMScheduler(**SCHEDULE, prediction_type=prediction),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(folder)
    return folder


def save_tiny_sdxl(folder: Path) -> Path:
    """SDXL in small: two text encoders, pooled text and sizes as further conditions, linear projections."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    package = diffusers()
    config, wider = (
        CLIPTextConfig(**{**CLIP, "vocab_size": len(tiny_tokenizer()), "hidden_act": "gelu", "hidden_size": width})
        for width in (16, 24)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        unet = package.UNet2DConditionModel(
            **{**UNET, "cross_attention_dim": 40}, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(2, 1),
        )  # fmt: skip
        pipeline = package.StableDiffusionXLPipeline(
            vae=package.AutoencoderKL(**VAE), unet=unet,
            text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(wider),
            tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(),
            scheduler=package.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1
            ),
        )  # fmt: skip
        pipeline.save_pretrained(folder)
    return folder


FLOW_VAE: dict[str, Any] = {**VAE, "latent_channels": 4, "scaling_factor": 1.5, "shift_factor": 0.1,
                            "use_quant_conv": False, "use_post_quant_conv": False}  # fmt: skip


def tiny_t5() -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer, whose tokens are single characters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS, *(f"<extra_id_{number}>" for number in range(99, -1, -1))]
    tokenizer = T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces])
    config = T5Config(
        vocab_size=len(pieces), d_model=32, d_ff=40, d_kv=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config), tokenizer


def save_tiny_sd3(folder: Path, *, t5: bool = True) -> Path:
    """SD3 in small: a transformer over patches of latents and text, two CLIP encoders and T5, rectified flow shifted by 3."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    package, tokenizer = diffusers(), tiny_tokenizer()
    config = CLIPTextConfig(**{**CLIP, "vocab_size": len(tokenizer), "hidden_act": "gelu", "projection_dim": 8, "hidden_size": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        transformer = package.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16,
            pos_embed_max_size=12,
        )  # fmt: skip
        encoder, reader = tiny_t5() if t5 else (None, None)
        package.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=package.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=package.AutoencoderKL(**FLOW_VAE),
            text_encoder=CLIPTextModelWithProjection(config), tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer, text_encoder_3=encoder, tokenizer_3=reader,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def save_tiny_flux(folder: Path) -> Path:
    """FLUX.1-dev in small: double and single blocks, rotary places, guidance as a number, CLIP's pooled text and T5's states."""
    from transformers import CLIPTextConfig, CLIPTextModel

    package, tokenizer = diffusers(), tiny_tokenizer()
    config = CLIPTextConfig(**{**CLIP, "vocab_size": len(tokenizer)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        transformer = package.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        encoder, reader = tiny_t5()
        package.FluxPipeline(
            transformer=transformer, scheduler=package.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=package.AutoencoderKL(**FLOW_VAE), text_encoder=CLIPTextModel(config), tokenizer=tokenizer,
            text_encoder_2=encoder, tokenizer_2=reader,
        ).save_pretrained(folder)  # fmt: skip
    return folder
