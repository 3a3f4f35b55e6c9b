"""A host does not wait for its card: not once within a micro-batch, at most three times a step (on the simulated card)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinds.preference.test_task import task_on, with_reference
from lorakeet.memory.spill import HostSpill
from lorakeet.models.inject import inject
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.train import optimizer
from lorakeet.train.text.multi_adapter import Member, MultiAdapterTraining
from tiny.card_steps import BEGINNING, LORA, SPEC, rows_behind, stepped, training_on_card
from tiny.family_columns import saved
from tiny.models import LAYERS, save_tiny_llama
from tiny.simulated_card import Card, Wait, simulated_card

MOST = 3  # waits of an optimizer step: the loss, whether the gradient is finite, and its norm
CASES: dict[str, dict[str, Any]] = {
    "rows that share a beginning": {},
    "fp32": {"dtype": "float32"},
    "nf4": {"quantize": "nf4"},
    "int8": {"quantize": "int8"},
    "products in int8": {"quantize": "int8", "int8_products": True, "spec": replace(SPEC, batch_size=8, micro_tokens=120)},
    "dropout": {"lora": replace(LORA, dropout=0.1)},
    "moments of 8 bits": {"spec": replace(SPEC, moments="8bit")},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_micro_batch_waits_for_nothing(case: str, card: Card, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "SMALLEST", 64)  # numbers of a tensor whose moments are quantised
    training = training_on_card(tiny_llama_folder, rows_behind(BEGINNING, 24), **CASES[case])
    within, all_of_step, batches = stepped(training, card)
    assert batches > 1, "more than one micro-batch a step"
    assert within == []
    assert len(all_of_step) <= MOST, all_of_step
    assert card.flash.calls + card.flash.efficient_calls > 0, "rows in one call of attention"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_micro_batch_of_pairs_waits_for_nothing(objective: str, card: Card, tiny_llama_folder: Path) -> None:
    """Tokens and references of answers go over together. KTO reads its estimate of the KL before a step's first micro-batch."""
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="bfloat16", device="cuda"))
    task = task_on(initialise_adapter(text, plan_for(text.model, LORA, text.family), seed=0), objective)
    with_reference(task)
    for step in range(2):
        batches = task.batches(step)
        task.begin_step(batches)
        task.loss(batches[0]).backward()
    card.reset()
    task.loss(task.batches(1)[0]).backward()
    assert card.waits == []


@pytest.mark.slow
def test_adapters_in_one_pass_are_waited_for_once_a_step_each(card: Card, tiny_llama_folder: Path) -> None:
    """The losses of its micro-batches, and what is asked of its gradient."""
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="bfloat16", device="cuda"))
    members = []
    for number, name in enumerate("abc"):
        inject(text.model, plan_for(text.model, LORA, text.family), name, seed=number)
        members.append(Member(name, replace(SPEC, batch_size=6, micro_tokens=60), rows_behind(BEGINNING, 24), ()))
    training = MultiAdapterTraining(text, members)
    passes: list[list[Wait]] = []
    computed = training._gradients

    def watched(*given: Any) -> None:
        before = len(card.waits)
        computed(*given)
        passes.append(card.waits[before:])

    training._gradients = watched  # type: ignore[method-assign]
    for _ in range(4):
        card.reset()
        passes.clear()
        training.round()
    assert passes and all(not waits for waits in passes), passes
    assert 0 < len(card.waits) <= MOST * len(members), card.waits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_grouped_products_of_experts_wait_for_nothing(family: str, tmp_path: Path) -> None:
    with simulated_card((9, 0)) as card:
        folder = save_tiny_llama(tmp_path / family, family=family, intermediate_size=48)
        training = training_on_card(folder, rows_behind(BEGINNING, 24), lora=replace(LORA, rank=8))
        within, all_of_step, _ = stepped(training, card)
        assert within == [] and len(all_of_step) <= MOST
        assert card.launches["_grouped_mm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "capability"), [
    ("gpt_oss", "bfloat16", (8, 9)), ("qwen3_moe", "float32", (9, 0)),
])  # fmt: skip
def test_a_block_of_experts_waits_once_a_pass(family: str, dtype: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """Where torch's grouped product reads on the host where the tokens of each expert end, it would wait in each of 16
    products. So of what is sorted by expert on the card, the host reads once how many tokens each expert has."""
    with simulated_card(capability) as card:
        folder = save_tiny_llama(tmp_path / family, family=family, intermediate_size=48)
        training = training_on_card(folder, rows_behind(BEGINNING, 24), dtype=dtype, lora=replace(LORA, rank=8))
        within, all_of_step, batches = stepped(training, card)
        assert card.launches["_grouped_mm"] == 0
    assert {(wait.kind, wait.place.partition(":")[0]) for wait in within} == {("numbers are read", "core/layers/experts.py")}
    assert len(within) == batches * LAYERS, within
    assert len(all_of_step) - len(within) <= MOST


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_padded_rows_of_recurrent_layers_wait_for_nothing(family: str, card: Card, tmp_path: Path) -> None:
    """Masks come by kind of layer (models/text/row_masks): of a mask of ones transformers reads for each kind what it hides."""
    training = training_on_card(saved(family, tmp_path), rows_behind(BEGINNING, 24))
    assert training.task.text.attention == "sdpa"
    within, all_of_step, batches = stepped(training, card)
    assert batches > 1 and within == []
    assert len(all_of_step) <= MOST, all_of_step


@pytest.mark.slow
def test_one_mask_is_read_once(card: Card, tiny_llama_folder: Path) -> None:
    """A model with attention alone, whose rows are padded on request: transformers asks once whether its mask hides anything."""
    rows = rows_behind(BEGINNING, 24)
    training = training_on_card(tiny_llama_folder, rows, attention="sdpa")
    within, all_of_step, batches = stepped(training, card)
    assert [wait.place.partition(":")[0] for wait in within] == ["models/text/model.py"] * batches
    assert len(all_of_step) - len(within) <= MOST


@pytest.mark.slow
@pytest.mark.parametrize(("pinned", "ends"), [(False, False), (True, True)], ids=["head comes from disk", "head stays"])
def test_blocks_that_come_and_inputs_that_go_are_not_waited_for(pinned: bool, ends: bool, card: Card, tmp_path: Path) -> None:
    """What is copied goes through pinned memory: blocks, tiles of the head, rows of the embedding, and inputs both ways."""
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=4)
    residence = {"slots": 2, "pinned": pinned, "ends": ends}
    training = training_on_card(folder, rows_behind(BEGINNING, 24), store=tmp_path / "store", **residence)
    transfer = training.task.text.streamed.stream.transfer
    training.task.spill, training.task.together = HostSpill(transfer), 2
    within, all_of_step, batches = stepped(training, card)
    assert batches > 2 and within == []
    assert len(all_of_step) <= MOST, all_of_step
    states = training.task.batches(2)[0].tokens * 32 * 2  # numbers of a state, in bf16
    assert card.copies["to the host"] >= 4 * states and not training.task.spill._tensors
