"""Claim: converting an adapter changes no effective ΔW by more than 1e-6, relative, from any format to any other and back.

    python benchmarks/round_trips.py [--rank 8]

Adapters of the true widths of SmolLM2-135M, SD 1.5 and SDXL on every linear layer and convolution, random A and B, ranks of
r/2, r and 3r/4 and two alphas, rsLoRA among them. Each goes from PEFT to one format and on to another; the number is the
largest ‖ΔW − ΔW'‖ / ‖ΔW‖ of any matrix. Needs no weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from harness.machine import origin, write_result
from rich.console import Console
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.formats.compare import LIMIT, compare_adapters
from lorakeet.formats.components import with_components, without_component
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.peft import peft
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions

LLAMA = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
CLIP = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SUFFIX = {"kohya": ".safetensors", "diffusers": ".safetensors", "gguf": ".gguf"}
QUIET = Console(quiet=True)


def modules(model: torch.nn.Module, prefix: str = "") -> Iterable[tuple[str, tuple[int, ...]]]:
    """Path and weight's shape of every linear layer and convolution but the head."""
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and path != "lm_head":
            yield prefix + path, tuple(module.weight.shape)


def random_adapter(shapes: Iterable[tuple[str, tuple[int, ...]]], rank: int) -> Adapter:
    torch.manual_seed(0)
    pairs: dict[str, Pair] = {}
    for index, (path, shape) in enumerate(shapes):
        own = min((rank // 2, rank, rank * 3 // 4)[index % 3], *shape[:2])
        A, B = torch.randn(own, *shape[1:]), torch.randn(shape[0], own, *[1] * (len(shape) - 2))
        rule = "alpha/sqrt(rank)" if index % 5 == 0 else "alpha/rank"
        pairs[path] = Pair(A, B, (3.0 * rank, 20.0)[index % 2], "conv2d" if len(shape) == 4 else "linear", rule)
    return Adapter(pairs)


def adapters(rank: int) -> dict[str, tuple[Adapter, tuple[str, ...]]]:
    with torch.device("meta"):
        llama, clip = LlamaForCausalLM(LLAMA), CLIPTextModel(CLIP)
        unets = {"SD 1.5": UNet2DConditionModel(cross_attention_dim=768), "SDXL": UNet2DConditionModel(**SDXL)}
    found = {"SmolLM2-135M": (random_adapter(modules(llama), rank), ("peft", "gguf", "mlx"))}
    for name, unet in unets.items():
        shapes = [*modules(unet, "unet."), *modules(clip, "text_encoder.text_model.")]
        found[name] = (random_adapter(shapes, rank), ("peft", "kohya", "diffusers"))
    return found


def matrix(adapter: Adapter, formats: tuple[str, ...], folder: Path) -> dict[str, float]:
    """The largest relative difference of each route, PEFT to the first format to the second."""
    config = folder / "base.json"
    config.write_text(json.dumps({**LLAMA.to_dict(), "model_type": "llama"}, default=str))
    peft.write(without_component(adapter), folder / "start")
    found: dict[str, float] = {}
    for first in formats:
        there = folder / f"{first}{SUFFIX.get(first, '')}"
        convert(ConvertOptions(folder / "start", there, to=first, base=config if first == "gguf" else None), console=QUIET)  # type: ignore[arg-type]
        for second in formats:
            back = folder / f"{first}-{second}{SUFFIX.get(second, '')}"
            convert(ConvertOptions(there, back, to=second, base=config if second == "gguf" else None), console=QUIET)  # type: ignore[arg-type]
            difference = compare_adapters(adapter, with_components(read_adapter(back)))
            assert not difference.problems, difference.problems
            found[f"{first} to {second}"] = difference.worst
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=8, help="the largest rank")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    results: dict[str, Any] = {}
    for name, (adapter, formats) in adapters(given.rank).items():
        with TemporaryDirectory() as folder:
            found = matrix(adapter, formats, Path(folder))
        results[name] = {"pairs": len(adapter.pairs), "parameters": adapter.parameters, "largest_relative_difference": found}
        for route, worst in found.items():
            print(f"{name:14} {len(adapter.pairs):4} pairs   peft to {route:24} {worst:.1e}")
    kept = all(worst <= LIMIT for part in results.values() for worst in part["largest_relative_difference"].values())
    print(f"Every route within {LIMIT:g}: {'yes' if kept else 'NO'}")
    content = {"limit": LIMIT, "rank": given.rank, "adapters": results, "kept": kept}
    print(f"Written: {write_result('round_trips', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
