"""What vLLM's LoRA loader holds, and an adapter rewritten so that it computes there what it computes here.

vLLM reads one rank and one alpha from adapter_config.json for all modules: rank_pattern gives tensors their ranks but not their
scales, and alpha_pattern is dropped without a word. Pairs of one rank whose scale lies in B are read right by every version.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError
from lorakeet.formats.limits import check_supported

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def check_vllm(adapter: Adapter) -> None:
    """ConfigError naming everything that vLLM would refuse or leave out without a word."""
    check_supported(adapter, "a vLLM adapter", kinds=("linear",), dora=False)
    largest = max(pair.rank for pair in adapter.pairs.values())
    if largest > RANKS[-1]:
        raise ConfigError(f"The largest rank is {largest}, and vLLM takes at most {RANKS[-1]}; compress it (lorakeet compress).")


def misread(adapter: Adapter) -> bool:
    """Whether vLLM would give some pair another scale: where ranks or alphas differ between modules."""
    return len({(pair.rank, pair.alpha, pair.scale_rule) for pair in adapter.pairs.values()}) > 1


def max_rank(adapter: Adapter) -> int:
    """The --max-lora-rank that the adapter needs."""
    largest = max(pair.rank for pair in adapter.pairs.values())
    return next(rank for rank in RANKS if rank >= largest)


def uniform(adapter: Adapter) -> Adapter:
    """The same changes of the weights with one rank and scale 1 everywhere: zeros fill up A and B, and B holds the scale."""
    rank = max(pair.rank for pair in adapter.pairs.values())
    return replace(adapter, pairs={path: _filled(pair, rank) for path, pair in adapter.pairs.items()})


def _filled(pair: Pair, rank: int) -> Pair:
    missing = rank - pair.rank
    A = torch.nn.functional.pad(pair.A.float(), (0, 0, 0, missing))
    B = torch.nn.functional.pad(pair.B.float() * pair.scale, (0, missing))
    return replace(pair, A=A, B=B, alpha=float(rank), scale_rule="alpha/rank")
