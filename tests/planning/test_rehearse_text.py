"""A rehearsed step against the same step in memory: every byte that Python can see of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lorakeet.core.scratch import SCRATCH
from lorakeet.core.spec import LoraSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.planning.rehearse_text import (
    CHECKPOINT,
    EVALUATE,
    STEP,
    NotPlanned,
    Rehearsal,
    RowShape,
    made_up_rows,
    on_shapes,
    planning_within,
    rehearse,
    training_on,
)
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.spec import TrainSpec

SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LORA = LoraSpec(rank=4, alpha=12)
ROWS = RowShape(32, 2)


def rehearsed(rows: RowShape = ROWS, quantize: str = "none", lora: LoraSpec = LORA, **changes: int) -> Rehearsal:
    build = partial(
        model_from_config, config_from_settings({**SMALL, **changes}), name="small", dtype=torch.float32, products=torch.float32,
        quantize=QuantSpec(method=quantize),  # type: ignore[arg-type]
    )  # fmt: skip
    return rehearse(build, lora, TrainSpec(), rows=rows)


def test_what_is_kept_all_along_is_counted_exactly() -> None:
    found = rehearsed()
    real = model_from_config(config_from_settings(SMALL), name="small", dtype=torch.float32, products=torch.float32)
    base = sum(tensor.nbytes for tensor in {id(t): t for t in (*real.model.parameters(), *real.model.buffers())}.values())
    assert found.base == base
    assert found.parameters == sum(parameter.numel() for parameter in real.model.parameters())
    adapter = 4 * found.plan.parameters
    step = found.peaks[STEP].kinds
    assert step["base"] == base and step["adapter"] == 2 * adapter, "the adapter and the best one so far"
    assert 2 * adapter <= step["moments"] <= 2 * adapter + 8 * 2 * len(found.plan.entries)  # and a step count each
    assert set(found.peaks) >= {EVALUATE, STEP, CHECKPOINT}


def test_the_saved_activations_are_those_that_autograd_saves() -> None:
    text = model_from_config(config_from_settings(SMALL), name="small", dtype=torch.float32, products=torch.float32)
    initialise_adapter(text, plan_for(text.model, LORA, text.family), seed=0)
    training = training_on(text, TrainSpec(), ROWS)
    kept = {parameter.untyped_storage().data_ptr() for parameter in text.model.parameters()}
    kept |= {buffer.untyped_storage().data_ptr() for buffer in text.model.buffers()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training.task.loss(training.task.batches(0)[0])
    expected = sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in kept)
    planned = rehearsed().peaks[STEP].kinds["saved activations"]
    assert 0.8 * expected <= planned <= 1.1 * expected


@pytest.mark.slow
def test_more_layers_rows_and_rank_take_more_and_attention_alone_takes_less() -> None:
    plain = rehearsed().peaks[STEP].bytes
    assert rehearsed(num_hidden_layers=3).peaks[STEP].bytes > plain
    assert rehearsed(rows=RowShape(32, 4)).peaks[STEP].bytes > plain
    assert rehearsed(lora=LoraSpec(rank=8, alpha=12)).peaks[STEP].bytes > plain
    assert rehearsed(lora=LoraSpec(rank=4, alpha=12, target_modules=("attention",))).peaks[STEP].bytes < plain


def test_packed_weights_are_smaller_and_leave_no_fake_matrix_behind() -> None:
    dense, packed = rehearsed(), rehearsed(quantize="nf4")
    assert packed.base < dense.base and packed.parameters == dense.parameters
    assert packed.peaks[STEP].bytes < dense.peaks[STEP].bytes
    matrix = SCRATCH.matrix((4, 4), torch.float32, torch.device("cpu"))
    assert type(matrix) is torch.Tensor
    SCRATCH.clear()


def test_work_is_that_of_one_micro_batch() -> None:
    found = rehearsed()
    forward = 2 * found.parameters * ROWS.tokens
    assert 1.5 * forward < found.work.flops < 4 * forward  # forward and backward through the frozen weights
    assert found.work.written > found.base


def test_made_up_rows_share_no_beginning() -> None:
    """Those of 13 different rows were computed once for all of a micro-batch, so that large ones were planned as small ones."""
    text = model_from_config(config_from_settings(SMALL), name="small", dtype=torch.float32, products=torch.float32)
    initialise_adapter(text, plan_for(text.model, LORA, text.family), seed=0)
    batches = training_on(text, TrainSpec(), RowShape(64, 64)).task.batches(0)
    assert [text.layout(batch).ids.numel() for batch in batches] == [64 * 64] * 2


def test_a_shorter_last_row_is_in_each_micro_batch() -> None:
    shape = RowShape(32, 3, last=5)
    assert shape.tokens == 69 and shape.words == "3 rows of at most 32 tokens, 69 in all"
    assert [len(row.ids) for row in made_up_rows(shape, 2)] == [32, 32, 5] * 2
    text = model_from_config(config_from_settings(SMALL), name="small", dtype=torch.float32, products=torch.float32)
    initialise_adapter(text, plan_for(text.model, LORA, text.family), seed=0)
    batches = training_on(text, TrainSpec(), shape).task.batches(0)
    assert [sorted(batch.lengths) for batch in batches] == [[5, 32, 32]] * 2


@pytest.mark.slow
def test_made_up_rows_give_every_pair_a_gradient_whatever_the_made_up_weights() -> None:
    """Rows of one token repeated had left queries and keys, whose values were all alike, with gradients of pure rounding."""
    for seed in range(12):
        torch.manual_seed(seed)
        text = model_from_config(config_from_settings(SMALL), name="small", dtype=torch.bfloat16, products=torch.float32)
        initialise_adapter(text, plan_for(text.model, LORA, text.family), seed=0)
        training = training_on(text, TrainSpec(), RowShape(64, 2))
        training.step()  # which raises where a gradient did not arrive


def test_code_that_wants_numbers_is_not_planned_and_said() -> None:
    because = r"cannot be planned: its code does not run on shapes alone \(KeyError: 'full_attention'\)"
    with pytest.raises(NotPlanned, match=because), on_shapes():
        _ = dict[str, str]()["full_attention"]


def test_a_rehearsal_ends_when_its_time_is_over() -> None:
    because = r"not planned: a rehearsal on shapes was not done after 0 s of processor time"
    with pytest.raises(NotPlanned, match=because), planning_within(0), on_shapes():
        while True:
            torch.ones(2).add_(1)
