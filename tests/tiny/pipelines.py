"""Tiny random Stable Diffusion pipelines in diffusers' own classes, saved as a user would have them on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

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
    config = CLIPTextConfig(**{**CLIP, "vocab_size": len(tiny_tokenizer()), "hidden_act": "gelu"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        unet = package.UNet2DConditionModel(
            **{**UNET, "cross_attention_dim": 32}, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8, transformer_layers_per_block=(2, 1),
        )  # fmt: skip
        pipeline = package.StableDiffusionXLPipeline(
            vae=package.AutoencoderKL(**VAE), unet=unet,
            text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
            tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(),
            scheduler=package.EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1
            ),
        )  # fmt: skip
        pipeline.save_pretrained(folder)
    return folder
