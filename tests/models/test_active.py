"""A live model: adapters come and go without a walk, compute what `attach` makes them compute, and leave nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError
from lorakeet.formats import peft
from lorakeet.formats.slab import open_outline, open_slab
from lorakeet.models import modules
from lorakeet.models.active import LiveModel
from lorakeet.models.adapt import put_adapter
from lorakeet.models.inject import activate
from lorakeet.models.load import load_text_model
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text import TextModel
from tiny.adapters import random_adapter
from tiny.models import tiny_model

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
    live = LiveModel(text)
    assert torch.equal(logits(text), plain), "places without adapters change nothing"
    live.attach("a@1", adapter)
    assert torch.equal(logits(text), plain), "attaching is not activating"
    live.selection.use("a@1")
    other = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32"))
    put_adapter(other, adapter, "a")
    activate(other.model, "a")
    torch.testing.assert_close(logits(text), logits(other), rtol=1e-4, atol=1e-4)
    assert live.mixes("a@1") is not dora
    live.detach("a@1")
    assert torch.equal(logits(text), plain) and live.names == ()


def test_loading_walks_nothing_and_leaves_nothing(
    text: TextModel, bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft.write(random_adapter(bare), tmp_path / "a")
    live = LiveModel(text)

    def walked(*_: Any) -> None:
        raise AssertionError("the model was walked")

    for name in ("original_modules", "adapted_layers", "find"):
        monkeypatch.setattr(modules, name, walked)

    def tensors() -> tuple[int, int]:
        gc.collect()
        found = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
        return len(found), sum(held.numel() for held in found)

    def cycle() -> None:
        live.attach("a@1", peft.read(tmp_path / "a", opened=open_slab))
        live.selection.use("a@1")
        live.detach("a@1")

    cycle()
    before = tensors()
    for _ in range(300):
        cycle()
    assert tensors() == before and live.names == ()


def test_an_outline_is_checked_without_its_numbers(text: TextModel, bare: Any, tmp_path: Path) -> None:
    adapter = random_adapter(bare)
    peft.write(adapter, tmp_path / "a")
    entries = LiveModel(text).check(peft.read(tmp_path / "a", opened=open_outline))
    assert {path: (entry.rank, entry.scale) for path, entry in entries.items()} == dict.fromkeys(adapter.pairs, (4, 3.0))


def test_everything_that_does_not_fit_is_named(text: TextModel, bare: Any) -> None:
    live = LiveModel(text)
    fits = random_adapter(bare, "q_proj", "k_proj").pairs
    q, k = (next(pair for path, pair in fits.items() if name in path) for name in ("q_proj", "k_proj"))
    wrong = Adapter(
        {"model.layers.0.self_attn.q_porj": q, "model.layers.0.self_attn.q_proj": k, "model.embed_tokens": q},
        extras={"model.norm.weight": torch.ones(32)},
    )
    with pytest.raises(ConfigError) as error:
        live.check(wrong)
    for part in ("q_porj': no pair", "Did you mean 'model.layers.0.self_attn.q_proj'",
                 "B is (16, 4), but this base needs (32, 4)",
                 "model.embed_tokens", "whole parameters (model.norm.weight)"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="holds no pair"):
        live.check(Adapter({}))
    live.attach("a@1", Adapter(fits))
    with pytest.raises(ConfigError, match="already on the model"):
        live.attach("a@1", Adapter(fits))
    assert live.bytes_of("a@1") == 4 * Adapter(fits).parameters
