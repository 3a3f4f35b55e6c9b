"""A tiny random Stable Diffusion: a UNet whose modules are a part of SD 1.x's, and CLIP's text encoder, in the real classes."""

from __future__ import annotations

import warnings
from typing import Any

import torch

UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 12, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def diffusers() -> Any:
    """The package diffusers; what it warns of on import is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers as package
        import diffusers.loaders.lora_pipeline
        import diffusers.loaders.peft
    return package


def tiny_unet(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers().UNet2DConditionModel(**{**UNET, **changes}).eval().requires_grad_(False)


def tiny_clip(seed: int = 1) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    return CLIPTextModel(CLIPTextConfig(**CLIP)).eval().requires_grad_(False)


def noise_of(unet: Any) -> torch.Tensor:
    """What the UNet predicts for a fixed input."""
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([7]), encoder_hidden_states=context).sample


def states_of(clip: Any) -> torch.Tensor:
    """CLIP's hidden states for a fixed prompt."""
    with torch.no_grad():
        return clip(torch.tensor([[0, 5, 9, 33, 1]])).last_hidden_state


def load_into(path: Any, unet: Any = None, clip: Any = None) -> None:
    """Loads a LoRA file as diffusers' Stable Diffusion pipeline does, into the parts that are given."""
    mixin = diffusers().loaders.StableDiffusionLoraLoaderMixin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors, alphas, metadata = mixin.lora_state_dict(
            str(path.parent), weight_name=path.name, unet_config=None if unet is None else unet.config, return_lora_metadata=True
        )
        if unet is not None:
            mixin.load_lora_into_unet(tensors, alphas, unet, metadata=metadata)
        if clip is not None:
            _load_into_clip(tensors, alphas, clip, metadata)


def _load_into_clip(tensors: Any, alphas: Any, clip: Any, metadata: Any) -> None:
    """What diffusers does for a text encoder, without transformers' `load_adapter`, which wants a later PEFT."""
    import peft
    from diffusers.loaders.lora_base import _create_lora_config
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    def own(values: Any) -> Any:
        found = {key.removeprefix("text_encoder."): value for key, value in values.items() if key.startswith("text_encoder.")}
        return found or None

    state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own(tensors)))
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    ranks = {key: value.shape[1] for key, value in state.items() if key.endswith("lora_B.weight")}
    config = _create_lora_config(
        state, own(alphas or {}), own(metadata) if metadata else None, ranks, is_unet=False
    )
    peft.inject_adapter_in_model(config, clip)
    result = peft.set_peft_model_state_dict(clip, state)
    assert not result.unexpected_keys


def sd_adapter(unet: Any, clip: Any, *, dora: bool = False) -> Any:
    """Pairs of mixed ranks and alphas on attention, convolutions and text encoder, at paths as they stand on disk."""
    from lorakeet.core.adapter import Adapter
    from tiny.adapters import random_pair

    torch.manual_seed(6)
    found = [(f"unet.{path}", module.weight) for path, module in unet.named_modules()
             if path.endswith(("to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"))]  # fmt: skip
    found += [(f"text_encoder.text_model.{path}", module.weight) for path, module in clip.named_modules()
              if path.endswith(("q_proj", "out_proj", "fc1"))]  # fmt: skip
    pairs = {}
    for index, (path, weight) in enumerate(found):
        kind = "conv2d" if weight.dim() == 4 else "linear"
        pairs[path] = random_pair(kind, weight, rank=(2, 4, 3)[index % 3], alpha=(12.0, 20.0)[index % 2], dora=dora)
    return Adapter(pairs)


def fold_images(adapter: Any, unet: Any, clip: Any) -> None:
    """Writes the adapter into the weights of both parts."""
    from lorakeet.core.adapter import Adapter
    from tiny.dense import fold_into

    pairs = {path.replace("text_encoder.text_model.", "text_encoder."): pair for path, pair in adapter.pairs.items()}
    fold_into(torch.nn.ModuleDict({"unet": unet, "text_encoder": clip}), Adapter(pairs))
