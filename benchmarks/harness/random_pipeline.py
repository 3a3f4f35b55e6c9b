"""Stable Diffusion 1.5 in its true shape with random weights, and pictures: speed and memory do not depend on their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.image_step import SHAPES, random_unet
from PIL import Image

from lorakeet.kinds.images.model.diffusers_import import quiet_diffusers

SIDE = 512
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "latent_channels": 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "sample_size": SIDE,
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def write_random_pipeline(folder: Path, *, seed: int = 0) -> None:
    """Writes the pipeline to `folder` in fp32, as the published one lies on the hub: 4.3 GB."""
    torch.manual_seed(seed)
    with quiet_diffusers():
        import diffusers
        from transformers import CLIPTextConfig, CLIPTextModel

        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            clip_sample=False, set_alpha_to_one=False,
        )  # fmt: skip
        vae: Any = diffusers.AutoencoderKL(in_channels=3, out_channels=3, **VAE)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae, unet=random_unet(SHAPES["SD 1.5"], torch.float32), text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            tokenizer=_tokenizer(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(folder)


def write_random_pictures(folder: Path, count: int, *, seed: int = 0) -> None:
    """Writes `count` smooth pictures of SIDE² pixels, with captions beside them."""
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(seed)
    for number in range(count):
        few = Image.fromarray(drawn.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        few.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of thing {number}", encoding="utf-8")


def _tokenizer() -> Any:
    """Letters and figures alone; captions are padded to CLIP's 77 tokens whatever they hold."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "of</w>"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[("o", "f</w>")], model_max_length=77)
