"""What each runtime does with each feature of an adapter: loads it, refuses it, or computes something else without a word.

A table of facts with their sources. vLLM: `vllm/lora/peft_helper.py` and the engine's arguments as of October 2025. llama.cpp:
`src/llama-adapter.cpp` and this package's own GGUF adapters, which carry the true scale of every pair. Ollama: `convert/` and
`server/create.go`; it starts llama.cpp's server, and gets GGUF from here, never safetensors. PEFT: 0.21, by running it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec

Runtime = Literal["vllm", "llama.cpp", "ollama", "peft"]
Feature = Literal[
    "rank above 512", "rank above 16", "several ranks", "several scales", "rsLoRA", "DoRA", "bias in the pairs",
    "whole modules", "new tokens", "embedding pairs", "head pairs", "expert pairs", "convolution pairs",
]  # fmt: skip
Effect = Literal["refused", "wrong", "note"]


@dataclass(frozen=True)
class Limit:
    """What one runtime does with one feature, and what helps."""

    runtime: Runtime
    feature: Feature
    effect: Effect
    what: str
    remedy: str
    source: str


_ONE = "Use one rank and alpha, or merge."
_MERGE = "Merge it (lorakeet merge), or leave the feature out."
_MERGED_GGUF = "Export the merged model (lorakeet export --to gguf), or leave the feature out."
_HELPER = "vllm/lora/peft_helper.py"
_LORA = "llama.cpp src/llama-adapter.cpp"


def _gguf(feature: Feature, what: str, source: str = _LORA) -> tuple[Limit, Limit]:
    """The same limit for llama.cpp and for Ollama, which runs it."""
    return (
        Limit("llama.cpp", feature, "refused", what, _MERGED_GGUF, source),
        Limit("ollama", feature, "refused", what, _MERGED_GGUF, source),
    )


_ENGINE = "vllm/config/lora.py"
_WIDE = "Start it with --max-lora-rank as large as the rank."
LIMITS: tuple[Limit, ...] = (
    Limit("vllm", "rank above 512", "refused", "512 is the largest --max-lora-rank", "Take a smaller rank, or merge.", _ENGINE),
    Limit("vllm", "rank above 16", "note", "the server must be told", _WIDE, _ENGINE),
    Limit("vllm", "several ranks", "wrong", "every pair gets the scale of the global rank", _ONE, _HELPER),
    Limit("vllm", "several scales", "wrong", "alpha_pattern is dropped", _ONE, _HELPER),
    Limit("vllm", "DoRA", "refused", "use_dora is an error", _MERGE, _HELPER),
    Limit("vllm", "bias in the pairs", "refused", "bias other than none is an error", _MERGE, _HELPER),
    Limit("vllm", "whole modules", "refused", "modules_to_save is an error", _MERGE, _HELPER),
    Limit("vllm", "new tokens", "refused", "trained token rows have no place", _MERGE, _HELPER),
    Limit("vllm", "expert pairs", "wrong", "PEFT's target_parameters were dropped in silence", _MERGE, "vllm pull request 41384"),
    Limit("vllm", "convolution pairs", "refused", "only linear and embedding layers take pairs", _MERGE, "vllm/lora/layers"),
    *_gguf("DoRA", "GGUF adapters have no place for magnitudes", "llama.cpp issue 6536"),
    *_gguf("bias in the pairs", "GGUF adapters hold A and B only"),
    *_gguf("whole modules", "GGUF adapters hold A and B only"),
    *_gguf("new tokens", "the vocabulary of the base file is fixed"),
    *_gguf("embedding pairs", "not written to GGUF adapters here", "llama.cpp issue 11554"),
    *_gguf("head pairs", "a head that shares the embedding's weight has no tensor of its own"),
    *_gguf("expert pairs", "not written to GGUF adapters here"),
    *_gguf("convolution pairs", "language models in GGUF have none"),
)


def features_of_spec(spec: LoraSpec) -> frozenset[Feature]:
    """What an adapter with these settings will have, before it is trained."""
    ranks = {spec.rank, *spec.rank_pattern.values()}
    found: set[Feature] = set(_ranks(ranks))
    if len(ranks) > 1:
        found |= {"several ranks", "several scales"}
    if spec.alpha_pattern:
        found.add("several scales")
    if spec.scale_rule == "alpha/sqrt(rank)":
        found.add("rsLoRA")
    if spec.variant == "dora":
        found.add("DoRA")
    if spec.extra_modules:
        found.add("whole modules")
    if spec.new_tokens:
        found.add("new tokens")
    return frozenset(found | _places(spec.target_modules))


def features_of_adapter(adapter: Adapter) -> frozenset[Feature]:
    """What a finished adapter has."""
    pairs = adapter.pairs.values()
    found: set[Feature] = set(_ranks({pair.rank for pair in pairs}))
    checks: tuple[tuple[Feature, bool], ...] = (
        ("several ranks", len({pair.rank for pair in pairs}) > 1),
        ("several scales", len({pair.scale for pair in pairs}) > 1),
        ("rsLoRA", any(pair.scale_rule == "alpha/sqrt(rank)" for pair in pairs)),
        ("DoRA", any(pair.magnitude is not None for pair in pairs)),
        ("bias in the pairs", any(pair.bias is not None for pair in pairs)),
        ("whole modules", bool(adapter.extras)),
        ("new tokens", bool(adapter.token_rows)),
        ("embedding pairs", any(pair.kind == "embedding" for pair in pairs)),
        ("expert pairs", any(pair.kind == "experts" for pair in pairs)),
        ("convolution pairs", any(pair.kind == "conv2d" for pair in pairs)),
    )
    found |= {feature for feature, here in checks if here}
    return frozenset(found | (_places(adapter.pairs) & {"head pairs"}))


def limits_of(runtime: Runtime, features: Iterable[Feature]) -> tuple[Limit, ...]:
    """What stands in the way of these features on `runtime`, worst first."""
    order = {"refused": 0, "wrong": 1, "note": 2}
    wanted = set(features)
    found = [limit for limit in LIMITS if limit.runtime == runtime and limit.feature in wanted]
    return tuple(sorted(found, key=lambda limit: order[limit.effect]))


def _ranks(ranks: Iterable[int]) -> set[Feature]:
    largest = max(ranks, default=0)
    found: set[Feature] = set()
    if largest > 512:
        found.add("rank above 512")
    elif largest > 16:
        found.add("rank above 16")
    return found


def _places(names: Iterable[str]) -> set[Feature]:
    leaves = {name.rpartition(".")[2] for name in names}
    found: set[Feature] = set()
    if leaves & {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}:
        found.add("embedding pairs")
    if leaves & {"lm_head", "embed_out"}:
        found.add("head pairs")
    if leaves & {"gate_up_proj", "down_proj"} and any("experts" in name for name in names):
        found.add("expert pairs")
    return found
