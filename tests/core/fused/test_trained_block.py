"""A whole block in training: the bits of its parts, wherever it is used, and the parts themselves wherever it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.core.fused import trained_block
from lorakeet.core.fused.trained_block import TrainedBlock
from lorakeet.core.scratch import SCRATCH
from lorakeet.core.selection import Share
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.kernels.cpu.trained_block import BlockCall
from lorakeet.kernels.cpu.workspace import WORKSPACES, Workspaces
from lorakeet.models import modules
from lorakeet.models.fuse import unfuse
from lorakeet.models.inject import selection_of, trained_parameters
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.cached_states import cached_states
from lorakeet.models.text.model import TextModel
from lorakeet.quant.int8 import enable_int8_products
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.loss import text_loss
from lorakeet.train.text.multi_adapter import Member, train_many
from tiny import trained_blocks as blocks
from tiny.models import save_tiny_llama
from tiny.native import needs_native
from tiny.trained_blocks import LORA, load, require_same, use_c_products

pytestmark = needs_native
SHAPE = {**blocks.SHAPE, "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    use_c_products(monkeypatch)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What attention's gradients need fits where gate and up were; products of more terms than are added up in one part."""
    return save_tiny_llama(tmp_path_factory.mktemp("wide"), **{**SHAPE, "intermediate_size": 2208, "num_hidden_layers": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), **SHAPE)


