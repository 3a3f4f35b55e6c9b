"""A decode block computes what the model's own block computes, with few operations, and leaves alone what it does not know."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lorakeet.core.fused.decode_block import DecodeBlock
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.block import Block
from lorakeet.models import fuse, modules
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.inject import selection_of, use_products
from lorakeet.models.modules import adapted_layers
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.serving import ServingModel
from tiny.adapters import random_adapter
from tiny.models import save_tiny_llama, tiny_model
from tiny.native import needs_native

PROMPTS = ((3, 5, 7, 9, 11, 2, 4), (8, 6, 1), (9, 9, 4, 4, 13))
WRITTEN = ((1, 2), (5, 5), (7, 3))


def load(folder: Path, family: str, dtype: Any = "float32", **changes: Any) -> TextModel:
    return load_text_model(ModelSpec(path=str(save_tiny_llama(folder / family, family=family, **changes)), dtype=dtype))


def blocks(text: TextModel) -> list[Any]:
    prefix, count = modules.block_prefix(text.model, text.family)
    return [modules.find(text.model, f"{prefix}.{number}") for number in range(count)]


def written(text: TextModel, adapters: list[dict[str, float]], selection: Any, capacity: int = 16) -> list[Tensor]:
    """The logits after three prompts and after each of two more tokens."""
    cache = KeyValues(slots=3, capacity=capacity)
    found = [step(text, cache, [CacheRow(i, 0, ids, adapters[i]) for i, ids in enumerate(PROMPTS)], selection)]
    for turn in range(2):
        rows = [CacheRow(i, len(ids) + turn, (WRITTEN[i][turn],), adapters[i]) for i, ids in enumerate(PROMPTS)]
        found.append(step(text, cache, rows, selection))
    return found


@pytest.mark.parametrize(
    ("family", "changes", "stand_in"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": 4}, True),  # stands there, and leaves it to the original
        ("qwen3", {}, False),  # norms of its own in the attention
        ("gemma2", {}, False),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_writes_what_the_model_writes(
    family: str, changes: dict[str, Any], stand_in: bool, adapted: bool, tmp_path: Path
) -> None:
    text = load(tmp_path, family, **changes)
    live = ServingModel(text)
    assert all(isinstance(block, DecodeBlock) for block in blocks(text)) is stand_in
    adapters: list[dict[str, float]] = [{}, {}, {}]
    if adapted:
        bare = tiny_model(family, vocab_size=text.model.config.vocab_size, **changes)
        for seed, name in enumerate(("a", "b")):
            live.attach(name, random_adapter(bare, seed=seed, rank=2 + seed, alpha=12.0))
        adapters = [{"a": 1.0}, {}, {"a": 0.5, "b": 0.7}]
    found = written(text, adapters, live.selection)
    fuse.unfuse(text.model)
    assert not any(isinstance(block, DecodeBlock) for block in blocks(text))
    for ours, theirs in zip(found, written(text, adapters, live.selection), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bf16_is_as_near_as_bf16_is(tmp_path: Path) -> None:
    text, exact = load(tmp_path, "llama", "bfloat16"), load(tmp_path / "exact", "llama")
    exact.model.load_state_dict({name: value.float() for name, value in text.model.state_dict().items()})
    expected = written(exact, [{}, {}, {}], None)

    def error() -> float:
        pairs = zip(written(text, [{}] * 3, None), expected, strict=True)
        return max(float((ours - right).abs().max()) for ours, right in pairs)

    before = error()
    ServingModel(text)
    assert error() <= 2 * before + 1e-3


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each block that the native library computed: its tokens."""
    found: list[int] = []
    run = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *given: (found.append(len(x)), run(self, x, *given))[1])
    return found


def live_bf16(folder: Path, family: str = "llama", **changes: Any) -> tuple[ServingModel, Any]:
    """A model wide enough for the native block, with adapters a and b, and the bare one that these are for."""
    sizes = {"head_dim": 64, "intermediate_size": 64, **changes}
    text = load(folder, family, "bfloat16", **sizes)
    assert text.products == torch.bfloat16, "a processor with these instructions multiplies bf16 faster"
    live, bare = ServingModel(text), tiny_model(family, vocab_size=text.model.config.vocab_size, **sizes)
    for seed, name in enumerate(("a", "b")):
        live.attach(name, random_adapter(bare, seed=seed, rank=2 + seed, alpha=12.0))
    return live, bare


NONE: list[dict[str, float]] = [{}, {}, {}]
MIXED: list[dict[str, float]] = [{"a": 1.0}, {}, {"a": 0.5, "b": 0.7}]


