"""`train.cuda_graphs`: what is refused and how to mend it, and a run whose passes are recorded learns what any other learns."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from lorakeet.config import RunConfig, read_run
from lorakeet.data.batches import StepOrder
from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kernels.device import standing_for
from lorakeet.models.placement import device_for
from lorakeet.models.text import cuda_graphs as model_graphs
from lorakeet.models.text.cuda_graphs import BatchShape, GraphedModel
from lorakeet.models.text.model import TextModel
from lorakeet.train.checkpoint import run_identity
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask
from lorakeet.workflows.finetune import finetune
from lorakeet.workflows.finetuning import cuda_graphs as workflow
from lorakeet.workflows.finetuning.assemble_text import TextAssembly, assemble_text, text_task
from lorakeet.workflows.finetuning.cuda_graphs import (
    FIRST,
    largest_micro_batch,
    record_graphs,
    require_graphable,
    try_graphs,
    use_graphs,
)
from lorakeet.workflows.finetuning.text import TextRunKind
from lorakeet.workflows.options import FinetuneOptions, TuneOptions
from lorakeet.workflows.runs.residency import Residency, Way
from lorakeet.workflows.tune import tune
from tiny.flash import Flash
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, settings, write_rows
from tiny.simulated_card import simulated_card
from tiny.tape import Tape

NARROW = {"model.dtype": "bfloat16", "model.products": "bfloat16", "model.device": "cpu", "train.micro_tokens": "200"}
RECORDED = {**NARROW, "train.cuda_graphs": "true"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(40))


def assembled(model: Path, data: Path, out: Path, changes: dict[str, str]) -> TextAssembly:
    return assemble_text(settings(model, data, out, changes), quiet())


def learnt(setup: TextAssembly, folder: Path, tape: Tape | None = None) -> list[float]:
    """The losses of a run's steps."""
    task = text_task(setup)
    record_graphs(setup.text, task, quiet(), tape)
    assert (task.replayed is None) == (tape is None)
    run = RunFolder.create(folder)
    train(task, setup.config.train, run=run)
    return [record["loss"] for record in read_metrics(run.metrics) if "loss" in record]


def test_a_recorded_run_learns_what_any_other_learns(
    flash: Flash, tiny_llama_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash.exact = False
    monkeypatch.setattr(workflow, "CudaGraphs", None)  # a card's are not for here
    plain = learnt(assembled(tiny_llama_folder, data, tmp_path / "one", NARROW), tmp_path / "plain")
    tape = Tape()
    recorded = learnt(assembled(tiny_llama_folder, data, tmp_path / "two", RECORDED), tmp_path / "recorded", tape)
    assert len(recorded) == len(plain) == 6 and plain[-1] < plain[0]
    assert recorded == pytest.approx(plain, rel=0.02)
    assert tape.recordings < tape.replays / 3  # a few shapes, and many micro-batches


def test_the_largest_micro_batch_comes_first_and_bounds_all(
    flash: Flash, tiny_llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    flash.exact = False
    setup = assembled(tiny_llama_folder, data, tmp_path / "run", RECORDED)
    task = text_task(setup)
    said = io.StringIO()
    record_graphs(setup.text, task, Console(file=said), Tape())
    passes = task.replayed
    assert passes is not None
    (first,) = passes.graphs
    assert "Recording a micro-batch of " in said.getvalue()
    batches = [batch for step in range(2 * task.steps_per_epoch) for batch in task.batches(step)]
    shapes = [BatchShape.of(batch.lengths, passes.capacity.longest) for batch in batches]
    assert first.tokens == passes.capacity.tokens >= max(shape.tokens for shape in shapes)
    assert all(shape.tokens <= passes.capacity.tokens and shape.rows <= passes.capacity.rows for shape in shapes)
    assert passes.capacity.longest == max(len(row.ids) for row in task.train)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 400), st.integers(1, 12))
