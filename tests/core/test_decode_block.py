"""A decode block computes what the model's own block computes, with few operations, and leaves alone what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lorakeet.core.decode_block import DecodeBlock
from lorakeet.core.native import ops
from lorakeet.models import fuse, modules
from lorakeet.models.active import LiveModel
from lorakeet.models.kv_cache import KeyValues, Row, step
from lorakeet.models.load import load_text_model
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text import TextModel
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
    found = [step(text, cache, [Row(i, 0, ids, adapters[i]) for i, ids in enumerate(PROMPTS)], selection)]
    for turn in range(2):
        rows = [Row(i, len(ids) + turn, (WRITTEN[i][turn],), adapters[i]) for i, ids in enumerate(PROMPTS)]
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
    live = LiveModel(text)
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
    LiveModel(text)
    assert error() <= 2 * before + 1e-3


@needs_native
@pytest.mark.parametrize("adapted", [False, True])
def test_the_native_block_writes_what_torch_writes(adapted: bool, tmp_path: Path) -> None:
    text = load(tmp_path, "qwen2", "bfloat16", head_dim=64)
    assert text.products == torch.bfloat16, "a processor with these instructions multiplies bf16 faster"
    live = LiveModel(text)
    adapters: list[dict[str, float]] = [{}, {}, {}]
    if adapted:
        bare = tiny_model("qwen2", vocab_size=text.model.config.vocab_size, head_dim=64)
        for seed, name in enumerate(("a", "b")):
            live.attach(name, random_adapter(bare, seed=seed, rank=2 + seed, alpha=12.0))
        adapters = [{"a": 1.0}, {}, {"a": 0.5, "b": 0.7}]
    written(text, adapters, live.selection)  # copies of the pairs are there from now on
    calls, native = counted(lambda: written(text, adapters, live.selection))
    with ops.without():
        more, plain = counted(lambda: written(text, adapters, live.selection))
    assert calls < (more if adapted else more / 3)
    for ours, theirs in zip(native, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))
    if adapted:
        bare_logits = written(text, [{}] * 3, live.selection)
        for one, other in zip(native, bare_logits, strict=True):
            assert torch.equal(one[1], other[1]), "a row beside them does not move"
            assert all(float((one - other)[row].norm() / other[row].norm()) > 0.05 for row in (0, 2)), "the adapters count"


@needs_native
def test_a_pair_that_is_more_than_a_and_b_is_left_to_torch(tmp_path: Path) -> None:
    text = load(tmp_path, "llama", "bfloat16", head_dim=64)
    live = LiveModel(text)
    bare = tiny_model("llama", vocab_size=text.model.config.vocab_size, head_dim=64)
    live.attach("d", random_adapter(bare, seed=0, rank=2, alpha=12.0, dora=True))
    live.attach("a", random_adapter(bare, seed=1, rank=2, alpha=12.0))
    together = written(text, [{"d": 1.0}, {"a": 1.0}, {}], live.selection)
    plain = written(text, [{}, {"a": 1.0}, {}], live.selection)
    for ours, theirs in zip(together, plain, strict=True):
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=0.02, atol=0.02 * float(theirs.abs().max()))
        assert float((ours[0] - theirs[0]).norm() / theirs[0].norm()) > 0.05


def counted(function: Callable[[], list[Tensor]]) -> tuple[int, list[Tensor]]:
    """How many operations of torch it takes, and what it gives."""
    with Counting() as counting:
        found = function()
    return counting.calls, found


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_step_asks_for_fewer_operations(tmp_path: Path) -> None:
    text = load(tmp_path, "llama")

    def operations() -> int:
        cache = KeyValues(slots=3, capacity=16)
        step(text, cache, [Row(i, 0, ids, {}) for i, ids in enumerate(PROMPTS)])
        with Counting() as counting:
            step(text, cache, [Row(i, len(ids), (5,), {}) for i, ids in enumerate(PROMPTS)])
        return counting.calls

    before = operations()
    LiveModel(text)
    assert operations() < before


class Louder(LlamaDecoderLayer):
    def forward(self, *args: Any, **settings: Any) -> Any:
        return 1.5 * super().forward(*args, **settings)


def test_a_block_that_does_more_keeps_its_own_code(tmp_path: Path) -> None:
    text = load(tmp_path, "llama")
    blocks(text)[0].__class__ = Louder
    LiveModel(text)
    assert [isinstance(block, DecodeBlock) for block in blocks(text)] == [False] + [True] * (len(blocks(text)) - 1)


def test_gradients_take_the_model_s_own_way(tmp_path: Path) -> None:
    text = load(tmp_path, "llama")
    LiveModel(text)
    x = torch.randn(1, 4, text.model.config.hidden_size, requires_grad=True)
    block = blocks(text)[0]
    positions = torch.arange(4)[None]
    turn = text.model.model.rotary_emb(x, position_ids=positions)
    y = block(x, position_embeddings=turn, attention_mask=None, row_lengths=(4,))
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