@needs_native
@pytest.mark.parametrize("adapters", [NONE, MIXED])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_native_block_writes_what_torch_writes(
    family: str, adapters: list[dict[str, float]], natively: list[int], tmp_path: Path
) -> None:
    with operators.torch_only():
        plain, _ = live_bf16(tmp_path, family)
        theirs = written(plain.text, adapters, plain.selection)
        bare = written(plain.text, NONE, plain.selection)
    assert not natively
    live, _ = live_bf16(tmp_path, family)
    ours = written(live.text, adapters, live.selection)
    assert len(natively) == len(ours) * len(blocks(live.text))
    alone = written(live.text, NONE, live.selection)
    for one, other, none, own in zip(ours, theirs, bare, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))
        assert torch.equal(one[1], own[1]), "a row beside adapters does not move"
        if adapters is MIXED:
            assert all(float((one - none)[row].norm() / none[row].norm()) > 0.05 for row in (0, 2)), "the adapters count"


@needs_native
def test_what_the_native_block_is_not_for(natively: list[int], tmp_path: Path) -> None:
    windowed, _ = live_bf16(tmp_path / "w", "mistral", sliding_window=4)
    written(windowed.text, NONE, windowed.selection)
    other, _ = live_bf16(tmp_path / "p")
    use_products(other.text.model, torch.float32)
    written(other.text, NONE, other.selection)
    with operators.torch_only():
        written(other.text, NONE, other.selection)
    assert not natively
    use_products(other.text.model, torch.bfloat16)
    written(other.text, NONE, other.selection)
    assert natively


@needs_native
def test_the_native_block_follows_its_parts(natively: list[int], tmp_path: Path) -> None:
    """Norms that get other memory, weights that are stored anew, an adapter that comes while rows are written."""
    live, bare = live_bf16(tmp_path)
    before, model = written(live.text, NONE, live.selection), live.text.model
    norm = blocks(live.text)[0].original.input_layernorm
    norm.weight.data = 3 * norm.weight.data
    changed = written(live.text, NONE, live.selection)
    assert not torch.equal(changed[0], before[0])
    norm.weight.data = norm.weight.data / 3
    assert all(torch.equal(*pair) for pair in zip(written(live.text, NONE, live.selection), before, strict=True))
    layer = modules.find(model, next(path for path, _ in adapted_layers(model)))
    weight = layer.base.dense()
    layer.base.store(2 * weight)
    assert not torch.equal(written(live.text, NONE, live.selection)[0], before[0])
    layer.base.store(weight)
    one = written(live.text, MIXED, live.selection)
    live.detach("a")
    live.attach("a", random_adapter(bare, seed=9, rank=2, alpha=12.0))
    assert not torch.equal(written(live.text, MIXED, live.selection)[0], one[0])
    assert all(torch.equal(*pair) for pair in zip(written(live.text, NONE, live.selection), before, strict=True))
    assert len(natively) == 7 * 3 * len(blocks(live.text))


@needs_native
def test_a_copied_model_has_pairs_of_its_own(tmp_path: Path) -> None:
    live, _ = live_bf16(tmp_path)
    before = written(live.text, MIXED, live.selection)
    other = replace(live.text, model=copy.deepcopy(live.text.model))
    selection = selection_of(other.model)
    assert selection.table_bytes == 0 < live.table_bytes
    for layer in (layer for _, layer in adapted_layers(live.text.model)):
        for name in ("a", "b"):
            layer.adapters[name].A.data.zero_()
    live.selection.release()
    assert live.table_bytes == 0
    assert all(torch.equal(*pair) for pair in zip(written(other, MIXED, selection), before, strict=True))
    assert not torch.equal(written(live.text, MIXED, live.selection)[0], before[0])


@needs_native
def test_a_pair_that_is_more_than_a_and_b_is_left_to_torch(tmp_path: Path) -> None:
    live, bare = live_bf16(tmp_path)
    live.attach("d", random_adapter(bare, seed=0, rank=2, alpha=12.0, dora=True))
    together = written(live.text, [{"d": 1.0}, {"a": 1.0}, {}], live.selection)
    plain = written(live.text, [{}, {"a": 1.0}, {}], live.selection)
    for ours, theirs in zip(together, plain, strict=True):
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=0.02, atol=0.02 * float(theirs.abs().max()))
        assert float((ours[0] - theirs[0]).norm() / theirs[0].norm()) > 0.05


class Louder(LlamaDecoderLayer):
    def forward(self, *args: Any, **settings: Any) -> Any:
        return 1.5 * super().forward(*args, **settings)


def test_a_block_that_does_more_keeps_its_own_code(tmp_path: Path) -> None:
    text = load(tmp_path, "llama")
    blocks(text)[0].__class__ = Louder
    ServingModel(text)
    assert [isinstance(block, DecodeBlock) for block in blocks(text)] == [False] + [True] * (len(blocks(text)) - 1)


def test_gradients_take_the_model_s_own_way(tmp_path: Path) -> None:
    text = load(tmp_path, "llama")
    ServingModel(text)
    x = torch.randn(1, 4, text.model.config.hidden_size, requires_grad=True)
    block = blocks(text)[0]
    positions = torch.arange(4)[None]
    turn = text.model.model.rotary_emb(x, position_ids=positions)
    y = block(x, position_embeddings=turn, attention_mask=None, row_lengths=(4,))
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