def test_no_micro_batch_has_more_tokens_than_the_made_up_one(lengths: list[int], micro_tokens: int, batch_size: int) -> None:
    rows = [Example(np.arange(n), np.arange(n) > 0, str(number), None, False) for number, n in enumerate(lengths)]
    spec = TrainSpec(batch_size=batch_size, micro_tokens=micro_tokens)
    largest = largest_micro_batch(rows, spec)
    order = StepOrder(len(rows), batch_size, 0, tuple(lengths))
    for step in range(order.steps_per_epoch):
        for batch in micro_batches([rows[number] for number in order.indices(step)], micro_tokens):
            assert batch.tokens <= largest.tokens
    assert max(largest.lengths) <= max(lengths) and len(largest.lengths) <= batch_size
    assert largest.tokens <= max(micro_tokens, *lengths)


def test_rows_that_begin_alike_are_cut_as_rows_that_share_nothing(
    flash: Flash, tiny_llama_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash.exact = False
    setup = assembled(tiny_llama_folder, data, tmp_path / "run", RECORDED)
    task = text_task(setup)
    record_graphs(setup.text, task, quiet(), Tape())
    assert all(batch.tokens <= 200 for batch in task.batches(0))
    monkeypatch.setattr(TextModel, "micro_batches", None)  # which looks for what rows share
    plain = micro_batches([task.train[row] for row in task.order.indices(0)], 200)
    assert [batch.keys for batch in task.batches(0)] == [batch.keys for batch in plain]
    task.replayed = None
    with pytest.raises(TypeError):
        task.batches(0)


def config_with(data: Path, tmp_path: Path, tiny: Path, **changes: str) -> RunConfig:
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return settings(tiny, data, tmp_path / "run", {"train.cuda_graphs": "true", **given})


def test_settings_that_cannot_be_recorded_are_all_named(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    given = {"memory__budget": "8 GB", "train__keep_prefix_states": "true", "ranks__choose": "prune", "lora__dropout": "0.1"}
    with pytest.raises(ConfigError) as refused:
        require_graphable(config_with(data, tmp_path, tiny_llama_folder, **given), 2)
    for named in (
        "2 processes", "memory.budget is 8 GB", "train.keep_prefix_states is on", "ranks.choose is prune", "lora.dropout is 0.1"
    ):  # fmt: skip
        assert named in str(refused.value)
    require_graphable(settings(tiny_llama_folder, data, tmp_path / "run", {"lora.dropout": "0.1"}))  # not asked for


def test_without_a_cuda_gpu_a_run_is_refused_and_writes_nothing(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    config = config_with(data, tmp_path, tiny_llama_folder, model__device="cpu")
    with pytest.raises(EnvironmentProblem, match=r"model.device is cpu. CUDA graphs need .* Set train\.cuda_graphs to false"):
        finetune(config, console=quiet())
    with pytest.raises(ConfigError, match="gpu"):  # no such device: that is what is said
        finetune(config_with(data, tmp_path, tiny_llama_folder, model__device="gpu"), console=quiet())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="a search trains several"):
        tune(config, TuneOptions(quick=True), console=quiet())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("auto", f"model.device is auto, which is {device_for('auto')} here. CUDA graphs need an NVIDIA GPU"),
        ("cuda:1", f"model.device is cuda:1, but torch {torch.__version__} finds no CUDA device here. CUDA graphs need"),
    ],
)
def test_what_is_wanted_of_a_device_is_said(tiny_llama_folder: Path, data: Path, tmp_path: Path, asked: str, said: str) -> None:
    with pytest.raises(EnvironmentProblem, match=re.escape(said)):
        require_graphable(config_with(data, tmp_path, tiny_llama_folder, model__device=asked))


