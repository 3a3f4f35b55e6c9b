"""Preference runs on quantised bases, in two processes, on a chain of adapters through every verb, and within a budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from laws.test_preference_runs import preferences, rated
from laws.test_together import NEAR, arguments, worst
from lorakeet.cli.main import main
from lorakeet.config import RunConfig
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.formats.detect import read_adapter
from lorakeet.memory.spec import MemorySpec
from lorakeet.models.inject import activate, attach
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import config_of
from lorakeet.models.text.load import load_text_model
from lorakeet.planning.rehearse_text import STEP
from lorakeet.planning.text_run import TextRun, Workload
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import Way
from lorakeet.train.log import read_metrics
from lorakeet.train.spec import TrainSpec
from tiny.gguf_file import write_tiny_gguf
from tiny.gptq_folder import save_mixed_gptq
from tiny.runs import run, write_rows
from tiny.together import Together

UNMEASURED = {"evaluate.answers": 0, "evaluate.drift_texts": 0, "evaluate.baselines": False}
PROGRAM = 500_000_000  # bytes of a process with the libraries of a run, before its model


def quantised(kind: str, folder: Path, tiny_llama_folder: Path) -> tuple[Path, dict[str, Any]]:
    if kind == "gptq":
        save_mixed_gptq(folder, "gptq")
        return folder, {}
    if kind == "gguf":
        file = folder.with_suffix(".gguf")
        write_tiny_gguf(file, "Q8_0", hidden_size=128, intermediate_size=128)
        return file, {}
    return tiny_llama_folder, {"model.quantize": "nf4"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "gptq", "gguf"])
def test_every_kind_of_base_ends_in_proof(kind: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    model, changes = quantised(kind, tmp_path / "model", tiny_llama_folder)
    data = write_rows(tmp_path / "rows.jsonl", preferences(40))
    given = {"train.objective": "dpo", "train.steps": 2, "train.learning_rate": 1e-3, **UNMEASURED, **changes}
    report = run(model, data, tmp_path / "run", given).report
    assert report is not None and report.certificate is not None and report.certificate.passed
    first = next(record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in record)
    assert first["held_out_loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_processes_train_on_preferences_what_one_trains(
    objective: str, forked: Together, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """The reference is computed by both, and kto's estimate of the KL is over the rows of both."""
    rows = write_rows(tmp_path / "rows.jsonl", rated(40) if objective == "kto" else preferences(40))
    changes = {"train__objective": objective, "train__steps": "2", "train__evaluate_every": "2"}
    changes |= {name: str(value) for name, value in UNMEASURED.items()}
    for name, count in (("one", 1), ("two", 2)):
        ended = forked.run(arguments(tiny_llama_folder, rows, tmp_path / name, **changes), count=count)
        assert [process.code for process in ended] == [0] * count, ended[0].said
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    losses = [[record["loss"] for record in some if "loss" in record] for some in records]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=NEAR)
    assert worst(tmp_path / "one", tmp_path / "two") < 20 * NEAR
    assert read_certificate(tmp_path / "two" / "certificate.json").passed


@pytest.mark.slow
def test_a_chain_is_one_adapter_for_every_verb(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Merged, converted to another format and put on a model anew, it computes what was evaluated."""
    data = write_rows(tmp_path / "rows.jsonl", preferences(40))
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences(40, seed=3)]
    quick = {"train.steps": 3, **UNMEASURED}
    run(tiny_llama_folder, write_rows(tmp_path / "answers.jsonl", answers), tmp_path / "sft", quick)
    run(tiny_llama_folder, data, tmp_path / "dpo", {**quick, "train.objective": "dpo", "lora.on_top_of": tmp_path / "sft"})
    chain = read_adapter(tmp_path / "dpo")
    assert {pair.rank for pair in chain.pairs.values()} == {8}

    def logits(folder: Path, adapter: Any = None) -> torch.Tensor:
        text = load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu", attention="sdpa"))
        if adapter is not None:
            attach(text.model, adapter, "it")
            activate(text.model, "it")
        with torch.no_grad():
            return text.model(input_ids=torch.arange(5, 25)[None]).logits

    wanted = logits(tiny_llama_folder, chain)
    assert not torch.equal(wanted, logits(tiny_llama_folder, read_adapter(tmp_path / "sft")))
    assert main(["merge", str(tmp_path / "dpo"), "--out", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, rtol=1e-4, atol=1e-4)
    assert main(["convert", str(tmp_path / "dpo"), str(tmp_path / "mlx"), "--to", "mlx"]) == 0
    torch.testing.assert_close(logits(tiny_llama_folder, read_adapter(tmp_path / "mlx")), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_budget_below_the_least_is_one_message(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(40))
    with pytest.raises(ConfigError, match="memory budget is 64MiB, but this run takes at least"):
        run(tiny_llama_folder, data, tmp_path / "run", {"train.objective": "dpo", "memory.budget": "64MiB"})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_block_of_a_streamed_7b_adds_no_more_than_its_pairs() -> None:
    """In the true shape of Llama-2-7B in NF4: with more blocks a step of DPO holds more pairs, and nothing else.

    Pairs, those of the reference, gradients and two moments are 20 bytes a number; beside the program, 32 blocks fit into 2 GiB.
    """
    steps = []
    for layers in (3, 4):
        config = RunConfig(
            model=ModelSpec(path="meta-llama/Llama-2-7b-hf", dtype="bfloat16", device="cpu", quantize=QuantSpec(method="nf4")),
            data=DataSpec(train="pairs", max_tokens=1024),
            memory=MemorySpec(budget="2GiB"),
            train=TrainSpec(objective="dpo", steps=1, batch_size=1, micro_tokens=2048),
        )
        shape = config_of(config.model, say=lambda _: None)
        shape.num_hidden_layers = layers
        planned = TextRun(config, Workload(labelled=False), lambda _: None, (shape, None)).plan(
            Way(streamed=True, slots=2, together=1, spilled=True)
        )
        step = planned.forecast.phase(STEP)
        steps.append((step.bytes - step.kinds["runtime"], planned.plan.parameters))
    (few, some), (more, all_) = steps
    assert 0 < more - few <= 20 * (all_ - some) + 1024
    assert more + 28 * (more - few) < (2 << 30) - PROGRAM
