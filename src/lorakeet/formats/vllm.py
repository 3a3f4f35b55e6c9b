"""Limits of vLLM's LoRA loader, and rewriting an adapter so that vLLM computes the same.

vLLM reads one rank and one alpha from adapter_config.json for all modules: rank_pattern gives tensors their ranks but not their
scales, and alpha_pattern is silently dropped. Every version reads pairs of one rank correctly whose scale is multiplied into B.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError
from lorakeet.formats.limits import check_supported

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def check_vllm(adapter: Adapter) -> None:
    """Raises ConfigError naming everything that vLLM would refuse or silently drop."""
    check_supported(adapter, "a vLLM adapter", kinds=("linear",), dora=False)
    largest = max(pair.rank for pair in adapter.pairs.values())
    if largest > RANKS[-1]:
        raise ConfigError(f"The largest rank is {largest}, and vLLM takes at most {RANKS[-1]}; compress it (lorakeet compress).")


def misread(adapter: Adapter) -> bool:
    """True if ranks or alphas differ between modules, so that vLLM would use a wrong scale."""
    return len({(pair.rank, pair.alpha, pair.scale_rule) for pair in adapter.pairs.values()}) > 1


def max_rank(adapter: Adapter) -> int:
    """The --max-lora-rank that the adapter needs."""
    largest = max(pair.rank for pair in adapter.pairs.values())
    return next(rank for rank in RANKS if rank >= largest)


def uniform(adapter: Adapter) -> Adapter:
    """The same ΔW with one rank and scale 1 everywhere: A and B are padded with zeros, and B contains the scale."""
    rank = max(pair.rank for pair in adapter.pairs.values())
    pairs = {}
    for path, pair in adapter.pairs.items():
        A = torch.nn.functional.pad(pair.A.float(), (0, 0, 0, rank - pair.rank))
        B = torch.nn.functional.pad(pair.B.float() * pair.scale, (0, rank - pair.rank))
        pairs[path] = replace(pair, A=A, B=B, alpha=float(rank), scale_rule="alpha/rank")
    return replace(adapter, pairs=pairs)