def test_a_torch_for_other_gpus_is_named(
    tiny_llama_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(EnvironmentProblem, match="this torch is built for ROCm"):
        require_graphable(config_with(data, tmp_path, tiny_llama_folder))


def test_models_that_cannot_be_recorded_are_refused(flash: Flash, tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    setup = assembled(tiny_llama_folder, data, tmp_path / "run", RECORDED)
    task, model = text_task(setup), setup.text.model
    config = model.config.get_text_config()

    def refusal() -> str:
        with pytest.raises(EnvironmentProblem) as refused:
            record_graphs(setup.text, task, quiet(), Tape())
        assert task.replayed is None
        return str(refused.value)

    config.attention_dropout = 0.1
    assert "attention_dropout is 0.1 in the model's config.json" in refusal()
    config.attention_dropout = 0.0
    model.extra = nn.Dropout(0.2)
    assert "the model has dropout" in refusal()
    del model.extra
    rope, config.rope_parameters = config.rope_parameters, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "rope_type is dynamic" in refusal()
    config.rope_parameters = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    assert "rope_type is longrope" in refusal()
    config.rope_parameters = rope
    config._attn_implementation = "sdpa"
    assert "model.attention is sdpa" in refusal()


def test_experts_that_are_chosen_by_the_numbers_are_refused(flash: Flash, tmp_path: Path, data: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", family="mixtral")
    setup = assembled(folder, data, tmp_path / "run", {**RECORDED, "lora.target_modules": "experts"})
    with pytest.raises(EnvironmentProblem, match="the model chooses experts by values"):
        record_graphs(setup.text, text_task(setup), quiet(), Tape())


def test_dropout_of_heads_that_write_no_text_is_no_reason(flash: Flash, tmp_path: Path, data: Path) -> None:
    flash.exact = False
    folder = save_tiny_llama(tmp_path / "model", family="gpt2")
    setup = assembled(folder, data, tmp_path / "run", {**RECORDED, "data.max_tokens": "60"})
    assert setup.text.model.config.summary_first_dropout > 0
    task = text_task(setup)
    record_graphs(setup.text, task, quiet(), Tape())
    assert task.replayed is not None and not setup.text.model.training


def test_a_model_whose_attention_takes_no_offsets_is_refused(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    """On a card in fp32 rows go one by one, by their lengths."""
    wide = {**RECORDED, "model.dtype": "float32", "model.products": "float32"}
    setup = assembled(tiny_llama_folder, data, tmp_path / "run", wide)
    with standing_for(torch.device("cuda")), pytest.raises(EnvironmentProblem, match="flash kernel does not have"):
        record_graphs(setup.text, text_task(setup), quiet(), Tape())


def test_a_run_may_go_on_without(tiny_llama_folder: Path, data: Path, tmp_path: Path) -> None:
    """As the refusal says: the setting is changed in the run's config.yaml, and the run is the same one."""
    spec = settings(tiny_llama_folder, data, tmp_path / "run").train
    recorded = dataclasses.replace(spec, cuda_graphs=True)
    one, other = (run_identity(each, {}, parameters={}, learning_rate=1e-3) for each in (spec, recorded))
    assert json.dumps(one) == json.dumps(other)


def test_a_run_whose_config_is_edited_resumes(finished: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.path, tmp_path / "run")
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("cuda_graphs: null", "cuda_graphs: true"))
    with pytest.raises(EnvironmentProblem, match=r"Set train\.cuda_graphs to false"):
        finetune(read_run(file, {}), FinetuneOptions(resume=folder), console=quiet())
    file.write_text(file.read_text().replace("cuda_graphs: true", "cuda_graphs: false"))
    assert finetune(read_run(file, {}), FinetuneOptions(resume=folder), console=quiet()).exit_code == 0


def tried(model: Path, data: Path, out: Path, tape: Any, **changes: str) -> tuple[TextAssembly, TextTask, str]:
    """A run in which nothing is said of CUDA graphs, on a card by name and with room for them, and what was said."""
    setup = assembled(model, data, out, {**NARROW, **changes})
    setup = dataclasses.replace(setup, residency=Residency(way=Way(graphs=True)))
    task, screen = text_task(setup), io.StringIO()
    use_graphs(setup, task, Console(file=screen, width=300), tape)
    return setup, task, screen.getvalue()


@pytest.fixture
def on_card(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    flash.exact = False
    monkeypatch.setattr(TextAssembly, "device", torch.device("cuda", 0))


def test_by_itself_a_small_model_is_recorded_and_proved_on_its_own_micro_batches(
    on_card: None, tiny_llama_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[Any] = []
    prove = GraphedModel.prove_on

    def noting(self: GraphedModel, batch: Any) -> None:
        proved.append(batch.keys)
        prove(self, batch)

    monkeypatch.setattr(GraphedModel, "prove_on", noting)
    setup, task, said = tried(tiny_llama_folder, data, tmp_path / "run", Tape())
    assert task.replayed is not None and not task.replayed.required and not setup.text.model.training
    assert "Used: they give the model's own numbers on the first micro-batches." in said
    assert proved == [batch.keys for batch in task.batches(0)][:FIRST] and len(proved) > 1
    assert setup.text.model.training is False and task.graphs.startswith("both passes of the decoder, proved on")
    assert all(parameter.grad is None for parameter in task.parameters().values())
    facts = TextRunKind().facts(TextRunKind().trained(dataclasses.replace(setup, moved=None), task))
    assert facts["CUDA graphs"] == task.graphs


def test_what_is_wrong_on_real_rows_alone_is_found(
    on_card: None, tiny_llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    """The largest, made-up micro-batch is recorded first, and right; the run's own are other shapes."""
    tape = Tape()
    tape.spoils = 2  # the third recording: the forward pass of the second shape
    _, task, said = tried(tiny_llama_folder, data, tmp_path / "run", tape)
    assert task.replayed is None and tape.recordings > 2
    assert "Not used: hidden states of the CUDA graphs and of the model differ by" in said
    assert task.graphs.startswith("none: hidden states of the CUDA graphs")


class Refusing(Tape):
    """A recorder that cannot record."""

    def record(self, passes: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def test_where_it_cannot_be_recorded_the_run_goes_on_without(
    on_card: None, tiny_llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    setup, task, said = tried(tiny_llama_folder, data, tmp_path / "run", Refusing())
    assert task.replayed is None and "Not used: CUDA graphs cannot be recorded: CUDA error: operation not permitted" in said
    run = RunFolder.create(tmp_path / "trained")
    train(task, setup.config.train, run=run)
    plain = learnt(assembled(tiny_llama_folder, data, tmp_path / "one", NARROW), tmp_path / "plain")
    assert [record["loss"] for record in read_metrics(run.metrics) if "loss" in record] == plain, "to the last bit"
    with pytest.raises(EnvironmentProblem, match="is true, but CUDA graphs cannot be recorded"):
        record_graphs(setup.text, text_task(assembled(tiny_llama_folder, data, tmp_path / "x", RECORDED)), quiet(), Refusing())


def test_where_there_is_no_room_or_no_card_nothing_is_tried(
    on_card: None, tiny_llama_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = assembled(tiny_llama_folder, data, tmp_path / "run", NARROW)
    task = text_task(setup)
    use_graphs(setup, task, quiet(), Refusing())
    assert task.replayed is None and task.graphs == "none: they do not fit beside the run by its plan"
    off = assembled(tiny_llama_folder, data, tmp_path / "run", {**NARROW, "train.cuda_graphs": "false"})
    task = text_task(off)
    use_graphs(off, task, quiet(), Refusing())
    assert task.graphs == "none: train.cuda_graphs is false"
    monkeypatch.setattr(TextAssembly, "device", torch.device("cpu"))
    task.graphs = ""
    use_graphs(off, task, quiet(), Refusing())
    assert not task.graphs and "CUDA graphs" not in TextRunKind().facts(setup)


def test_rows_that_begin_alike_are_computed_without(on_card: None, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Their beginnings, which the model computes once, graphs would compute in every row."""
    asked = [{"role": "user", "content": "w " * 30 + str(n)} for n in range(40)]
    rows = [{"messages": [one, {"role": "assistant", "content": "ok"}]} for one in asked]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    _, task, said = tried(tiny_llama_folder, data, tmp_path / "run", Tape())
    assert task.replayed is None and "Not used: rows begin alike, so that a step computes" in said


def test_a_later_shape_that_cannot_be_recorded_is_said_and_computed(
    on_card: None, tiny_llama_folder: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, task, _ = tried(tiny_llama_folder, data, tmp_path / "run", Tape())
    passes = task.replayed
    assert passes is not None
    passes.graphs.clear()
    passes.recorder = Refusing()
    (batch, *_) = task.batches(0)
    with caplog.at_level("WARNING", "lorakeet"):
        for _ in range(2):
            assert torch.isfinite(task.loss(batch))
    (message,) = caplog.messages
    assert "CUDA graphs cannot be recorded" in message and "computed without CUDA graphs" in message


def test_on_a_card_without_streams_a_run_is_planned_with_graphs_and_goes_on_without(
    tiny_llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    """On the simulated card, from the plan on: nothing is stubbed."""
    changes = {**NARROW, "model.device": "cuda", "evaluate.answers": "0", "evaluate.drift_texts": "0"}
    with simulated_card():
        setup = assembled(tiny_llama_folder, data, tmp_path / "run", changes)
        assert setup.residency.way.graphs and setup.residency.unrestricted
        task, screen = text_task(setup), io.StringIO()
        use_graphs(setup, task, Console(file=screen, width=300))
    assert task.replayed is None and "CUDA graphs of the decoder's passes. Not used: " in screen.getvalue()
    assert task.graphs.startswith("none: CUDA graphs cannot be recorded")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AttributeError("no attribute 'starts'"), "CUDA graphs cannot be recorded: AttributeError: no attribute 'starts'."),
        (ConfigError("a value"), "CUDA graphs cannot be recorded: ConfigError: a value."),
        (torch.OutOfMemoryError("CUDA out of memory"), "the GPU is out of memory: to check CUDA graphs, their pass and"),
    ],
)
def test_whatever_fails_as_graphs_are_tried_ends_no_run(
    error: Exception,
    said: str,
    on_card: None,
    tiny_llama_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody asked for them; who did gets the error itself."""
    freed: list[str] = []
    monkeypatch.setattr(model_graphs, "release_device_memory", lambda: freed.append("device"))

    def failing(_: Tape, passes: Any) -> Any:
        raise error

    monkeypatch.setattr(Tape, "record", failing)
    setup, task, screen = tried(tiny_llama_folder, data, tmp_path / "run", Tape())
    assert task.replayed is None and f"Not used: {said}" in screen and freed == ["device"]
    assert not setup.text.model.training and all(each.grad is None for each in task.parameters().values())
    with pytest.raises(type(error) if not isinstance(error, RuntimeError) else EnvironmentProblem):
        record_graphs(setup.text, text_task(assembled(tiny_llama_folder, data, tmp_path / "x", RECORDED)), quiet(), Tape())


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"num_experts": [4, 4]}, True),  # HunYuan-MoE: for each layer
        ({"num_experts": [1, 1]}, False),
        ({"ffn_config": {"moe_num_experts": 16}}, True),  # DBRX
        ({"ffn_config": SimpleNamespace(moe_num_experts=16, to_dict=dict)}, True),
        ({"num_experts": None}, False),
        ({"n_routed_experts": 8}, True),
    ],
)
def test_numbers_of_experts_are_found_in_lists_and_nested_settings(
    values: dict[str, Any], refused: bool, on_card: None, tiny_llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    setup = assembled(tiny_llama_folder, data, tmp_path / "run", NARROW)
    task = text_task(setup)
    vars(setup.text.model.config.get_text_config()).update(values)
    why = try_graphs(setup.text, task, quiet(), Tape())
    assert ("the model chooses experts by values" in why) == refused == (task.replayed is None)
