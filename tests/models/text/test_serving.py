"""A live model: adapters come and go without a walk, compute what `attach` makes them compute, and leave nothing behind."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import PlanEntry
from lorakeet.core.reordered import ReorderedLinear
from lorakeet.core.selection import Share
from lorakeet.errors import ConfigError
from lorakeet.formats.files.loaded_file import load_safetensors, open_header
from lorakeet.formats.peft import peft
from lorakeet.models import modules
from lorakeet.models.fits import checked_entry
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.inject import activate
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text import serving
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.folded_weights import frozen_weights
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.construct import quantise_weight
from lorakeet.quant.gguf import GgufBase
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from tiny.adapters import random_adapter
from tiny.models import save_tiny_llama, tiny_model

IDS = torch.tensor([[30, 51, 77, 80, 9]])


@pytest.fixture
def text(tiny_llama_folder: Path) -> TextModel:
    return load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32"))


@pytest.fixture
def bare(text: TextModel) -> Any:
    return tiny_model("llama", vocab_size=text.model.config.vocab_size)


def logits(text: TextModel) -> torch.Tensor:
    with torch.no_grad():
        output = text.model.get_decoder()(input_ids=IDS, use_cache=False, row_lengths=(5,), row_products=text.products)
        return text.head(output.last_hidden_state[0])


@pytest.mark.parametrize("dora", [False, True])
def test_computes_what_an_attached_adapter_computes(text: TextModel, bare: Any, dora: bool, tiny_llama_folder: Path) -> None:
    adapter = random_adapter(bare, dora=dora)
    plain = logits(text)
    live = ServingModel(text)
    assert torch.equal(logits(text), plain), "places without adapters change nothing"
    live.attach("a@1", adapter)
    assert torch.equal(logits(text), plain), "attaching is not activating"
    live.selection.use("a@1")
    other = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32"))
    add_adapter(other, adapter, "a")
    activate(other.model, "a")
    torch.testing.assert_close(logits(text), logits(other), rtol=1e-4, atol=1e-4)
    assert live.mixes("a@1") is not dora
    live.detach("a@1")
    assert torch.equal(logits(text), plain) and live.names == ()


def packed(text: TextModel, kind: str) -> None:
    """Every linear layer of the blocks whose width divides into blocks of that kind, packed in place."""
    for path, module in list(modules.original_modules(text.model)):
        if modules.kind_of(module) != "linear" or path == "lm_head" or (kind == "Q4_0" and module.in_features % 32):
            continue
        shape = (module.out_features, module.in_features)
        if kind == "Q4_0":
            base: PackedBase = GgufBase(shape, kind)
            base.store(module.weight)
        elif kind == "gptq":
            base = GptqBase(shape, bits=4, groups=2, sym=True)
            base.store(module.weight)
        else:
            base = quantise_weight(module.weight, QuantSpec(method=kind))  # type: ignore[arg-type]
        modules.replace(text.model, path, PackedLinear(base, module.bias))


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq", "Q4_0"])
def test_rows_of_a_batch_over_a_packed_base_are_what_they_are_alone(kind: str, text: TextModel, bare: Any) -> None:
    packed(text, kind)
    live = ServingModel(text)
    before = {name: buffer.clone() for name, buffer in text.model.named_buffers()}
    live.attach("a@1", random_adapter(bare, seed=1))
    live.attach("b@1", random_adapter(bare, "q_proj", "down_proj", seed=2, rank=2, alpha=6.0))
    rows = [
        ({"a@1": 1.0}, tuple(range(20, 45))),  # a prompt longer than what is stacked
        ({}, (30, 51)),
        ({"b@1": 1.0}, (77, 80, 9)),
        ({"a@1": 0.3, "b@1": 0.7}, (12, 60, 61, 9)),
    ]

    def written(chosen: list[int]) -> torch.Tensor:
        """The logits of three steps: the prompts, then two tokens a row."""
        cache, found = KeyValues(slots=4, capacity=32), []
        starts = dict.fromkeys(chosen, 0)
        for ids in ([rows[row][1] for row in chosen], [(5,)] * len(chosen), [(8,)] * len(chosen)):
            asked = [CacheRow(row, starts[row], given, rows[row][0]) for row, given in zip(chosen, ids, strict=True)]
            starts.update({row: starts[row] + len(given) for row, given in zip(chosen, ids, strict=True)})
            found.append(step(text, cache, asked, live.selection))
        return torch.stack(found, dim=1)  # (rows, steps, vocabulary)

    together = written([0, 1, 2, 3])
    for row in range(4):
        torch.testing.assert_close(together[row], written([row])[0], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1
    assert sum(isinstance(slot.layer.base, PackedBase) for fit in live._adapters.values() for slot in fit.slots) > 10
    after = dict(text.model.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in before.items()), "the base stays as it was packed"


def test_detaching_leaves_the_step_of_another_thread_alone(text: TextModel, bare: Any) -> None:
    live = ServingModel(text)
    for name in "ab":
        live.attach(name, random_adapter(bare))
    live.selection.use("a")
    live.selection.divide([Share(0, 2, "b")], units=3)
    live.detach("a")
    assert live.selection.shares == (Share(0, 2, "b"),)


def test_another_adapter_under_a_name_counts_at_once(text: TextModel, bare: Any) -> None:
    live, cache = ServingModel(text), KeyValues(slots=3, capacity=8)

    def written() -> torch.Tensor:
        return step(text, cache, [CacheRow(slot, 0, (5 + slot,), {name: 1.0}) for slot, name in enumerate("aba")], live.selection)

    live.attach("b", random_adapter(bare, seed=2))
    for seed in (1, 3):
        live.attach("a", random_adapter(bare, seed=seed))
        found = written()
        fresh = ServingModel(load_text_model(ModelSpec(path=str(text.source), dtype="float32")))
        fresh.attach("a", random_adapter(bare, seed=seed))
        fresh.attach("b", random_adapter(bare, seed=2))
        rows = [CacheRow(slot, 0, (5 + slot,), {name: 1.0}) for slot, name in enumerate("aba")]
        expected = step(fresh.text, KeyValues(slots=3, capacity=8), rows, fresh.selection)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        live.detach("a")


@pytest.mark.parametrize(("tied", "twice", "ordered"), [(True, 0, False), (True, 1 << 20, True), (False, 0, True)])
def test_weights_lie_in_the_order_of_their_products(
    tied: bool, twice: int, ordered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakeet.models.text.serving.LARGEST_COPY", twice)  # bytes of an embedding that may be there once more
    folder = save_tiny_llama(tmp_path / "m", tie_word_embeddings=tied)
    text = load_text_model(ModelSpec(path=str(folder), dtype="float32"))
    before = {path: rows[:].clone() for path, rows in frozen_weights(text.model)}
    ServingModel(text)
    head = text.model.get_output_embeddings()
    assert isinstance(head, ReorderedLinear) is ordered
    plain = [path for path, _ in text.model.named_parameters()]
    assert any("_proj" in path for path in before) and not any("_proj" in path for path in plain)
    after = {path: rows[:] for path, rows in frozen_weights(text.model)}
    assert before.keys() == after.keys() and all(torch.equal(rows, after[path]) for path, rows in before.items())


def test_loading_walks_nothing_and_leaves_nothing(
    text: TextModel, bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft.write(random_adapter(bare), tmp_path / "a")
    live = ServingModel(text)

    def walked(*_: Any) -> None:
        raise AssertionError("the model was walked")

    for name in ("original_modules", "adapted_layers", "find"):
        monkeypatch.setattr(modules, name, walked)

    def tensors() -> tuple[int, int]:
        gc.collect()
        found = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
        return len(found), sum(held.numel() for held in found)

    def cycle() -> None:
        live.attach("a@1", peft.read(tmp_path / "a", opened=load_safetensors))
        live.selection.use("a@1")
        live.detach("a@1")

    cycle()
    before = tensors()
    for _ in range(300):
        cycle()
    assert tensors() == before and live.names == ()


def test_everything_that_does_not_fit_is_named(text: TextModel, bare: Any) -> None:
    live = ServingModel(text)
    fits = random_adapter(bare, "q_proj", "k_proj").pairs
    q, k = (next(pair for path, pair in fits.items() if name in path) for name in ("q_proj", "k_proj"))
    wrong = Adapter(
        {"model.layers.0.self_attn.q_porj": q, "model.layers.0.self_attn.q_proj": k, "model.embed_tokens": q},
        extras={"model.norm.weight": torch.ones(32)},
    )
    with pytest.raises(ConfigError) as error:
        live.check(wrong)
    for part in ("q_porj': a pair on it cannot", "Did you mean 'model.layers.0.self_attn.q_proj'",
                 "B is 16×4, but this base needs 32×4",
                 "model.embed_tokens", "whole parameters (model.norm.weight)"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="has no pairs"):
        live.check(Adapter({}))
    live.attach("a@1", Adapter(fits))
    with pytest.raises(ConfigError, match="already on the model"):
        live.attach("a@1", Adapter(fits))
    assert live.bytes_of("a@1") == 4 * Adapter(fits).parameters


def test_adapters_of_one_outline_are_checked_once_and_compute_their_own(
    text: TextModel, bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = ServingModel(text)
    checked: list[str] = []

    def entry(path: str, *given: Any) -> PlanEntry:
        checked.append(path)
        return checked_entry(path, *given)

    monkeypatch.setattr(serving, "checked_entry", entry)
    adapters = {f"a{seed}@1": random_adapter(bare, seed=seed) for seed in range(3)}
    for name, adapter in adapters.items():
        peft.write(adapter, tmp_path / name)
        live.check(peft.read(tmp_path / name, opened=open_header))
        live.attach(name, peft.read(tmp_path / name, opened=load_safetensors))
    assert checked == sorted(adapters["a0@1"].pairs)
    other = ServingModel(load_text_model(ModelSpec(path=str(text.source), dtype="float32")))
    for name, adapter in adapters.items():
        live.selection.use(name)
        other.attach(name, adapter)
        other.selection.use(name)
        assert torch.equal(logits(text), logits(other.text)) and live.bytes_of(name) == other.bytes_of(name)
        assert live.mixes(name)


def test_an_outline_that_does_not_fit_is_refused_each_time_in_full(text: TextModel, bare: Any, tmp_path: Path) -> None:
    live = ServingModel(text)
    for seed in range(2):
        peft.write(random_adapter(bare, "embed_tokens", "q_proj", seed=seed), tmp_path / str(seed))
        for opened in (open_header, load_safetensors):
            with pytest.raises(ConfigError, match=r"'model\.embed_tokens': a pair on it cannot be served"):
                live.check(peft.read(tmp_path / str(seed), opened=opened))
    assert live.names == () and len(live._fits) == 0


@pytest.mark.parametrize("dora", [False, True])
def test_biases_and_lengths_are_served(text: TextModel, bare: Any, dora: bool, tiny_llama_folder: Path) -> None:
    plain = random_adapter(bare, "q_proj", dora=dora)
    biased = Adapter({path: replace(pair, bias=torch.randn(len(pair.B))) for path, pair in plain.pairs.items()})
    live = ServingModel(text)
    live.attach("a", biased)
    live.selection.use("a")
    other = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32"))
    add_adapter(other, biased, "a")
    activate(other.model, "a")
    torch.testing.assert_close(logits(text), logits(other), rtol=1e-4, atol=1e-4)
    assert not live.mixes("a") and not any(parameter.requires_grad for parameter in text.model.parameters())
