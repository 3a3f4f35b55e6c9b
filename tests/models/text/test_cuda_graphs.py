"""Recorded passes: a recording of each shape alone, what is replayed is what the model computes, and proof before it counts."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakeet.core.scratch import SCRATCH
from lorakeet.core.spec import LoraSpec
from lorakeet.data.pack import Batch
from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels.flash_varlen import RowOffsets
from lorakeet.kernels.nf4_maxima import LAST, SharedMaxima
from lorakeet.models.inject import trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text import cuda_graphs
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.cuda_graphs import BatchShape, CudaGraphs, GraphedModel, NotRecorded
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.train.task import gradients_by_batch
from lorakeet.train.text.loss import text_loss
from tiny.flash import Flash
from tiny.models import save_tiny_llama
from tiny.tape import Tape

ROOM = BatchShape(256, 16, 64)
Made = tuple[TextModel, dict[str, Any], Tape, GraphedModel]


def moved(parameters: dict[str, Any]) -> dict[str, Any]:
    """An adapter's numbers, away from its start."""
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return parameters


@pytest.fixture
def made(flash: Flash, tiny_llama_folder: Path) -> Callable[..., Made]:
    """`made(**lora)`: a model as on a card, its adapter's numbers, all random, and its passes recorded on a tape."""
    flash.exact = False

    def build(**lora: Any) -> Made:
        spec = ModelSpec(path=str(tiny_llama_folder), dtype="bfloat16", products="bfloat16", device="cpu")
        text = load_text_model(spec)
        initialise_adapter(text, plan_for(text.model, LoraSpec(**{"rank": 4, "alpha": 12.0, **lora}), text.family), seed=1)
        parameters = moved(trained_parameters(text.model))
        tape = Tape()
        return text, parameters, tape, GraphedModel(text, parameters, tape, ROOM)

    return build


