"""Adapters with pairs on stacked experts, served: each text is what transformers' generate writes with PEFT and its adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft as real_peft
import pytest
import torch
from torch import nn

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.layers.experts import LoraExperts, stack_shape
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.peft import peft
from lorakeet.models import modules
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.adapter_files import inspect_adapter, read_stored_adapter
from lorakeet.serve.engine import Engine
from lorakeet.serve.registry import AdapterMemoryFull, Registry, expert_capacity
from tiny.asking import Asking
from tiny.family_columns import in_transformers, saved

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")  # gpt-oss: transposed, biased, interleaved experts, and attention sinks
PROMPTS = ((30, 51, 77), tuple(range(40, 62)), (200, 5, 11, 250), (99, 98, 97, 96, 95))
TOKENS = 8
MANY = 2000  # adapters on one model


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(request.param, tmp_path)


@pytest.fixture
def live(folder: Path) -> ServingModel:
    return ServingModel(load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda _: None))


@pytest.fixture
def server(live: ServingModel) -> Iterator[Asking]:
    engine = Engine(live.text, live.selection, slots=4, context=64, chunk=8)
    engine.start()
    yield Asking(engine)
    engine.drain(timeout=0.0)


@pytest.fixture
def registry(live: ServingModel, server: Asking) -> Registry:
    return Registry(live, server.engine, base="base")


def experts_adapter(model: nn.Module, *, seed: int, rank: int = 2, first: bool = True) -> Adapter:
    """Random pairs on q_proj and on every parameter of experts; without `first` on the last one alone."""
    generator, pairs = torch.Generator().manual_seed(seed), dict[str, Pair]()
    for path, module in modules.original_modules(model):
        leaves = modules.expert_stacks(module)
        for leaf in leaves if first else leaves[-1:]:
            experts, out, width = stack_shape(module, leaf)
            A, B = (torch.randn(experts, *size, generator=generator) * 0.3 for size in ((rank, width), (out, rank)))
            pairs[f"{path}.{leaf}"] = Pair(A, B, 3.0 * rank, "experts")
        if path.endswith("q_proj"):
            out, width = module.weight.shape  # type: ignore[misc, operator]
            A, B = (torch.randn(*size, generator=generator) * 0.1 for size in ((rank, width), (out, rank)))
            pairs[path] = Pair(A, B, 3.0 * rank)
    return Adapter(pairs, base="base")


def generated(folder: Path, adapter: Path | None, prompt: tuple[int, ...]) -> list[int]:
    """Greedily by transformers, with PEFT's reading of the adapter; without the end token."""
    model = in_transformers(folder)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = model if adapter is None else real_peft.PeftModel.from_pretrained(model, adapter).eval()
        written = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=3, eos_token_id=2
        )[0].tolist()[len(prompt) :]
    return written[: written.index(2)] if 2 in written else written


