"""Rows are encoded before their model is loaded, and plans are made for their lengths."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorakeet.data.chat import Encoder
from lorakeet.data.read import read_rows
from lorakeet.errors import DataError
from lorakeet.kinds.text.assemble import assemble_text
from lorakeet.kinds.text.plan import TextPlanResult
from lorakeet.memory.remembered import remembering
from lorakeet.models.text.load import load_tokenizer, read_config
from lorakeet.planning import encoded_rows
from lorakeet.planning.encoded_rows import EncodedRows, within_context, workload_of_files
from lorakeet.planning.forecast_text_run import RowLengths, Workload, largest_rows
from lorakeet.planning.rehearse_text import RowShape
from lorakeet.planning.text_run import TextRun
from lorakeet.runs.residency import RESIDENT
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.plan import plan
from tiny.memory_plans import same_runtime
from tiny.models import save_tiny_llama
from tiny.runs import chats, quiet, reviews, settings, write_rows

WIDE = {"hidden_size": 256, "intermediate_size": 1024}
LONG = {"data.max_tokens": "1024", "train.batch_size": "8", "train.steps": "2", "evaluate.examples": "0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("wide") / "model", **WIDE)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", chats(60))


@pytest.mark.slow
def test_short_rows_are_planned_as_they_are(model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_runtime(monkeypatch, 1 << 28)
    config = settings(model, rows, tmp_path / "run", LONG)
    setup = assemble_text(config, quiet())
    lengths = sorted((len(example.ids) for example in setup.train.examples), reverse=True)
    assert setup.residency.plan is not None and setup.residency.plan.rows.tokens <= sum(lengths[:8]) + 8 < 1024
    unknown = TextRun(config, Workload(False, 1000), print).plan(RESIDENT)
    found = setup.residency.plan
    assert found.training_peak < unknown.training_peak - (50 << 20), "the step of 2,048 tokens is not met"


def test_lengths_are_those_of_the_longest_rows_and_of_the_longest_step(finished: Any, tmp_path: Path) -> None:
    config = settings(finished.model, tmp_path / "rows.jsonl", tmp_path / "run", {"train.batch_size": "3"})
    records = [{"prompt": "a", "completion": word} for word in ("b", "b b b b b b b b b b", "b b b", "b b")]
    data = write_rows(tmp_path / "rows.jsonl", records)
    workload = workload_of_files(config, read_config(finished.model), print)
    assert workload.lengths is not None and not workload.labelled
    found = workload.lengths()
    encoder = Encoder(load_tokenizer(finished.model), config.data)
    tokens = sorted((encoder.tokens_of(row) for row in read_rows(str(data), config.data)), reverse=True)
    assert found == RowLengths(tokens[0], sum(tokens[:3]), 4, sum(tokens))
    assert largest_rows(config, found).tokens >= found.step
    assert largest_rows(config.changed(data={"max_tokens": 4}), found) == RowShape(4, 3), "a change that shortens rows counts"


def test_rows_of_two_shapes_are_planned_as_the_objective_reads_them(finished: Any, tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b b", "rejected": "b b b"}
    data = write_rows(tmp_path / "rows.jsonl", [{**pair, "completion": "b"}] * 4)
    for objective, rows in (("sft", 4), ("dpo", 8)):
        config = settings(finished.model, data, tmp_path / "run", {"train.objective": objective})
        workload = workload_of_files(config, read_config(finished.model), print)
        assert workload.lengths is not None and workload.lengths().rows == rows


def test_verdicts_of_one_kind_are_planned_where_they_are_not_trained(finished: Any, tmp_path: Path) -> None:
    rated = [{"prompt": "a", "completion": "b", "label": str(n % 2)} for n in range(4)]
    data, other = write_rows(tmp_path / "rows.jsonl", rated), write_rows(tmp_path / "other.jsonl", rated[1::2])
    given = {"train.objective": "kto", "data.held_out": str(other)}
    workload = workload_of_files(settings(finished.model, data, tmp_path / "run", given), read_config(finished.model), print)
    assert workload.lengths is not None and workload.lengths().rows == 8


def test_a_label_that_is_longer_than_the_rows_own_counts(finished: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*reviews(9), {"text": "a", "label": "this is a label of very many words"}])
    config = settings(finished.model, data, tmp_path / "run")
    found = workload_of_files(config, read_config(finished.model), print)
    assert found.labelled and found.lengths is not None
    rows = EncodedRows(config, [[]], ("good", "this is a label of very many words"), print)
    longest = max(len(one) for row in reviews(1) for one in [rows.encoder.tokenizer.encode(row["text"])])
    assert found.lengths().longest > longest + len(rows.tokenizer.encode("this is a label of very many words"))
    assert found.lengths().longest <= config.data.max_tokens


def test_without_rows_or_their_tokenizer_each_row_has_the_most_tokens(finished: Any, rows: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = settings(finished.model, rows, tmp_path / "run")
    assert workload_of_files(config.changed(data={"train": ""}), None, said.append) == Workload() and not said
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((finished.model / "config.json").read_bytes())
    assert workload_of_files(config.changed(model={"path": str(bare)}), None, said.append) == Workload()
    assert said == [
        f"The tokenizer of {bare} is not on this machine, so the rows of {rows} are not counted: each is planned with "
        "data.max_tokens, 120."
    ]
    assert largest_rows(config).length == 120
    said.clear()
    gone = config.changed(data={"train": "./gone.jsonl"})
    assert workload_of_files(gone, read_config(finished.model), said.append) == Workload()
    assert said == [
        "./gone.jsonl is not on this machine, so the run's rows are not counted: each is planned with data.max_tokens, 120."
    ]


def test_rows_that_cannot_be_encoded_are_refused_before_the_model_is_loaded(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr("lorakeet.kinds.text.assemble.load_text_model", lambda *_, **__: loaded.append(1))
    data = write_rows(tmp_path / "rows.jsonl", [*reviews(30), {"text": "far " * 200, "label": "good"}])
    with pytest.raises(DataError, match=r"data\.max_tokens is 120"):
        assemble_text(settings(finished.model, data, tmp_path / "run", {"data.too_long": "refuse"}), quiet())
    assert not loaded


def test_a_model_with_a_shorter_context_lowers_the_limit_with_a_word(finished: Any, rows: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    config = settings(finished.model, rows, tmp_path / "run")
    shorter = within_context(config, "small", 64, Console(file=said, width=200).print)
    assert shorter.data.max_tokens == 64
    assert said.getvalue() == "data.max_tokens is 120, but small takes rows of at most 64 tokens; 64 is used.\n"
    assert within_context(config, "small", 120, print) is config and within_context(config, "small", None, print) is config


def test_lengths_of_an_archive_that_was_replaced_are_counted_anew(finished: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"

    def written(rows: int) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("rows.jsonl", "".join(json.dumps(row) + "\n" for row in reviews(rows)))

    def counted() -> int:
        config = settings(finished.model, path, tmp_path / "run").changed(data={"train": f"{path}!rows.jsonl"})
        found = workload_of_files(config, read_config(finished.model), print)
        assert found.lengths is not None
        return found.lengths().rows

    values: dict[str, Any] = {}
    with remembering(values, lambda key, value: None):
        written(20)
        assert counted() == counted() == 18 and len(values) == 1
        written(30)
        assert counted() == 27


@pytest.mark.slow
def test_a_plan_counts_the_steps_of_its_run(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = [*reviews(60), *({"text": f"{word} " * 200, "label": "good"} for word in ("far", "near", "wide"))]
    data = write_rows(tmp_path / "rows.jsonl", [*once, *({**row, "text": f"{row['text']}!"} for row in once[::2])])
    given = {"train.epochs": "2", "data.too_long": "drop", "data.held_out_fraction": "0.3"}
    config = settings(finished.model, data, tmp_path / "run", given).changed(train={"steps": None})

    def planned() -> TextPlanResult:
        found = plan(config, console=quiet())
        assert isinstance(found, TextPlanResult) and found.lengths is not None
        return found

    found = planned()
    assert found.lengths is not None and found.lengths.exact and found.lengths.rows < 0.7 * 95
    finetune(config, console=quiet())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found.steps == max(record["step"] for record in records)
    monkeypatch.setattr(encoded_rows, "MOST_COMPARED", 50)
    longer = planned().lengths
    assert longer is not None and not longer.exact and longer.rows > found.lengths.rows, "not searched for copies, which is said"
