"""A small latent diffusion model in Stable Diffusion's own classes, trained from scratch, for machines without its weights."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from demos.fashion.photos import KINDS, SIDE, UNSEEN, Photos, caption, in_colour
from lorakeet.kinds.images.model.diffusers_import import quiet_diffusers

START, END = "<|startoftext|>", "<|endoftext|>"
LOOKS = ("", "clear", "small", "plain")  # words that mean nothing to the pictures, so that captions differ
VAE = {"block_out_channels": (16, 32, 64), "down_block_types": ("DownEncoderBlock2D",) * 3, "latent_channels": 4,
       "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "norm_num_groups": 8, "sample_size": SIDE}  # fmt: skip
UNET = {"sample_size": SIDE // 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (64, 128), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64, "attention_head_dim": 4, "norm_num_groups": 16}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 64,
        "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """The length of the pre-training, in optimizer steps."""

    autoencoder: int = 800
    denoiser: int = 2000
    batch: int = 32
    pictures: int = 16_000  # so many of the kinds that it may see, drawn once


def pretrained(folder: Path, photos: Photos, labels: NDArray[np.uint8], budget: Budget) -> Path:
    """The pipeline in `folder`; trained from scratch on every kind but UNSEEN, seed 0, unless it exists with these settings."""
    made, settings = folder / "made-with.txt", repr((VAE, UNET, TEXT, budget))
    if made.is_file() and made.read_text(encoding="utf-8") == settings:
        print(f"The base model is in {folder}.")
        return folder
    torch.manual_seed(0)
    seen = np.flatnonzero(~np.isin(labels, [KINDS.index(kind) for kind in UNSEEN]))
    seen = np.random.default_rng(1).permutation(seen)[: budget.pictures]
    pixels = torch.from_numpy(in_colour(photos[seen])).permute(0, 3, 1, 2)
    kinds = [KINDS[label] for label in labels[seen]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = new_pipeline()
        train_autoencoder(pipeline.vae, pixels, budget)
        latents = encode_all(pipeline.vae, pixels)
        pipeline.vae.register_to_config(scaling_factor=float(1 / latents.std()))
        train_denoiser(pipeline, latents * pipeline.vae.config.scaling_factor, kinds, budget)
        pipeline.save_pretrained(folder)
    made.write_text(settings, encoding="utf-8")
    return folder


def new_pipeline() -> Any:
    """Random weights and a tokenizer of the captions' own words."""
    with quiet_diffusers():
        import diffusers
        from transformers import CLIPTextConfig, CLIPTextModel

        tokenizer = new_tokenizer()
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            clip_sample=False, set_alpha_to_one=False,
        )  # fmt: skip
        return diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(in_channels=3, out_channels=3, **VAE),
            unet=diffusers.UNet2DConditionModel(**UNET),
            text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT)),
            tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def new_tokenizer() -> Any:
    """CLIP's kind of tokenizer, its merges trained on the captions; unknown words are split into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz-"]
    learnt = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learnt.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[START, END], initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learnt.train_from_iterator([caption(kind, look=look) for kind in KINDS for look in LOOKS if kind not in UNSEEN], trainer)
    model = json.loads(learnt.to_str())["model"]
    pieces = list(dict.fromkeys([*model["vocab"], *(f"{letter}</w>" for letter in letters)]))
    vocab = {piece: place for place, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT["max_position_embeddings"])


def train_autoencoder(vae: Any, pixels: Tensor, budget: Budget) -> None:
    """Squared error with a little KL, AdamW, a cosine to zero."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    for step, batch in _batches(len(pixels), budget.autoencoder, budget.batch, "autoencoder"):
        wanted = scaled(pixels[batch])
        posterior = vae.encode(wanted).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(restored, wanted) + 1e-4 * posterior.kl().mean() / math.prod(posterior.mean.shape[1:])
        _step(optimizer, loss, 2e-3, step, budget.autoencoder)


def encode_all(vae: Any, pixels: Tensor, at_once: int = 256) -> Tensor:
    """The means of all latents."""
    with torch.no_grad():
        return torch.cat([vae.encode(scaled(part)).latent_dist.mean for part in pixels.split(at_once)])


def train_denoiser(pipeline: Any, latents: Tensor, kinds: list[str], budget: Budget) -> None:
    """UNet and text encoder together: epsilon prediction, a tenth of the captions left out, AdamW, a cosine to zero."""
    import diffusers

    unet, encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    noises = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    told = {text: pipeline.tokenizer(text, padding="max_length", truncation=True).input_ids
            for text in ["", *(caption(kind, look=look) for kind in KINDS for look in LOOKS)]}  # fmt: skip
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    for step, batch in _batches(len(latents), budget.denoiser, budget.batch, "denoiser"):
        looks = torch.randint(len(LOOKS), (len(batch),)).tolist()
        dropped = (torch.rand(len(batch)) < 0.1).tolist()
        texts = [
            "" if drop else caption(kinds[row], look=LOOKS[look])
            for row, look, drop in zip(batch.tolist(), looks, dropped, strict=True)
        ]
        clean, noise = latents[batch], torch.randn_like(latents[batch])
        timesteps = torch.randint(1000, (len(batch),))
        states = encoder(torch.tensor([told[text] for text in texts]))[0]
        predicted = unet(noises.add_noise(clean, noise, timesteps), timesteps, encoder_hidden_states=states).sample
        _step(optimizer, F.mse_loss(predicted, noise), 1e-3, step, budget.denoiser)
    unet.eval()
    encoder.eval()


def scaled(pixels: Tensor) -> Tensor:
    """uint8 to [−1, 1]."""
    return pixels.float() / 127.5 - 1


def _batches(rows: int, steps: int, size: int, what: str) -> Any:
    began = time.perf_counter()
    for step in range(steps):
        yield step, torch.randint(rows, (size,))
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"  {what}: step {step + 1} of {steps}, {time.perf_counter() - began:.0f} s", flush=True)


def _step(optimizer: Any, loss: Tensor, rate: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