@pytest.mark.slow
def test_texts_of_a_mixed_batch_are_those_of_transformers_with_each_adapter(
    folder: Path, live: ServingModel, registry: Registry, server: Asking, tmp_path: Path
) -> None:
    bare = in_transformers(folder)
    for seed, name in enumerate("ab"):
        peft.write(experts_adapter(bare, seed=seed, rank=2 + seed, first=name == "a"), tmp_path / name)
        registry.load(name, tmp_path / name)
    wanted = {name: [generated(folder, tmp_path / name if name else None, ids) for ids in PROMPTS] for name in ("a", "b", "")}
    leases = {name: registry.lease(name or "base") for name in wanted}
    for turn in range(3):  # every prompt meets every adapter, beside others with other ones
        names = [("a", "b", "")[(turn + place) % 3] for place in range(len(PROMPTS))]
        begun = [
            server.begin(ids, leases[name].adapters, max_tokens=TOKENS) for ids, name in zip(PROMPTS, names, strict=True)
        ]
        found = [server.end(job).ids for job in begun]
        assert found == [wanted[name][place] for place, name in enumerate(names)]
    assert len({tuple(texts[1]) for texts in wanted.values()}) == 3, "the adapters and the base write different texts"


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_an_adapter_is_replaced_and_unloaded_while_it_is_served(
    folder: Path, live: ServingModel, registry: Registry, server: Asking, tmp_path: Path
) -> None:
    bare = in_transformers(folder)
    for seed in range(2):
        peft.write(experts_adapter(bare, seed=seed), tmp_path / f"a{seed}")
    for seed in range(2):
        version = registry.load("a", tmp_path / f"a{seed}", replace=True)
        lease = registry.lease("a")
        found = server.ask(PROMPTS[1], lease.adapters, max_tokens=TOKENS).ids
        registry.release(lease)
        assert found == generated(folder, tmp_path / f"a{seed}", PROMPTS[1])
        assert live.names == (version.key,), "the version before is gone"
    registry.unload("a")
    blocks = [layer for _, layer in modules.adapted_layers(live.text.model) if isinstance(layer, LoraExperts)]
    assert len(blocks) == 4 and not any(len(layer.adapters) for layer in blocks) and registry.resident_bytes == 0


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
def test_a_weighted_mix_is_the_sum_of_the_changes(
    folder: Path, live: ServingModel, registry: Registry, server: Asking, tmp_path: Path
) -> None:
    bare = in_transformers(folder)
    adapters = [experts_adapter(bare, seed=seed) for seed in range(2)]
    for name, adapter in zip("ab", adapters, strict=True):
        peft.write(adapter, tmp_path / name)
        registry.load(name, tmp_path / name)
    summed = {}
    for path, pair in adapters[0].pairs.items():
        other, along = adapters[1].pairs[path], (1, 2) if pair.kind == "experts" else (0, 1)
        parts = 0.4 * pair.scale * pair.B, 0.6 * other.scale * other.B
        A, B = torch.cat([pair.A, other.A], along[0]), torch.cat(parts, along[1])
        summed[path] = Pair(A, B, 4.0, pair.kind)
    peft.write(Adapter(summed, base="base"), tmp_path / "sum")
    lease = registry.lease("a*0.4+b*0.6")
    found = server.ask(PROMPTS[1], lease.adapters, max_tokens=TOKENS).ids
    registry.release(lease)
    assert found == generated(folder, tmp_path / "sum", PROMPTS[1]) != generated(folder, tmp_path / "a", PROMPTS[1])


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_memory_counts_pairs_on_experts_once_and_the_server_says_how_many_fit(
    folder: Path, live: ServingModel, server: Asking, tmp_path: Path
) -> None:
    bare = in_transformers(folder)
    for seed, name in enumerate("abc"):
        peft.write(experts_adapter(bare, seed=seed), tmp_path / name)
    source = inspect_adapter(tmp_path / "a", live)
    adapter, _ = read_stored_adapter(source, "a", live)
    parts = [part for pair in adapter.pairs.values() for part in (pair.A, pair.B)]
    assert sum(part.untyped_storage().nbytes() for part in parts) == source.bytes, "nothing of the file stays beside them"
    linear = 4 * sum(pair.A.numel() + pair.B.numel() for pair in adapter.pairs.values() if pair.kind == "linear")
    assert source.filled == linear == source.bytes - source.of_experts
    assert source.beside == (tmp_path / "a" / peft.MODEL_NAME).stat().st_size > source.bytes
    budget = 2 * source.bytes + linear + source.beside  # the second is read beside the first and its working copy
    registry = Registry(live, server.engine, base="base", budget=budget)
    assert expert_capacity(registry) == []
    for name in "abc":
        registry.register(name, tmp_path / name)
    [said] = expert_capacity(registry)
    assert "3 adapters have pairs on experts" in said and "Of such, 2 fit in memory at once (--memory)" in said
    texts = {}
    for name in "abcabc":
        lease = registry.lease(name)
        found = server.ask(PROMPTS[1], lease.adapters, max_tokens=TOKENS).ids
        registry.release(lease)
        assert registry.resident <= 2 and texts.setdefault(name, found) == found
    small = Registry(live, server.engine, base="base", budget=source.bytes - 1)
    small.register("a", tmp_path / "a")
    assert "None of them fits" in expert_capacity(small)[0]
    with pytest.raises(AdapterMemoryFull):
        small.lease("a")


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_memory_is_free_before_an_adapter_is_read(
    folder: Path, live: ServingModel, server: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, seen = in_transformers(folder), list[int]()
    for seed, name in enumerate("abc"):
        peft.write(experts_adapter(bare, seed=seed), tmp_path / name)
    source = inspect_adapter(tmp_path / "a", live)
    budget = 2 * source.bytes + source.filled + source.beside
    registry = Registry(live, server.engine, base="base", budget=budget)

    def watched(*given: Any) -> Any:
        allowed = server.engine.most_copies
        assert allowed is not None
        seen.append(registry.resident_bytes + source.bytes + source.beside + max(allowed, live.table_bytes))
        return read_stored_adapter(*given)

    monkeypatch.setattr("lorakeet.serve.registry.read_stored_adapter", watched)
    for name in "abc":
        registry.register(name, tmp_path / name)
    for name in "abcabc":
        lease = registry.lease(name)
        server.ask(PROMPTS[1], lease.adapters, max_tokens=TOKENS)
        registry.release(lease)
    assert len(seen) == 6 and max(seen) <= budget
    (tmp_path / "a" / peft.MODEL_NAME).write_bytes(b"cut")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        registry.lease("a")
    assert server.engine.most_copies == budget - registry.resident_bytes, "nothing stays kept for what was not read"


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_what_the_server_says_fits_is_what_can_be_leased(
    folder: Path, live: ServingModel, server: Asking, tmp_path: Path
) -> None:
    bare = in_transformers(folder)
    for seed, name in enumerate("ab"):
        peft.write(experts_adapter(bare, seed=seed), tmp_path / name)
    source = inspect_adapter(tmp_path / "a", live)
    one = source.bytes + max(source.filled, source.beside)
    two = 2 * source.bytes + max(2 * source.filled, source.filled + source.beside)
    for budget, fit in ((source.bytes + source.filled - 1, 0), (one - 1, 0), (one, 1), (two - 1, 1), (two, 2)):
        registry = Registry(live, server.engine, base="base", budget=budget)
        for name in "ab":
            registry.register(name, tmp_path / name)
        [said] = expert_capacity(registry)
        assert ("None of them fits", "Of such, one fits in", "Of such, 2 fit in")[fit] in said
        leases = [registry.lease(name) for name in "ab"[:fit]]
        if fit < 2:
            with pytest.raises(AdapterMemoryFull, match=r"more while it is read|and copies of"):
                registry.lease("ab"[fit])
        for lease in leases:
            registry.release(lease)
        for name in "ab":
            registry.unload(name)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_two_thousand_adapters_are_on_the_model_at_once(folder: Path, live: ServingModel, server: Asking) -> None:
    bare = in_transformers(folder)
    for number in range(2):
        live.attach(f"first{number}", experts_adapter(bare, seed=number, rank=1))
    begun = [server.begin(ids, {f"first{place % 2}": 1.0}, max_tokens=TOKENS) for place, ids in enumerate(PROMPTS)]
    alone = [server.end(job).ids for job in begun]
    adapter = experts_adapter(bare, seed=9, rank=1)
    for number in range(MANY):
        live.attach(f"more{number}", adapter)
    begun = [server.begin(ids, {f"first{place % 2}": 1.0}, max_tokens=TOKENS) for place, ids in enumerate(PROMPTS)]
    assert [server.end(job).ids for job in begun] == alone and len(live.names) == MANY + 2


def test_experts_that_cannot_have_pairs_are_named_with_the_reason(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    text = load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda _: None)
    for block in text.model.model.layers:
        block.mlp.experts.has_post_expert_norm = True
    live = ServingModel(text)
    with pytest.raises(ConfigError, match="a pair on it cannot be served, it is part of a MixtralExperts whose experts cannot"):
        live.check(experts_adapter(text.model, seed=0))