def learnt(text: Any, batch: Batch, parameters: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, and the gradients that it adds."""
    for parameter in parameters.values():
        parameter.grad = None
    loss, _ = text_loss(text, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}


def alike(mine: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    """To the rounding of bf16."""
    assert abs(mine[0] - theirs[0]) < 0.01 * abs(theirs[0])
    assert mine[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert torch.linalg.vector_norm(mine[1][name] - grad) <= 0.05 * torch.linalg.vector_norm(grad), name


LORA: list[dict[str, Any]] = [
    {},
    {"variant": "dora"},
    {"start": "pissa"},
    {"target_modules": ("q_proj", "lm_head", "embed_tokens")},
    {"target_modules": ("v_proj",), "extra_modules": ("model.norm",)},
]


@pytest.mark.parametrize("lora", LORA, ids=["lora", "dora", "pissa", "head-and-embedding", "norm"])
def test_what_is_replayed_is_what_the_model_computes(made: Callable[..., Made], rows: Any, lora: dict[str, Any]) -> None:
    """Other rows in the same shape, and another shape, with numbers that an optimizer moves in between."""
    text, parameters, tape, passes = made(**lora)
    for number, lengths in enumerate(([20, 9, 30], [31, 8, 18], [7, 25], [11, 29, 17])):
        batch = rows(lengths, seed=number)
        alike(learnt(passes, batch, parameters), learnt(text, batch, parameters))
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(1.1)
    shapes = {BatchShape.of(lengths, 64) for lengths in ((20, 9, 30), (31, 8, 18), (7, 25), (11, 29, 17))}
    assert shapes == {BatchShape(64, 4, 64), BatchShape(32, 2, 64)}
    assert tape.recordings == 2 * len(shapes) and set(passes.graphs) == shapes
    assert tape.replays == 2 * (len(shapes) + 4)  # once for each proof


def test_a_recording_made_of_one_micro_batch_gives_the_bits_of_one_made_of_another(made: Callable[..., Made], rows: Any) -> None:
    """Nothing of the rows that were there as it was recorded is left in it."""
    first, second = rows([20, 9, 30], seed=1), rows([33, 27, 3], seed=2)
    found = []
    for order in ((first, second), (second, first)):
        _, parameters, tape, passes = made()
        by_batch = {id(batch): learnt(passes, batch, parameters) for batch in order}
        assert tape.recordings == 2
        found.append([by_batch[id(batch)] for batch in (first, second)])
    for (loss, grads), (other, others) in zip(*found, strict=True):
        assert loss == other and all(torch.equal(grads[name], others[name]) for name in grads)


SHARED = {"target_modules": ("q_proj",), "extra_modules": ("model.embed_tokens",)}  # with the head, which is tied to it


@pytest.mark.parametrize("lora", [LORA[0], LORA[3], SHARED], ids=["lora", "head-and-embedding", "tied"])
def test_gradients_of_micro_batches_add_up(made: Callable[..., Made], rows: Any, lora: dict[str, Any]) -> None:
    """Also of what the head adds to, and what both do."""
    _, parameters, _, passes = made(**lora)
    batches = [rows([20, 9, 30], seed=1), rows([33, 27, 3], seed=2)]
    parts = [learnt(passes, batch, parameters)[1] for batch in batches]
    for parameter in parameters.values():
        parameter.grad = None
    for batch in batches:
        text_loss(passes, batch)[0].backward()  # type: ignore[no-untyped-call]
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, parts[0][name] + parts[1][name])
    for parameter in parameters.values():  # as an optimizer has it after its step
        parameter.grad = None
    text_loss(passes, batches[1])[0].backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(parameter.grad, parts[1][name]) for name, parameter in parameters.items())


def test_gradients_of_the_model_and_of_recorded_passes_add_up(made: Callable[..., Made], rows: Any) -> None:
    text, parameters, _, passes = made()
    batches = [rows([20, 9, 30], seed=1), rows([33, 27, 3], seed=2)]
    parts = [learnt(each, batch, parameters)[1] for each, batch in zip((text, passes), batches, strict=True)]
    for order in ((0, 1), (1, 0)):
        for parameter in parameters.values():
            parameter.grad = None
        for number in order:
            text_loss((text, passes)[number], batches[number])[0].backward()  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items():
            assert torch.equal(parameter.grad, parts[0][name] + parts[1][name])


def test_a_shape_that_comes_within_a_step_leaves_what_the_step_has_added(made: Callable[..., Made], rows: Any) -> None:
    _, parameters, tape, passes = made()
    batches = [rows([20, 9, 30], seed=1), rows([40, 50], seed=2), rows([33, 27, 3], seed=3)]
    parts = [learnt(passes, batch, parameters)[1] for batch in batches]
    recorded = tape.recordings
    passes.graphs.clear()
    for parameter in parameters.values():
        parameter.grad = None
    for batch in batches:
        text_loss(passes, batch)[0].backward()  # type: ignore[no-untyped-call]
    assert tape.recordings == 2 * recorded == 8
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, parts[0][name] + parts[1][name] + parts[2][name])


def test_nothing_is_kept_for_what_only_the_head_depends_on(made: Callable[..., Made], rows: Any) -> None:
    _, parameters, _, passes = made(target_modules=("q_proj", "lm_head"))
    learnt(passes, rows([20, 9, 30]), parameters)
    kept = [name for name, total in zip(passes.names, passes.sums, strict=True) if total is not None]
    assert kept == [name for name in parameters if "q_proj" in name] and len(kept) < len(parameters)
    for name, total in zip(passes.names, passes.sums, strict=True):
        assert (parameters[name].grad is total) == (name in kept)


def test_ctrl_c_while_recording_stays_ctrl_c(made: Callable[..., Made], rows: Any) -> None:
    _, parameters, tape, passes = made()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def interrupted(_: Any) -> Any:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("capture_end failed")

    tape.record = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        passes.record_first(rows([20, 9, 30]))
    assert not passes.graphs and all(torch.equal(parameters[name], numbers) for name, numbers in before.items())


def test_a_micro_batch_lets_go_of_its_graph_before_the_next_is_recorded(made: Callable[..., Made], rows: Any) -> None:
    """Or a card's recording meets the stream of the one before, in what the two have in common: here, the embedding's numbers."""
    _, _, tape, passes = made(target_modules=("q_proj", "lm_head", "embed_tokens"))
    losses: list[weakref.ref[Any]] = []
    record = tape.record

    def alone(what: Any) -> Any:
        assert all(loss() is None for loss in losses)
        return record(what)

    tape.record = alone  # type: ignore[method-assign]

    def loss(batch: Batch) -> Tensor:
        found, _ = text_loss(passes, batch)
        losses.append(weakref.ref(found))
        return found

    gradients_by_batch(loss, [rows([20, 9, 30]), rows([40, 50])], 100)
    assert len(losses) == 2 and tape.recordings == 4


def test_the_proof_leaves_numbers_and_gradients_as_they_were(made: Callable[..., Made], rows: Any) -> None:
    _, parameters, tape, passes = made()
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state = torch.get_rng_state()
    passes.record_first(rows([20, 9, 30]))
    assert tape.warmed == 2 and tape.replays == 2 and tape.recordings == 2
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]) and torch.equal(parameter.grad, torch.ones_like(parameter))


def test_a_first_shape_that_is_far_from_the_model_is_refused(made: Callable[..., Made], rows: Any) -> None:
    _, _, tape, passes = made()
    tape.broken = True
    with pytest.raises(EnvironmentProblem, match="is true, but hidden states of the CUDA graphs") as refused:
        passes.record_first(rows([20, 9, 30]))
    assert "Set train.cuda_graphs to false (for a run that has started: in its config.yaml" in str(refused.value)


def test_a_later_shape_that_is_far_from_the_model_is_said_once_and_computed_by_the_model(
    made: Callable[..., Made], rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    text, parameters, tape, passes = made()
    passes.record_first(rows([20, 9, 30]))
    tape.broken = True
    later = rows([40, 50], seed=3)
    with caplog.at_level(logging.WARNING, "lorakeet"):
        found = [learnt(passes, later, parameters) for _ in range(2)]
    assert len(caplog.messages) == 1 and "computed without CUDA graphs" in caplog.messages[0]
    loss, grads = learnt(text, later, parameters)
    for other, others in found:
        assert other == loss and all(torch.equal(others[name], grads[name]) for name in grads)
    tape.broken = False
    assert passes.graphs[BatchShape.of((40, 50), 64)] is None and passes.graphs[BatchShape.of((20, 9, 30), 64)] is not None


def test_gradients_alone_that_differ_are_found(made: Callable[..., Made], rows: Any) -> None:
    _, _, tape, passes = made()
    tape.spoils = 1  # the backward pass
    with pytest.raises(EnvironmentProblem, match=r"but the gradient of .* of the CUDA graphs and of the model differ"):
        passes.record_first(rows([20, 9, 30]))


def test_a_short_row_among_many_that_differs_is_found(made: Callable[..., Made], rows: Any) -> None:
    """It is a hundredth of the numbers: all of them together would tell nothing."""
    text, _, _, passes = made()
    placed = text.states_at

    def second_row_otherwise(ids: Tensor, positions: Tensor, places: RowOffsets) -> Tensor:
        found = placed(ids, positions, places)
        wrong = (torch.arange(len(ids)) >= places.starts[1]) & (torch.arange(len(ids)) < places.starts[2])
        return torch.where(wrong[:, None], 1.5 * found, found)

    vars(text)["states_at"] = second_row_otherwise
    with pytest.raises(EnvironmentProblem, match="but hidden states of target 59 of the CUDA graphs"):
        passes.record_first(rows([60, 2, 60, 60, 60]))


@pytest.mark.parametrize("lengths", [[20, 9, 30], [64, 64]])
def test_what_was_read_of_the_rows_that_were_recorded_is_found(made: Callable[..., Made], rows: Any, lengths: list[int]) -> None:
    """A cache that keeps positions, say: in the proof other rows are in their places."""
    text, _, _, passes = made()
    placed, kept = text.states_at, []

    def with_kept_positions(ids: Tensor, positions: Tensor, places: RowOffsets) -> Tensor:
        kept.append(positions.clone())
        return placed(ids, kept[0], places)

    vars(text)["states_at"] = with_kept_positions
    with pytest.raises(EnvironmentProblem, match="of the CUDA graphs and of the model differ"):
        passes.record_first(rows(lengths))


@pytest.mark.parametrize("lengths", [[64, 64], [32, 32], [20, 9, 30], [64]])
def test_kept_places_are_found_wherever_others_may_come(made: Callable[..., Made], rows: Any, lengths: list[int]) -> None:
    """Rows of one length too, which lie alike from whichever end: not where a shape has no room for other rows."""
    text, _, _, passes = made()
    placed, kept = text.states_at, []

    def with_kept_places(ids: Tensor, positions: Tensor, places: RowOffsets) -> Tensor:
        kept.append(places.starts.clone())
        return placed(ids, positions, RowOffsets(kept[0], places.longest))

    vars(text)["states_at"] = with_kept_places
    batch = rows(lengths)
    if lengths in ([64, 64], [64]):  # two places for 128 tokens, of at most 64 each
        passes.record_first(batch)
        return
    with pytest.raises(EnvironmentProblem, match="of the CUDA graphs and of the model differ"):
        passes.record_first(batch)


def test_memory_that_is_out_is_said_with_what_helps(made: Callable[..., Made], rows: Any) -> None:
    text, _, _, passes = made()

    def too_much(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    vars(text)["states_at"] = too_much
    with pytest.raises(EnvironmentProblem, match=r"Lower train.micro_tokens. Or: Set train.cuda_graphs to false"):
        passes.record_first(rows([20, 9, 30]))

    def and_then(*_: Any) -> Tensor:
        try:
            too_much()
        finally:
            raise RuntimeError("capture_end failed")

    vars(text)["states_at"] = and_then
    with pytest.raises(EnvironmentProblem, match="out of memory"):
        passes.record_first(rows([20, 9, 30]))


def test_an_adapter_of_the_head_alone_leaves_nothing_to_record(made: Callable[..., Made], rows: Any) -> None:
    _, _, _, passes = made(target_modules=("lm_head",))
    with pytest.raises(EnvironmentProblem, match="nothing is trained below the output head"):
        passes.record_first(rows([20, 9, 30]))


def test_what_lies_outside_of_a_recording_is_held_with_it(made: Callable[..., Made], rows: Any) -> None:
    _, _, _, passes = made()
    batch = rows([20, 9, 30])
    SCRATCH.matrix((3, 5), torch.float32, torch.device("cpu"))
    passes.record_first(batch)
    recorded = passes.graphs[BatchShape.of(batch.lengths, 64)]
    assert recorded is not None and {id(each) for each in recorded.scratch} == {id(each) for each in SCRATCH.lent()} != set()


def test_what_torch_said_first_is_what_is_said(made: Callable[..., Made], rows: Any) -> None:
    """A recording that fails fails again as it ends, with less to say."""
    _, _, tape, passes = made()

    def failing(_: Any) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("capture_end failed")

    tape.record = failing  # type: ignore[method-assign]
    with pytest.raises(EnvironmentProblem, match="cannot be recorded: operation not permitted"):
        passes.record_first(rows([20, 9, 30]))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gpt2", "gemma3"])
def test_models_whose_attention_is_not_fused_are_recorded_too(
    flash: Flash, tmp_path: Path, rows: Any, family: str
) -> None:
    """Micro-batches shorter than the longest row among them."""
    flash.exact = False
    save_tiny_llama(tmp_path / "model", family=family)
    text = load_text_model(ModelSpec(path=str(tmp_path / "model"), dtype="bfloat16", products="bfloat16", device="cpu"))
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4, alpha=12.0), text.family), seed=1)
    parameters = moved(trained_parameters(text.model))
    passes = GraphedModel(text, parameters, Tape(), ROOM)
    for number, lengths in enumerate(([20, 9, 30], [7, 20])):
        batch = rows(lengths, seed=number)
        alike(learnt(passes, batch, parameters), learnt(text, batch, parameters))


def test_a_model_that_the_host_reads_numbers_of_cannot_be_recorded(made: Callable[..., Made], rows: Any) -> None:
    text, _, _, passes = made()
    norm = text.model.model.norm
    norm.register_forward_hook(lambda _module, _given, out: out * (2.0 if out.sum().item() > 1e9 else 1.0))
    with pytest.raises(EnvironmentProblem, match="CUDA graphs cannot be recorded: _local_scalar_dense: operation not permitted"):
        passes.record_first(rows([20, 9, 30]))


def test_a_micro_batch_between_two_passes_of_another_is_refused(made: Callable[..., Made], rows: Any) -> None:
    _, _, _, passes = made()
    first = passes.hidden(rows([20, 9, 30]))
    passes.hidden(rows([20, 9, 31]))
    with pytest.raises(RuntimeError, match="another micro-batch ran between the forward and backward pass"):
        first.sum().backward()  # type: ignore[no-untyped-call]


def test_a_micro_batch_beyond_the_workspace_is_a_mistake_of_the_caller(made: Callable[..., Made], rows: Any) -> None:
    _, _, _, passes = made()
    with pytest.raises(ValueError, match=r"the buffers are made for BatchShape\("):
        passes.hidden(rows([60] * 5))


def test_nothing_is_held_beyond_the_run(made: Callable[..., Made], rows: Any) -> None:
    """Without garbage being collected: what a card holds of it is gigabytes."""
    _, parameters, _, passes = made()
    learnt(passes, rows([20, 9, 30]), parameters)
    held = weakref.ref(passes)
    gc.disable()
    try:
        del passes
        assert held() is None
    finally:
        gc.enable()


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(90, 200))
def test_a_shape_has_places_for_all_rows_and_none_is_too_long(lengths: list[int], longest: int) -> None:
    shape = BatchShape.of(lengths, longest)
    rows = shape.rows_of(lengths)
    assert rows[: len(lengths)] == lengths and sum(rows) == shape.tokens and len(rows) == shape.rows
    assert max(rows) <= longest
    others = shape.other_rows(lengths)
    assert sum(others) == shape.tokens and len(others) == shape.rows and max(others) <= longest
    assert others != rows or shape.tokens == shape.rows * longest or shape.rows == 1
    room = BatchShape.largest(longest, sum(lengths), len(lengths))
    assert shape.tokens <= room.tokens and shape.rows <= room.rows


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.data())
def test_the_largest_shape_bounds_any_micro_batch(longest: int, micro_tokens: int, rows: int, data: st.DataObject) -> None:
    room = BatchShape.largest(longest, micro_tokens, rows)
    count = data.draw(st.integers(1, min(rows, micro_tokens)))
    most = min(longest, micro_tokens // count)
    lengths = data.draw(st.lists(st.integers(1, most), min_size=count, max_size=count))
    for shape in (BatchShape.of(lengths, longest), BatchShape.of([longest], longest)):
        assert shape.tokens <= room.tokens and shape.rows <= room.rows and max(shape.rows_of([longest])) <= longest


def test_beyond_so_many_shapes_the_model_computes(
    made: Callable[..., Made], rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver keeps memory for each graph, which is planned for so many."""
    monkeypatch.setattr(cuda_graphs, "MOST_SHAPES", 1)
    text, parameters, tape, passes = made()
    learnt(passes, rows([20, 9, 30]), parameters)
    later = rows([40, 50], seed=3)
    with caplog.at_level(logging.WARNING, "lorakeet"):
        found = learnt(passes, later, parameters)
    assert len(passes.graphs) == 1 and tape.recordings == 2 and not caplog.messages
    loss, grads = learnt(text, later, parameters)
    assert found[0] == loss and all(torch.equal(found[1][name], grads[name]) for name in grads)


def test_a_proof_on_further_rows_of_a_shape_records_nothing_and_leaves_gradients(made: Callable[..., Made], rows: Any) -> None:
    _, parameters, tape, passes = made()
    passes.record_first(rows([20, 9, 30]))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    passes.prove_on(rows([33, 27, 3], seed=2))
    assert tape.recordings == 2 and all(torch.equal(each.grad, torch.ones_like(each)) for each in parameters.values())
    tape.broken = True
    with pytest.raises(NotRecorded, match="is true, but hidden states of the CUDA graphs"):
        passes.prove_on(rows([33, 27, 3], seed=2))


@pytest.mark.parametrize("required", [True, False])
def test_a_later_shape_that_fails_ends_the_run_only_where_graphs_are_required(
    required: bool, made: Callable[..., Made], rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, parameters, tape, passes = made()
    passes.required = required
    passes.record_first(rows([20, 9, 30]))

    def refusing(_: Any) -> Any:
        raise RuntimeError("capture failed")

    tape.record = refusing  # type: ignore[method-assign]
    if required:
        with pytest.raises(NotRecorded, match="CUDA graphs cannot be recorded: capture failed"):
            learnt(passes, rows([40, 50]), parameters)
        return
    with caplog.at_level(logging.WARNING, "lorakeet"):
        learnt(passes, rows([40, 50]), parameters)
    assert "CUDA graphs cannot be recorded: capture failed" in caplog.text


def test_no_shared_block_maxima_enter_a_recording_or_outlive_it(made: Callable[..., Made], rows: Any) -> None:
    """Those of a recording are memory of its pool, into which only a replay writes."""
    _, _, tape, passes = made()
    maxima, warm, record, seen = SharedMaxima.__new__(SharedMaxima), tape.warm, tape.record, list[int]()
    LAST[maxima] = torch.zeros(1)

    def warming(what: Any) -> Any:
        seen.append(len(LAST))
        return warm(what)

    def recording(what: Any) -> Any:
        LAST[maxima] = torch.zeros(1)
        return record(what)

    tape.warm, tape.record = warming, recording  # type: ignore[method-assign]
    passes.record_first(rows([20, 9, 30]))
    assert seen[0] == 0 and not LAST


class Graph:
    """torch.cuda.CUDAGraph, whose capture begins and cannot be ended."""

    def __init__(self) -> None:
        self.did: list[str] = []
        GRAPHS.append(self)

    def capture_begin(self, *_: Any, **__: Any) -> None:
        self.did.append("begin")

    def capture_end(self) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def reset(self) -> None:
        self.did.append("reset")

    def replay(self) -> None: ...


class Stream:
    device = torch.device("cuda", 0)


GRAPHS: list[Graph] = []


@pytest.mark.parametrize("ended", [False, True])
def test_after_a_failed_capture_the_stream_is_the_one_before_and_nothing_is_kept(
    ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own torch.cuda.graph, which leaves its stream current. `ended`: the allocator is done with the pool."""
    GRAPHS.clear()
    before, current, did = Stream(), list[Any](), list[tuple[Any, ...]]()
    current.append(before)

    def end(*given: Any) -> None:
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        did.append(("end", *given, *GRAPHS[0].did))

    values = {
        "graph_pool_handle": lambda: (0, 7), "Stream": lambda *_: Stream(), "CUDAGraph": Graph,
        "device": lambda *_: nullcontext(), "current_stream": lambda *_: current[-1], "set_stream": current.append,
        "synchronize": lambda: None, "empty_cache": lambda: None, "current_device": lambda: 0, "_get_device_index": lambda *_: 0,
    }  # fmt: skip
    built, of_allocator = torch._C, {
        "_cuda_endAllocateToPool": end, "_cuda_releasePool": lambda *given: did.append(("release", *given)),
        "_host_emptyCache": lambda: None,
    }  # fmt: skip
    for module, functions in ((torch.cuda, values), (built, of_allocator)):
        for name, value in functions.items():
            monkeypatch.setattr(module, name, value, raising=module is torch.cuda)
    graphs = CudaGraphs(torch.device("cuda", 0))

    def passes() -> None:
        assert current[-1] is graphs.stream
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="previous error during capture") as failed:
        graphs.record(passes)
    assert "operation not permitted" in str(failed.value.__context__)
    assert current[-1] is before and GRAPHS[0].did == ["begin", "reset"]
    assert did == ([] if ended else [("end", 0, (0, 7), "begin"), ("release", 0, (0, 7))]), "before the graph is reset"
    monkeypatch.setattr(Graph, "capture_end", lambda self: self.did.append("end"))
    replay, result = graphs.record(lambda: 3)
    assert result == 3 and current[-1] is before and GRAPHS[1].did == ["begin", "end"] and replay == GRAPHS[1].replay


@pytest.mark.parametrize("error", [TypeError("no such argument"), torch.OutOfMemoryError("CUDA out of memory")])
def test_after_a_failure_in_mid_training_nothing_more_is_recorded(
    error: Exception, made: Callable[..., Made], rows: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where graphs are not required: one line, whatever the error; what was recorded stays in use."""
    text, parameters, tape, passes = made()
    passes.required = False
    passes.record_first(rows([20, 9, 30]))
    freed: list[bool] = []
    monkeypatch.setattr(cuda_graphs, "release_device_memory", lambda: freed.append(passes.recorder is None))

    def failing(_: Any) -> Any:
        raise error

    tape.record = failing  # type: ignore[method-assign]
    later = [rows([40, 50], seed=3), rows([7, 20], seed=4)]
    with caplog.at_level(logging.WARNING, "lorakeet"):
        found = [learnt(passes, batch, parameters) for batch in later]
    (message,) = caplog.messages
    assert "of this and any other new shape are computed without CUDA graphs." in message and freed == [True]
    memory = isinstance(error, torch.OutOfMemoryError)
    assert ("report" in message) != memory and ("out of memory" if memory else "TypeError: no such argument") in message
    for batch, (loss, grads) in zip(later, found, strict=True):
        expected = learnt(text, batch, parameters)
        assert loss == expected[0] and all(torch.equal(grads[name], expected[1][name]) for name in grads)
    replays = tape.replays
    learnt(passes, rows([20, 9, 30]), parameters)
    assert tape.replays == replays + 2
