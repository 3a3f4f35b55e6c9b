"""Which features of an adapter each runtime supports, refuses, or silently computes wrongly.

A table of facts with their sources. vLLM: `vllm/lora/peft_helper.py` and the engine's arguments as of October 2025, and one real
attempt for each rule (benchmarks/results). Versions differ: several ranks and scales are right in VLLM_TRIED. llama.cpp:
`src/llama-adapter.cpp` and this package's own GGUF adapters, which carry the true scale of every pair. Ollama: `convert/` and
`server/create.go`; it starts llama.cpp's server, and gets GGUF from here, never safetensors. PEFT: 0.21, by running it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.errors import ConfigError

Runtime = Literal["vllm", "llama.cpp", "ollama", "peft"]
Feature = Literal[
    "rank above 512", "rank above 16", "several ranks", "several scales", "rsLoRA", "DoRA", "bias in the pairs",
    "whole modules", "new tokens", "embedding pairs", "tied head pairs", "expert pairs", "convolution pairs",
]  # fmt: skip
Effect = Literal["refused", "wrong", "note"]
VLLM_TRIED = "0.32.0"


@dataclass(frozen=True)
class Limit:
    """What a runtime does with a feature, and the remedy."""

    runtime: Runtime
    feature: Feature
    effect: Effect
    what: str
    remedy: str
    source: str
    seen: str = ""  # of vLLM: what version VLLM_TRIED did with a real adapter; empty where none was tried

    @property
    def evidence(self) -> str:
        """Where the rule is from, and what was seen."""
        return f"{self.source}; {self.runtime} {VLLM_TRIED}, tried: {self.seen}" if self.seen else self.source


_ONE = "Use one rank and alpha (ranks.choose given), or merge."
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
_SMALLER = "Take a smaller rank, or merge."
_WIDE = "Start it with --max-lora-rank as large as the rank."
LIMITS: tuple[Limit, ...] = (
    Limit("vllm", "rank above 512", "refused", "512 is the largest --max-lora-rank", _SMALLER, _ENGINE, "refused"),
    Limit("vllm", "rank above 16", "note", "the server needs a larger --max-lora-rank", _WIDE, _ENGINE, "right"),
    Limit("vllm", "several ranks", "wrong", "older versions scale every pair by the global rank", _ONE, _HELPER, "right"),
    Limit("vllm", "several scales", "wrong", "older versions drop alpha_pattern", _ONE, _HELPER, "right"),
    Limit("vllm", "DoRA", "refused", "use_dora is an error", _MERGE, _HELPER, "refused"),
    Limit("vllm", "bias in the pairs", "refused", "lora_bias is an error", _MERGE, _HELPER, "refused"),
    Limit("vllm", "whole modules", "refused", "modules_to_save is an error", _MERGE, _HELPER, "refused"),
    Limit("vllm", "new tokens", "refused", "trained token rows are not supported", _MERGE, _HELPER, "refused"),
    Limit("vllm", "expert pairs", "wrong", "PEFT's target_parameters were silently dropped", _MERGE, "vllm pull request 41384"),
    Limit("vllm", "convolution pairs", "refused", "only linear and embedding layers take pairs", _MERGE, "vllm/lora/layers"),
    *_gguf("DoRA", "GGUF adapters cannot hold magnitudes", "llama.cpp issue 6536"),
    *_gguf("bias in the pairs", "GGUF adapters hold A and B only"),
    *_gguf("whole modules", "GGUF adapters hold A and B only"),
    *_gguf("new tokens", "the vocabulary of the base file is fixed"),
    *_gguf("embedding pairs", "not written to GGUF adapters here", "llama.cpp issue 11554"),
    *_gguf("tied head pairs", "a head that shares the embedding's weight has no tensor of its own"),
    *_gguf("expert pairs", "not written to GGUF adapters here"),
    *_gguf("convolution pairs", "language models in GGUF have none"),
)


def features_of_plan(plan: Plan, *, tied: bool, auto: int = 0) -> frozenset[Feature]:
    """The features of an adapter of this plan, before it is trained; `tied` as in `features_of_adapter`.

    `auto`: the highest rank that ranks.choose auto or prune may give, 0 if ranks are given. With it, layers differ in rank and in
    scale or alpha.
    """
    found = _features({entry.path: entry for entry in plan.entries}, tied)
    if auto:
        found -= {"rank above 512", "rank above 16", "several ranks", "several scales"}
        found |= _ranks([min(auto, max((entry.largest_rank for entry in plan.entries), default=0))])
        if auto > 1 and len(plan.entries) > 1:
            found |= {"several ranks", "several scales"}
    checks: tuple[tuple[Feature, bool], ...] = (
        ("DoRA", any(entry.variant == "dora" for entry in plan.entries)),
        ("whole modules", any(extra.kind == "module" for extra in plan.extras)),
        ("new tokens", any(extra.kind == "rows" for extra in plan.extras)),
    )
    return frozenset(found | {feature for feature, here in checks if here})


def features_of_adapter(adapter: Adapter, *, tied: bool) -> frozenset[Feature]:
    """The features of a finished adapter; `tied`: its base's head shares the embedding's weight (see `has_head`)."""
    pairs = adapter.pairs.values()
    checks: tuple[tuple[Feature, bool], ...] = (
        ("DoRA", any(pair.magnitude is not None for pair in pairs)),
        ("bias in the pairs", any(pair.bias is not None for pair in pairs)),
        ("whole modules", bool(adapter.extras)),
        ("new tokens", bool(adapter.token_rows)),
    )
    return frozenset(_features(adapter.pairs, tied) | {feature for feature, here in checks if here})


def has_head(paths: Iterable[str]) -> bool:
    """True if one of these modules is an output head, which some bases tie to their embedding."""
    return any(path.rpartition(".")[2] in ("lm_head", "embed_out") for path in paths)


def limits_of(runtime: Runtime, features: Iterable[Feature]) -> tuple[Limit, ...]:
    """The limits of `runtime` for these features, worst first."""
    order = {"refused": 0, "wrong": 1, "note": 2}
    wanted = set(features)
    found = [limit for limit in LIMITS if limit.runtime == runtime and limit.feature in wanted]
    return tuple(sorted(found, key=lambda limit: order[limit.effect]))


def _features(pairs: Mapping[str, Pair | PlanEntry], tied: bool) -> set[Feature]:
    every = pairs.values()
    kinds = {pair.kind for pair in every}
    checks: tuple[tuple[Feature, bool], ...] = (
        ("several ranks", len({pair.rank for pair in every}) > 1),
        ("several scales", len({pair.scale for pair in every}) > 1),
        ("rsLoRA", any(pair.scale_rule == "alpha/sqrt(rank)" for pair in every)),
        ("embedding pairs", "embedding" in kinds),
        ("tied head pairs", tied and has_head(pairs)),
        ("expert pairs", "experts" in kinds),
        ("convolution pairs", "conv2d" in kinds),
    )
    return {feature for feature, here in checks if here} | _ranks(pair.rank for pair in every)


def _ranks(ranks: Iterable[int]) -> set[Feature]:
    largest = max(ranks, default=0)
    if largest > 512:
        return {"rank above 512"}
    return {"rank above 16"} if largest > 16 else set()
REFUSES_ADAPTERS = (
    "Ollama from 0.34.1 refuses a Modelfile with ADAPTER, so a folder of --separate is for older versions and for llama.cpp. "
    "For a newer Ollama leave out --separate: the adapter is then merged into the model."
)


def require_separable(adapter: Adapter) -> None:
    """ConfigError where the adapter has what a GGUF adapter beside its base cannot hold."""
    limits = limits_of("ollama", features_of_adapter(adapter, tied=False))
    if refused := [f"{limit.feature} ({limit.what})" for limit in limits if limit.effect == "refused"]:
        raise ConfigError(
            f"--separate: this adapter cannot stay in a file of its own for Ollama: {'; '.join(refused)}. Leave out --separate: "
            "the merged model holds all of it."
        )
