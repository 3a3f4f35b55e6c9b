"""Training steps of LoRA on a UNet of published shape with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.spec import LoraSpec
from lorakeet.kinds.images.data.folder import ImageRow
from lorakeet.kinds.images.model.diffusers_import import diffusers
from lorakeet.kinds.images.model.kinds import KINDS, Conditioning
from lorakeet.kinds.images.model.latent_cache import EncodedImage
from lorakeet.kinds.images.model.model import ImageModel, image_plan
from lorakeet.kinds.images.spec import DiffusionSpec, ImageSpec
from lorakeet.kinds.images.task import ImageBatch, ImageTask
from lorakeet.models.inject import inject
from lorakeet.train.optimizer import Optimizer
from lorakeet.train.spec import TrainSpec

SHAPES: dict[str, dict[str, Any]] = {
    "SD 1.5": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "SDXL": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
POOLED = 1280


class _Told:
    """Stands for the cached text embeddings: random ones of the right shape."""

    def __init__(self, width: int, pooled: bool) -> None:
        self.told = Conditioning(torch.randn(1, 77, width), torch.randn(1, POOLED) if pooled else None)

    def of(self, caption: str) -> Conditioning:
        return self.told


class _Task(ImageTask):
    """One picture a step, with draws that need no numbers."""

    def batches(self, step: int) -> Sequence[ImageBatch]:  # type: ignore[override]
        latents = self.train[0].latents
        return [ImageBatch(latents, torch.randn_like(latents), torch.full((1,), 500), ("a photo",), self.train[0].sizes)]


def image_task(asked: dict[str, Any], *, device: str) -> tuple[ImageTask, Optimizer]:
    shape = SHAPES[asked["shape"]]
    dtype = getattr(torch, asked["dtype"])
    unet = random_unet(shape, dtype).to(device)
    scheduler = diffusers().DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    kind = KINDS["sdxl" if shape.get("addition_embed_type") else "sd"]
    pipeline = SimpleNamespace(scheduler=scheduler, vae=None, vae_scale_factor=8)
    model = ImageModel(asked["shape"], kind, pipeline, nn.ModuleDict({"unet": unet}), torch.device(device), dtype)
    lora = LoraSpec(rank=16, alpha=16, target_modules=tuple(asked["targets"]))
    inject(model.parts, image_plan(model, lora, text_encoder=False))
    side = shape["sample_size"]
    pixels = side * 8
    row = ImageRow(Path("none"), "a photo", pixels, pixels, "0", 0, "none")
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32)
    picture = EncodedImage(row, torch.randn(1, 4, side, side), sizes)
    spec = TrainSpec(steps=1, batch_size=1)
    told: Any = _Told(shape["cross_attention_dim"], kind.name == "sdxl")
    diffusion = DiffusionSpec(checkpointing=asked["checkpointing"])
    task = _Task(model, [picture], held_out=[], captions=told, spec=spec, images=ImageSpec(), diffusion=diffusion)
    return task, Optimizer(task.parameters(), spec)


def random_unet(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """A UNet of that shape with frozen random weights."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            unet = diffusers().UNet2DConditionModel(**shape).requires_grad_(False).to_empty(device="cpu")
    finally:
        torch.set_default_dtype(usual)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            _begin(name, parameter)
    return unet


def _begin(name: str, parameter: Tensor) -> None:
    if parameter.dim() == 1:
        parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    else:
        reach = (3 / parameter[0].numel()) ** 0.5
        parameter.uniform_(-reach, reach)


def one_step(task: ImageTask, optimizer: Optimizer) -> float:
    loss = task.gradients(task.batches(0), 1)
    optimizer.step(1e-4)
    return float(loss.item())

