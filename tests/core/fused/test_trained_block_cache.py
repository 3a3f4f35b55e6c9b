"""A block that was asked before is asked again wherever anything is other than it was, and only there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.fused.mlp_and_norm import ACTIVATIONS
from lorakeet.core.fused.trained_block import TrainedBlock
from lorakeet.core.fused.trained_block_cache import block_arguments
from lorakeet.core.selection import Selection, Share
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.kernels.cpu import trained_block as in_c
from lorakeet.models import modules
from lorakeet.models.inject import eject, selection_of, trained_parameters
from lorakeet.models.text.model import TextModel
from lorakeet.quant.int8 import enable_int8_products
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase
from lorakeet.train.text.loss import text_loss
from tiny.models import save_tiny_llama
from tiny.native import needs_native
from tiny.trained_blocks import SHAPE, load, require_same, use_c_products

pytestmark = needs_native


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    use_c_products(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), **SHAPE)


def rows(*lengths: int) -> list[Example]:
    draw = np.random.default_rng(sum(lengths))
    found = [draw.integers(4, 60, size=length).astype(np.int64) for length in lengths]
    return [Example(ids, np.arange(len(ids)) >= len(ids) // 3, str(number), None, False) for number, ids in enumerate(found)]


def step(text: TextModel, *lengths: int, names: tuple[str, ...] = ("default",)) -> dict[str, Tensor]:
    """The loss, and the gradient of every trained number."""
    parameters = {f"{name}/{key}": each for name in names for key, each in trained_parameters(text.model, name).items()}
    for each in parameters.values():
        each.grad = None
    loss, _ = text_loss(text, pack_examples(rows(*lengths)))
    loss.backward()
    return {"loss": loss.detach(), **{key: each.grad for key, each in parameters.items() if each.grad is not None}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainedBlock]:
    """The blocks that were asked, one entry for each time."""
    found: list[TrainedBlock] = []
    usual = TrainedBlock._prepared

    def counted(self: TrainedBlock, *given: Any) -> Any:
        found.append(self)
        return usual(self, *given)

    monkeypatch.setattr(TrainedBlock, "_prepared", counted)
    return found


def by_parts(text: TextModel, *lengths: int, names: tuple[str, ...] = ("default",)) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainedBlock, "_kernel_for", lambda *_: None)
        return step(text, *lengths, names=names)


@pytest.mark.parametrize("kind", ["", "nf4", "int8"])
def test_block_cache_survives_new_shapes_and_trained_weights(
    folder: Path, kind: str, asked: list[TrainedBlock]
) -> None:
    text = load(folder, kind=kind)
    for lengths in ((50, 70), (50, 70), (40,), (33, 64, 90), (50, 70)):
        require_same(step(text, *lengths), by_parts(text, *lengths))
        with torch.no_grad():
            for parameter in trained_parameters(text.model, "default").values():
                parameter.mul_(1.5)
    assert len(asked) == len(set(map(id, asked))) == 2


@pytest.mark.parametrize(("start", "rank"), [("pissa", 1), ("pissa", 4), ("olora", 4)])
def test_pairs_of_a_difference_are_read_in_every_pass(
    folder: Path, start: str, rank: int, asked: list[TrainedBlock]
) -> None:
    """Their factors are made for each pass."""
    text = load(folder, lora=LoraSpec(rank=rank, start=start))
    for lengths in ((50, 70), (50, 70), (40,)):
        require_same(step(text, *lengths), by_parts(text, *lengths))
        with torch.no_grad():
            batch = pack_examples(rows(*lengths))
            hidden = text.hidden(batch)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(TrainedBlock, "_kernel_for", lambda *_: None)
                assert torch.equal(hidden, text.hidden(batch))
    assert len(asked) == 12


def test_adapters_that_share_a_pass_are_cached_by_their_shares(folder: Path, asked: list[TrainedBlock]) -> None:
    text, names = load(folder, names=("one", "other")), ("one", "other")
    selection = selection_of(text.model)
    for shares, count in (
        ([Share(0, 50, "one"), Share(50, 128, "other", 0.5)], 2),
        ([Share(0, 70, "one", 2.0), Share(70, 128, "other")], 2),  # of the same ones, otherwise
        ([Share(0, 50, "other"), Share(50, 128, "one")], 4),
        ([Share(0, 128, "other")], 6),
    ):
        selection.divide(shares, units=128)
        require_same(step(text, 50, 78, names=names), by_parts(text, 50, 78, names=names))
        assert len(asked) == count


def test_a_mix_on_the_same_tokens_is_computed_by_the_parts(folder: Path) -> None:
    text, names = load(folder, names=("one", "other")), ("one", "other")
    selection = selection_of(text.model)
    found = []
    for weights in ((0.7, 0.3), (0.7, 0.0)):
        selection.divide([Share(0, 128, name, weight) for name, weight in zip(names, weights, strict=True)], units=128)
        found.append(step(text, 50, 78, names=names))
        require_same(found[-1], by_parts(text, 50, 78, names=names))
    assert not torch.equal(found[0]["loss"], found[1]["loss"])


def part(text: TextModel, path: str) -> Any:
    return modules.find(text.model, f"model.layers.0.{path}")


def block_of(text: TextModel) -> Any:
    return modules.find(text.model, "model.layers.0")


def bare(text: TextModel, path: str) -> Any:
    return modules.unwrapped(part(text, path))


def _another_weight(text: TextModel) -> None:
    own = bare(text, "mlp.up_proj")
    own.weight = nn.Parameter(own.weight.detach() * 2, requires_grad=False)


def _other_numbers(text: TextModel) -> None:
    own = bare(text, "mlp.up_proj")
    own.weight.data = own.weight.data * 2


def _written_weight(text: TextModel) -> None:
    bare(text, "mlp.gate_proj").weight.mul_(2)


def _trained_weight(text: TextModel) -> None:
    bare(text, "self_attn.k_proj").weight.requires_grad_(True)


def _a_buffer_for_a_bias(text: TextModel) -> None:
    own = bare(text, "self_attn.q_proj")
    del own._parameters["bias"]
    own.register_buffer("bias", torch.ones(256, dtype=torch.bfloat16))


def _another_norm(text: TextModel) -> None:
    block = block_of(text).original
    block.input_layernorm = copy.deepcopy(block.input_layernorm)
    with torch.no_grad():
        block.input_layernorm.original.weight.mul_(2)


def _a_bias(text: TextModel) -> None:
    bare(text, "self_attn.q_proj").bias = nn.Parameter(torch.ones(256, dtype=torch.bfloat16), requires_grad=False)


def _a_gain(text: TextModel) -> None:
    own = bare(text, "input_layernorm")
    own.weight = nn.Parameter(own.weight.detach() * 2, requires_grad=False)


def _an_epsilon(text: TextModel) -> None:
    bare(text, "post_attention_layernorm").variance_epsilon = 0.5


def _a_scale(text: TextModel) -> None:
    part(text, "self_attn.v_proj").pair().scale = 0.25


def _another_factor(text: TextModel) -> None:
    pair = part(text, "self_attn.v_proj").pair()
    pair.A = nn.Parameter(pair.A.detach() * 2)


def _other_numbers_of_a_factor(text: TextModel) -> None:
    pair = part(text, "self_attn.v_proj").pair()
    pair.B.data = pair.B.data * 2


def _turned_where_it_lies(text: TextModel) -> None:
    """The same tensor, at the same address."""
    own = bare(text, "self_attn.o_proj")
    own.weight.data = own.weight.data.view(256, 96).t()


def _cut(text: TextModel) -> None:
    part(text, "mlp.down_proj").pair().keep(torch.tensor([0, 3]))


def _anew(text: TextModel) -> None:
    layer = part(text, "mlp.down_proj")
    pair = copy.deepcopy(layer.pair())
    layer.detach("default")
    layer.attach("default", pair)
    with torch.no_grad():
        pair.B.mul_(2)


def _in_bf16(text: TextModel) -> None:
    pair = part(text, "mlp.gate_proj").pair()
    pair.A.data = pair.A.data.bfloat16()


def _another_window(text: TextModel) -> None:
    bare(text, "self_attn").sliding_window = 60


def _a_window_of_the_config(text: TextModel) -> None:
    bare(text, "self_attn").config.sliding_window = 60


def _scaling(text: TextModel) -> None:
    bare(text, "self_attn").scaling = 0.5


def _another_activation(text: TextModel) -> None:
    part(text, "mlp").activation = ACTIVATIONS["gelu"]


def _another_base(text: TextModel) -> None:
    layer = part(text, "mlp.gate_proj")
    layer.base = Nf4Base.of(layer.original.weight)


def _another_original(text: TextModel) -> None:
    layer = part(text, "mlp.gate_proj")
    layer.base.module = copy.deepcopy(layer.original)
    with torch.no_grad():
        layer.base.module.weight.mul_(2)


def _one_token(text: TextModel) -> None:
    part(text, "mlp").only = torch.tensor([5])


def _one_token_of_attention(text: TextModel) -> None:
    part(text, "self_attn").only = torch.tensor([5])


def _heard(text: TextModel) -> None:
    bare(text, "mlp").register_forward_hook(lambda *_: None)
    part(text, "mlp").register_forward_hook(lambda _, __, y: y * 2)


def _heard_pair(text: TextModel) -> None:
    part(text, "mlp.up_proj").pair().register_forward_hook(lambda *_: None)


def _heard_block(text: TextModel) -> None:
    block_of(text).original.register_forward_pre_hook(lambda *_: None)


def _heard_outward(text: TextModel) -> None:
    part(text, "self_attn.o_proj").register_forward_hook(lambda _, __, y: y * 2)


def _bare(text: TextModel) -> None:
    selection_of(text.model).use(None)


def _wide_products(text: TextModel) -> None:
    part(text, "mlp.up_proj").products = torch.float32


def _checkpointed(text: TextModel) -> None:
    vars(block_of(text).original)["gradient_checkpointing"] = True


def _dropping(text: TextModel) -> None:
    bare(text, "self_attn").attention_dropout = 0.5


def _apart(text: TextModel) -> None:
    """One layer is told otherwise than the others."""
    part(text, "mlp.up_proj").selection = Selection()


CHANGES = [
    _another_weight, _other_numbers, _written_weight, _a_bias, _a_gain, _an_epsilon, _a_scale, _another_factor,
    _other_numbers_of_a_factor, _turned_where_it_lies, _cut, _anew, _in_bf16, _another_window, _a_window_of_the_config, _scaling,
    _another_activation, _another_base, _another_original, _one_token, _one_token_of_attention, _heard, _heard_pair, _heard_block,
    _heard_outward, _bare, _wide_products, _checkpointed, _dropping, _apart, _trained_weight, _a_buffer_for_a_bias, _another_norm,
]  # fmt: skip


def again(text: TextModel, *lengths: int) -> bool:
    """Whether the first block would be taken as it was before."""
    block: Any = block_of(text)
    return block._cached(in_c, torch.zeros(1, sum(lengths), 96, dtype=torch.bfloat16), lengths, 0) is not None


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_other_than_it_was_is_seen(folder: Path, change: Callable[[TextModel], None]) -> None:
    text = load(folder)
    before = step(text, 50, 70)
    assert again(text, 50, 70) and again(text, 90)
    with torch.no_grad():
        change(text)
    assert not again(text, 50, 70)
    if change in {_checkpointed, _dropping, _bare, _apart, _turned_where_it_lies, _a_window_of_the_config}:
        return  # by chance, without gradients, or nothing that can be computed
    after = step(text, 50, 70)
    require_same(after, by_parts(text, 50, 70))
    changes_nothing = {_heard_pair, _heard_block, _in_bf16, _wide_products, _trained_weight}  # here, but who computes
    assert change in changes_nothing or not torch.equal(before["loss"], after["loss"])


def test_codes_in_place_of_rows_are_seen_too(folder: Path) -> None:
    text = load(folder, kind="int8")
    for change in (lambda: None, lambda: enable_int8_products(text.model), text.model.eval):
        change()
        assert not again(text, 50, 70)
        step(text, 50, 70)
        assert again(text, 50, 70)


def test_dropout_counts_while_a_model_trains(folder: Path) -> None:
    text = load(folder, lora=LoraSpec(rank=5, dropout=0.5))
    text.model.eval()
    step(text, 50, 70)
    assert again(text, 50, 70)
    text.model.train()
    assert not again(text, 50, 70)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_weight_that_is_written_to_or_replaced_is_seen(folder: Path, kind: str) -> None:
    text = load(folder, kind=kind)
    base: PackedBase = part(text, "mlp.up_proj").base
    step(text, 50, 70)
    assert again(text, 50, 70)
    base.store(base.dense() * 2)
    assert not again(text, 50, 70)
    require_same(step(text, 50, 70), by_parts(text, 50, 70))
    assert again(text, 50, 70)
    name, buffer = next(iter(base._buffers.items()))
    assert buffer is not None
    base._buffers[name] = buffer.clone()
    assert not again(text, 50, 70)


def test_norms_of_heads_are_seen(tmp_path: Path) -> None:
    text = load(save_tiny_llama(tmp_path, family="qwen3", **SHAPE))
    for change in (
        lambda norm: setattr(norm, "variance_epsilon", 0.5),
        lambda norm: norm.weight.requires_grad_(True),
        lambda norm: norm.register_forward_hook(lambda *_: None),
    ):
        step(text, 50, 70)
        assert again(text, 50, 70)
        norm = bare(text, "self_attn.q_norm")
        change(norm)
        assert not again(text, 50, 70)
        norm.weight.requires_grad_(False)
        norm._forward_hooks.clear()


def test_a_hook_behind_another_one_is_seen(tmp_path: Path) -> None:
    """Backward hooks of a norm of heads, which is frozen, are nothing that changes what a block computes."""
    text = load(save_tiny_llama(tmp_path, family="qwen3", **SHAPE))
    part(text, "self_attn.q_norm").register_full_backward_hook(lambda *_: None)
    step(text, 50, 70)
    before = step(text, 50, 70)
    part(text, "mlp").register_forward_hook(lambda _, __, y: y * 2)
    after = step(text, 50, 70)
    assert not torch.equal(before["loss"], after["loss"])
    require_same(after, by_parts(text, 50, 70))


def test_a_memory_keeps_no_numbers_alive(folder: Path) -> None:
    text = load(folder, names=("default", "other"))
    selection_of(text.model).use("other")
    step(text, 50, 70, names=("other",))
    assert again(text, 50, 70)
    gone: list[str] = []
    pair, own = part(text, "mlp.up_proj").pair(), bare(text, "mlp.down_proj")
    for name, each in (("A", pair.A), ("B", pair.B), ("weight", own.weight)):
        weakref.finalize(each.untyped_storage(), gone.append, name)
    del pair, each
    assert gone == []
    eject(text.model, "other")
    own.weight = nn.Parameter(torch.zeros_like(own.weight), requires_grad=False)
    gc.collect()
    assert sorted(gone) == ["A", "B", "weight"]


def test_what_changes_meanwhile_is_not_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from another thread."""
    text, usual = load(folder), TrainedBlock._prepared

    def meanwhile(self: TrainedBlock, *given: Any) -> Any:
        found = usual(self, *given)
        own = bare(text, "mlp.up_proj")
        own.weight.data = own.weight.data.clone()
        return found

    monkeypatch.setattr(TrainedBlock, "_prepared", meanwhile)
    step(text, 50, 70)
    assert not again(text, 50, 70)


def test_copies_remember_nothing(folder: Path) -> None:
    text = load(folder)
    expected = step(text, 50, 70)
    copied = copy.deepcopy(text)
    for other in (block_of(copied).memory, pickle.loads(pickle.dumps(block_of(text).memory))):
        assert other.before is None
    require_same(step(copied, 50, 70), expected)
    assert again(copied, 50, 70)


def test_a_block_of_other_parts_has_no_look(folder: Path) -> None:
    text, x = load(folder), torch.zeros(1, 8, 96, dtype=torch.bfloat16)
    block = block_of(text).original
    assert block_arguments(block, ["default"], x) is not None
    assert block_arguments(block, ["nobody"], x) is None
    assert block_arguments(block.mlp, ["default"], x) is None
