"""Refuses adapters with parts that a format cannot hold, with what to do instead; rewrites those that vLLM would misread.

vLLM's LoRA loader reads one rank and one alpha from adapter_config.json for all modules: rank_pattern gives tensors their ranks
but not their scales, and alpha_pattern is silently dropped. Every version reads pairs of one rank correctly whose scale is
multiplied into B.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, Problems

MERGE = "Merge the adapter into its base (lorakeet merge), or convert it --to peft, which holds everything."
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
PEFT_KEYS = ("task_type", "revision", "lora_dropout")  # of Adapter.metadata, from adapter_config.json


def metadata_without_peft(adapter: Adapter) -> dict[str, str]:
    """The adapter's metadata for formats other than PEFT's."""
    return {key: value for key, value in adapter.metadata.items() if key not in PEFT_KEYS}


def check_supported(adapter: Adapter, name: str, *, kinds: Collection[str], dora: bool, folds: bool = False) -> None:
    """Raises ConfigError naming every tensor that the format called `name` cannot hold.

    kinds: the kinds of pairs that it can hold; dora: it can hold magnitudes; folds: offer to fold them into plain pairs.
    """
    problems = Problems(f"The adapter cannot be written as {name}")
    if not adapter.pairs:
        raise ConfigError(f"The adapter has no pair that {name} could hold. {MERGE}")
    for kind in sorted({pair.kind for pair in adapter.pairs.values()} - set(kinds)):
        of_kind = (path for path, pair in adapter.pairs.items() if pair.kind == kind)
        problems.add(f"{name} cannot hold pairs of kind {kind}: {_listed(of_kind)}. {MERGE}")
    magnitudes = [path for path, pair in adapter.pairs.items() if pair.magnitude is not None]
    if magnitudes and not dora:
        fold = " Or fold them into plain pairs, at an error that is printed: --base FOLDER --rank N." if folds else ""
        problems.add(f"{name} cannot hold DoRA's magnitudes: {_listed(magnitudes)}. {MERGE}{fold}")
    for what, found in (
        ("a bias in the pairs (lora_bias)", [path for path, pair in adapter.pairs.items() if pair.bias is not None]),
        ("whole parameters (modules_to_save)", list(adapter.extras)),
        ("trained token rows", list(adapter.token_rows)),
    ):
        if found:
            problems.add(f"{name} cannot hold {what}: {_listed(found)}. {MERGE}")
    problems.raise_if_any()


def check_uniform_dora(adapter: Adapter, name: str) -> None:
    """Raises ConfigError if only some pairs are DoRA: the format has one switch for all."""
    dora = [path for path, pair in adapter.pairs.items() if pair.magnitude is not None]
    plain = [path for path, pair in adapter.pairs.items() if pair.magnitude is None]
    if dora and plain:
        raise ConfigError(
            f"{name} knows DoRA for the whole adapter only; here {_listed(dora)} are DoRA and {_listed(plain)} are not. {MERGE}"
        )


def _listed(paths: Iterable[str]) -> str:
    """At most three of the names, and how many there are."""
    names = sorted(paths)
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, … ({len(names)} in all)"


def check_vllm(adapter: Adapter) -> None:
    """Raises ConfigError naming everything that vLLM would refuse or silently drop."""
    check_supported(adapter, "a vLLM adapter", kinds=("linear",), dora=False)
    largest = max(pair.rank for pair in adapter.pairs.values())
    if largest > VLLM_RANKS[-1]:
        limit = f"vLLM takes at most {VLLM_RANKS[-1]}"
        raise ConfigError(f"The largest rank is {largest}, and {limit}; compress it (lorakeet compress).")


def misread_by_vllm(adapter: Adapter) -> bool:
    """True if ranks or alphas differ between modules, so that vLLM would use a wrong scale."""
    return len({(pair.rank, pair.alpha, pair.scale_rule) for pair in adapter.pairs.values()}) > 1


def vllm_max_rank(adapter: Adapter) -> int:
    """The --max-lora-rank that the adapter needs."""
    largest = max(pair.rank for pair in adapter.pairs.values())
    return next(rank for rank in VLLM_RANKS if rank >= largest)


def uniform(adapter: Adapter) -> Adapter:
    """The same ΔW with one rank and scale 1 everywhere: A and B are padded with zeros, and B contains the scale."""
    rank = max(pair.rank for pair in adapter.pairs.values())
    pairs = {}
    for path, pair in adapter.pairs.items():
        A = torch.nn.functional.pad(pair.A.float(), (0, 0, 0, rank - pair.rank))
        B = torch.nn.functional.pad(pair.B.float() * pair.scale, (0, rank - pair.rank))
        pairs[path] = replace(pair, A=A, B=B, alpha=float(rank), scale_rule="alpha/rank")
    return replace(adapter, pairs=pairs)