def rows(count: int, *, least: int = 50, most: int = 90, prefix: int = 0) -> list[Example]:
    generator = np.random.default_rng(count)
    begin, lengths = np.arange(5, 5 + prefix), generator.integers(least, most, size=count)
    found = [np.r_[begin, generator.integers(4, 60, size=n)].astype(np.int64) for n in lengths]
    return [Example(ids, np.arange(len(ids)) >= len(ids) // 3, str(number), None, False) for number, ids in enumerate(found)]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of a block, whether the function computed it."""
    found: list[bool] = []
    calls: list[object] = []
    usual, computes = TrainedBlock.forward, BlockCall.forward

    def forward(self: TrainedBlock, *args: Any, **settings: Any) -> Any:
        before = len(calls)
        y = usual(self, *args, **settings)
        found.append(len(calls) > before)
        return y

    def computed(self: BlockCall, *args: Any, **settings: Any) -> Any:
        calls.append(self)
        return computes(self, *args, **settings)

    monkeypatch.setattr(TrainedBlock, "forward", forward)
    monkeypatch.setattr(BlockCall, "forward", computed)
    return found


def step(text: TextModel, examples: list[Example], *names: str) -> dict[str, Tensor]:
    """The loss, and the gradient of every trained number."""
    parameters = {f"{name}/{key}": each for name in names for key, each in trained_parameters(text.model, name).items()}
    for each in parameters.values():
        each.grad = None
    loss, _ = text_loss(text, pack_examples(examples))
    loss.backward()
    return {"loss": loss.detach(), **{key: each.grad for key, each in parameters.items() if each.grad is not None}}


def by_parts(text: TextModel, of: Callable[[], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(TrainedBlock, "_kernel_for", lambda *_: None)
        return of()


def require_parts(
    text: TextModel, examples: list[Example], expected: list[bool], used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """The blocks that compute themselves are `expected`, and their bits those of the parts."""
    found = step(text, examples, "default")
    assert used == expected
    require_same(found, by_parts(text, lambda: step(text, examples, "default"), monkeypatch))
    return found


@pytest.mark.parametrize("count", [1, 3, 11], ids=lambda n: f"{n} rows")
@pytest.mark.parametrize("prefix", [0, 21])
def test_losses_and_gradients_are_those_of_the_parts_to_the_last_bit(
    folder: Path, count: int, prefix: int, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few rows, whose heads are parted backward, and with many; with tokens that all rows begin with; odd ranks."""
    text, examples = load(folder), rows(count, prefix=prefix)
    found = step(text, examples, "default")
    assert used == [True] * 3 and WORKSPACES.taken == 0
    require_same(found, by_parts(text, lambda: step(text, examples, "default"), monkeypatch))
    assert used == [True] * 3 + [False] * 3


@pytest.mark.parametrize("changes", [{"rank": 4, "start": "pissa"}, {"rank": 34}, {"rank": 1}], ids=["pissa", "wide", "narrow"])
def test_other_pairs_too(folder: Path, changes: Any, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that are made of others, and more ranks than a register has numbers."""
    text, examples = load(folder, LoraSpec(alpha=8.0, **changes)), rows(4)
    require_parts(text, examples, [True] * 3, used, monkeypatch)


@pytest.mark.parametrize("count", [2, 11], ids=lambda n: f"{n} rows")
def test_wider_layers_too(wide_folder: Path, count: int, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    text, examples = load(wide_folder), rows(count, prefix=9)
    require_parts(text, examples, [True] * 2, used, monkeypatch)


@pytest.mark.parametrize("kind", ["", "int8", "in int8"])
def test_with_biases_on_queries_keys_and_values(
    tmp_path: Path, kind: str, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, examples = load(save_tiny_llama(tmp_path, family="qwen2", **SHAPE), kind=kind.removeprefix("in ")), rows(4)
    assert not kind.startswith("in ") or enable_int8_products(text.model)
    plain = step(text, examples, "default")
    for number in range(3):
        for name in ("q_proj", "k_proj", "v_proj"):
            part(text, number, f"self_attn.{name}").bias.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    found = require_parts(text, examples, [True] * 6, used, monkeypatch)
    assert not torch.equal(found["loss"], plain["loss"])


@pytest.mark.parametrize(("count", "kind"), [(2, ""), (11, ""), (5, "nf4")])
def test_with_norms_of_heads(tmp_path: Path, count: int, kind: str, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen 3 has them."""
    text, examples = load(save_tiny_llama(tmp_path, family="qwen3", **SHAPE), kind=kind), rows(count, prefix=9)
    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        for name in ("q_norm", "k_norm"):
            modules.unwrapped(part(text, number, f"self_attn.{name}")).weight.data.uniform_(0.5, 3, generator=generator)
    require_parts(text, examples, [True] * 3, used, monkeypatch)


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq", "mixed"])
def test_over_packed_weights_too(folder: Path, kind: str, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    text, examples = load(folder, kind=kind), rows(5, prefix=9)
    SCRATCH.clear()
    found = step(text, examples, "default")
    assert used == [True] * 3
    assert not SCRATCH._buffers  # no weight stands in bf16 as a whole
    require_same(found, by_parts(text, lambda: step(text, examples, "default"), monkeypatch))


@pytest.mark.parametrize("kind", ["int8", "mixed"])
def test_products_in_int8_too(folder: Path, kind: str, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    text, examples = load(folder, kind=kind), rows(5, prefix=9)
    exact = step(text, examples, "default")
    assert enable_int8_products(text.model)
    found = require_parts(text, examples, [True] * 6, used, monkeypatch)
    assert not torch.equal(found["loss"], exact["loss"])


def test_a_gradient_of_what_comes_in_too(folder: Path, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraSpec(rank=4, alpha=8.0, target_modules=("all-linear", "embed_tokens"))
    text, examples = load(folder, lora), rows(3)
    found = require_parts(text, examples, [True] * 3, used, monkeypatch)
    assert any("embed_tokens" in key for key in found)


def test_several_adapters_in_one_pass(folder: Path, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    text, examples = load(folder, names=("a", "b")), rows(5)
    tokens = sum(len(row.ids) for row in examples)
    half = sum(len(row.ids) for row in examples[:2])

    def divided() -> dict[str, Tensor]:
        seen = text.with_every_token(pad=True)
        shares = [Share(0, half, "a"), Share(half, tokens, "b", 0.5)]
        selection_of(text.model).divide(shares, units=seen.computed_tokens(tokens))
        return step(seen, examples, "a", "b")

    found = divided()
    assert used == [True] * 3
    require_same(found, by_parts(text, divided, monkeypatch))


def test_the_last_block_computes_only_what_is_read_by_its_parts(
    folder: Path, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = load(folder)
    examples = [Example(row.ids, np.arange(len(row.ids)) == len(row.ids) - 1, row.key, None, False) for row in rows(4)]
    require_parts(text, examples, [True, True, False], used, monkeypatch)


@pytest.mark.parametrize("kind", ["", "nf4"])
def test_what_takes_a_weight_s_place_between_the_passes_changes_no_gradient(folder: Path, kind: str) -> None:
    text, examples = load(folder, kind=kind), rows(3)
    expected = step(text, examples, "default")
    parameters = trained_parameters(text.model, "default")
    for each in parameters.values():
        each.grad = None
    loss, _ = text_loss(text, pack_examples(examples))
    trained = {id(each) for each in parameters.values()}
    for path, module in text.model.named_modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.zeros_like(buffer)
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in trained and ".layers." in f".{path}":
                parameter.data = torch.zeros_like(parameter.data)
    torch.full((64, 96, 256), 7.0)  # into memory that was given back, if any was
    loss.backward()
    found = {f"default/{key}": each.grad for key, each in parameters.items() if each.grad is not None}
    require_same({"loss": loss.detach(), **found}, expected)


def test_blocks_below_the_lowest_pair_take_nothing_from_those_above(
    folder: Path, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []
    WORKSPACES.release()
    monkeypatch.setattr(WORKSPACES, "keeps", True)  # a run under a budget in this process may have set it
    monkeypatch.setattr(Workspaces, "_give_back", lambda _, start, stop: given_back.append(stop - start))
    text, examples = load(folder, replace(LORA, layers="1-2")), rows(3)
    step(text, examples, "default")
    step(text, examples, "default")
    assert used == [False, True, True] * 2 and not any(given_back)
    with torch.no_grad():
        text.hidden(pack_examples(examples))
    assert any(given_back), "by its parts, without gradients, the first block wants the pages"


def test_a_second_backward_pass_is_refused(folder: Path) -> None:
    text = load(folder)
    loss, _ = text_loss(text, pack_examples(rows(2)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_needs_no_gradient_is_not_saved(folder: Path, used: list[bool]) -> None:
    text = load(folder)
    loss, _ = text_loss(text, pack_examples(rows(2)))
    assert WORKSPACES.taken == 3 and used == [True] * 3
    del loss
    assert WORKSPACES.taken == 0


@pytest.mark.parametrize("kind", ["", "mixed"])
def test_without_gradients_it_computes_the_same_and_keeps_nothing(
    folder: Path, kind: str, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, batch = load(folder, kind=kind), pack_examples(rows(5, prefix=9))
    text.model.eval()

    def states() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"hidden": text.hidden(batch), "again": text.hidden(batch)}

    found = states()
    assert used == [True] * 6 and WORKSPACES.taken == 0
    require_same(found, by_parts(text, states, monkeypatch))
    require_same(found, dict.fromkeys(found, text.hidden(batch).detach()))  # as with gradients


def part(text: TextModel, number: int, path: str) -> Any:
    return modules.find(text.model, f"model.layers.{number}.{path}")


def _listened_block(text: TextModel) -> None:
    for number in range(3):
        modules.unwrapped(part(text, number, "mlp")).register_forward_hook(lambda *_: None)  # which the parts never call
        part(text, number, "self_attn.o_proj").register_forward_hook(lambda *_: None)


def _checkpointed(text: TextModel) -> None:
    for number in range(3):
        vars(modules.unwrapped(cast(nn.Module, modules.find(text.model, f"model.layers.{number}"))))["gradient_checkpointing"] = (
            True
        )


def _windowed(text: TextModel) -> None:
    for number in range(3):
        modules.unwrapped(part(text, number, "self_attn")).sliding_window = 40


def _cut_away(text: TextModel) -> None:
    """As a run whose ranks fall in training leaves a pair."""
    for number in range(3):
        part(text, number, "mlp.up_proj").pair().keep(torch.tensor([], dtype=torch.int64))


def _half_turned(text: TextModel) -> None:
    """Rotary positions on half of each head; nobody's model, but C would read behind them."""
    for number in range(3):
        modules.unwrapped(part(text, number, "self_attn")).head_dim = 128


def _dora(text: TextModel) -> None:
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=2, variant="dora"), text.family), seed=1, name="dora")
    selection_of(text.model).use("dora")


def _some_layers(text: TextModel) -> None:
    lora = LoraSpec(rank=2, target_modules=("attention",))
    initialise_adapter(text, plan_for(text.model, lora, text.family), seed=1, name="some")
    selection_of(text.model).use("some")


def _listened(text: TextModel) -> None:
    for number in range(3):
        part: Any = modules.find(text.model, f"model.layers.{number}.mlp")
        part.register_forward_hook(lambda *_: None)


def _listened_norm(text: TextModel) -> None:
    for number in range(3):
        modules.unwrapped(part(text, number, "self_attn.q_norm")).register_forward_hook(lambda *_: None)


def _trained_norm(text: TextModel) -> None:
    for number in range(3):
        modules.unwrapped(part(text, number, "self_attn.q_norm")).weight.requires_grad_(True)


@pytest.mark.parametrize("change", [_listened_norm, _trained_norm])
def test_a_norm_of_heads_that_is_no_plain_one_is_the_model_s_own(
    tmp_path: Path, change: Callable[[TextModel], None], used: list[bool]
) -> None:
    text = load(save_tiny_llama(tmp_path, family="qwen3", **SHAPE))
    change(text)
    loss, _ = text_loss(text, pack_examples(rows(2)))
    loss.backward()
    assert torch.isfinite(loss) and used == [False] * 3
    assert all(part(text, number, "self_attn").head_norms() is None for number in range(3))


def _bare(text: TextModel) -> None:
    selection_of(text.model).use(None)


def _wide_products(text: TextModel) -> TextModel:
    return replace(text, products=torch.float32)


LEFT = [_dora, _some_layers, _listened, _listened_block, _bare, _wide_products, _windowed, _cut_away]


@pytest.mark.parametrize("change", LEFT)
def test_what_it_does_not_know_is_left_to_the_parts(
    folder: Path, change: Callable[[TextModel], TextModel | None], used: list[bool]
) -> None:
    text = load(folder)
    text = change(text) or text
    loss, _ = text_loss(text, pack_examples(rows(2)))
    if loss.requires_grad:
        loss.backward()
    assert torch.isfinite(loss) and used == [False] * 3


@pytest.mark.parametrize("change", [_checkpointed, _half_turned])
def test_what_its_parts_do_not_know_is_not_left_to_c(folder: Path, change: Callable[[TextModel], None]) -> None:
    text = load(folder)
    change(text)
    block: Any = modules.find(text.model, "model.layers.0")
    x, turn = torch.zeros(1, 64, 96, dtype=torch.bfloat16), torch.zeros(1, 64, 64, dtype=torch.bfloat16)
    settings = {"position_embeddings": (turn, turn), "row_lengths": (64,), "row_products": torch.bfloat16}
    kernel = block._kernel_for(x, settings)
    assert kernel is None or block._prepared(kernel, x, (64,), 0) is None


def test_a_pair_that_is_written_to_between_the_passes_is_an_error(folder: Path) -> None:
    text = load(folder)
    loss, _ = text_loss(text, pack_examples(rows(2)))
    with torch.no_grad():
        list(trained_parameters(text.model, "default").values())[-1].mul_(2)
    with pytest.raises(RuntimeError, match="written to between the two passes"):
        loss.backward()


def test_outside_training_nothing_stands_for_a_block(folder: Path) -> None:
    text = load(folder)
    assert all(isinstance(modules.find(text.model, f"model.layers.{number}"), TrainedBlock) for number in range(3))
    unfuse(text.model)
    assert not any(isinstance(module, TrainedBlock) for module in text.model.modules())


def test_above_kept_states_blocks_compute_what_they_compute_in_a_whole_pass(folder: Path, used: list[bool]) -> None:
    """In bf16, to the last bit: what is kept are the states themselves."""
    own, found = rows(4), []
    for kept in (False, True):
        text = load(folder, replace(LORA, layers="top:2"))
        with cached_states(text, own, folder=None, micro_tokens=1000) if kept else nullcontext():
            used.clear()
            loss, _ = text_loss(text, pack_examples(own))
            loss.backward()
            held = trained_parameters(text.model, "default").items()
            values = {name: each.grad for name, each in held if each.grad is not None}
        assert sum(used) == 2 and len(values) == 2 * 14
        found.append({**values, "loss": loss.detach()})
    require_same(*found)


@pytest.mark.slow
def test_adapters_that_train_together_become_what_they_become_alone_to_the_last_bit(folder: Path, used: list[bool]) -> None:
    spec, found = TrainSpec(batch_size=12, steps=3, learning_rate=1e-2, patience=0), []
    for names in (("a", "b"), ("a",), ("b",)):
        text = load(folder, names=("a", "b"))
        members = [Member(name, replace(spec, seed=ord(name)), rows(24), ()) for name in names]
        train_many(text, members)
        ended = {name: trained_parameters(text.model, name).items() for name in names}
        found.append({f"{name}/{key}": each.detach() for name, values in ended.items() for key, each in values})
    require_same(found[0], {**found[1], **found[2]})
    assert used and all(used), "steps of more than 512 tokens, each by itself"


def test_short_rows_are_for_another_attention(folder: Path, used: list[bool]) -> None:
    text = load(folder)
    text_loss(text, pack_examples(rows(6, least=6, most=9)))
    assert used == [False] * 3


def test_who_counts_operations_sees_the_parts(folder: Path, used: list[bool]) -> None:
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    text = load(folder)
    with Counting():
        text_loss(text, pack_examples(rows(2)))
    assert used == [False] * 3


def test_weights_that_do_not_belong_together_never_reach_c() -> None:
    """Which would read behind them."""
    assert trained_block._fit(((64, 96), (64, 96), (64, 96), (96, 64), (160, 96), (160, 96), (96, 160)), 96, 64)
    assert not trained_block._fit(((64, 96), (64, 96), (128, 96), (96, 64), (160, 96), (160, 96), (96, 160)), 96, 64)
    assert not trained_block._fit(((64, 96), (64, 96), (64, 96), (96, 64), (160, 96), (168, 96), (96, 160)), 96, 64)


@pytest.mark.parametrize(("start", "rank"), [("pissa", 1), ("olora", 4)])
def test_pairs_of_a_difference_too(
    folder: Path, start: str, rank: int, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their factors are made for each pass."""
    text, examples = load(folder, lora=LoraSpec(rank=rank, start=start)), rows(2)
    found = step(text, examples, "default")
    assert any(used)
    require_same(found, by_parts(text, lambda: step(text, examples, "default"), monkeypatch))


def test_a_mix_on_the_same_tokens_is_computed_by_the_parts(
    folder: Path, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, names, examples = load(folder, names=("one", "other")), ("one", "other"), rows(2)
    tokens, found = text.computed_tokens(sum(len(row.ids) for row in examples)), []
    for weights in ((0.7, 0.3), (0.7, 0.0)):
        shares = [Share(0, tokens, name, weight) for name, weight in zip(names, weights, strict=True)]
        selection_of(text.model).divide(shares, units=tokens)
        found.append(step(text, examples, *names))
        require_same(found[-1], by_parts(text, lambda: step(text, examples, *names), monkeypatch))
    assert not any(used) and not torch.equal(found[0]["loss"], found[1]["loss"])
