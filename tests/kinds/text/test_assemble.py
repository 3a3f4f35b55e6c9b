"""`kinds.text.assemble`: rows, model, plan and ids of a run, checked before anything is written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import transformers
from rich.console import Console

from lorakeet.errors import ConfigError, DataError
from lorakeet.kinds.text.assemble import assemble_text
from lorakeet.train.text.multi_adapter import why_not_together
from tiny.models import save_tiny_llama
from tiny.runs import chats, quiet, reviews, settings, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(30))


def test_the_evaluated_rows_are_the_test_rows_or_else_the_held_out_ones(finished: Any, rows: Path, tmp_path: Path) -> None:
    setup = finished.result.setup
    assert setup.evaluated == ("test", setup.dataset.test) and len(setup.test.examples) == 13
    other = assemble_text(settings(finished.model, rows, tmp_path), quiet())
    assert other.evaluated == ("held-out", other.dataset.held_out) and other.test.examples == ()
    assert other.tokens_per_epoch == sum(len(example.ids) for example in other.train.examples)
    assert other.steps == 6


def test_steps_follow_from_epochs(finished: Any, rows: Path, tmp_path: Path) -> None:
    setup = assemble_text(settings(finished.model, rows, tmp_path, {"train.steps": "none", "train.epochs": 1.5}), quiet())
    assert len(setup.train.examples) == 27 and setup.steps == 6  # 4 steps a pass of 27 rows in eights


def test_dropped_rows_do_not_count_among_the_steps(finished: Any, tmp_path: Path) -> None:
    """The loop counts the rows that are trained on; ranks.choose prune, tune and the trial of rates count with this number."""
    records = [{**record, "text": record["text"] + " and again" * 40 * (number % 2)} for number, record in enumerate(reviews(60))]
    changes = {"train.steps": "none", "train.epochs": 1, "data.too_long": "drop"}
    path = write_rows(tmp_path / "long.jsonl", records)
    setup = assemble_text(settings(finished.model, path, tmp_path / "run", changes), quiet())
    trained, batch = len(setup.train.examples), setup.config.train.batch_size
    assert trained < len(setup.dataset.train) - batch, "whole batches are dropped"
    assert setup.steps == setup.trained_rows // batch + bool(trained % batch) and setup.trained_rows == trained


def test_rows_are_no_longer_than_the_model_can_take(rows: Path, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "short", max_position_embeddings=32)
    said = io.StringIO()
    setup = assemble_text(settings(model, rows, tmp_path / "run", {"data.max_tokens": 1024}), Console(file=said))
    assert f"data.max_tokens is 1024, but {model} takes rows of at most 32 tokens; 32 is used." in said.getvalue()
    assert setup.config.data.max_tokens == setup.encoder.spec.max_tokens == 32
    assert max(len(example.ids) for example in setup.train.examples) == 32
    assert setup.train.truncated == len(setup.train.examples)


def test_a_shorter_limit_is_kept_without_a_word(finished: Any, rows: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    setup = assemble_text(settings(finished.model, rows, tmp_path), Console(file=said))
    assert setup.config.data.max_tokens == 120 and said.getvalue() == ""


def test_without_held_out_rows_there_is_no_proof(finished: Any, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No rows are held out.*data.held_out_fraction"):
        assemble_text(settings(finished.model, rows, tmp_path, {"data.held_out_fraction": 0}), quiet())


def test_test_rows_are_checked_before_training(finished: Any, rows: Path, tmp_path: Path) -> None:
    bare = write_rows(tmp_path / "bare.jsonl", [{"text": "no label here"}])
    with pytest.raises(DataError, match=r"1 test rows \(bare.jsonl:1\) have no label"):
        assemble_text(settings(finished.model, rows, tmp_path, {"data.test": bare}), quiet())
    long = write_rows(tmp_path / "long.jsonl", [{"text": "word " * 200, "label": "good"}])
    with pytest.raises(DataError, match=r"long.jsonl:1: the row has \d+ tokens"):
        assemble_text(settings(finished.model, rows, tmp_path, {"data.test": long, "data.too_long": "refuse"}), quiet())
    setup = assemble_text(settings(finished.model, rows, tmp_path, {"data.test": long}), quiet())
    assert setup.encoded["test"].truncated == 1


def test_a_template_that_changes_the_prompt_with_the_answer_is_refused(rows: Path, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ messages[1]['content']|length }}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    with pytest.raises(DataError):
        assemble_text(settings(model, rows, tmp_path), quiet())


def test_a_wanted_template_that_is_missing_is_said(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    data = write_rows(tmp_path / "chats.jsonl", chats(30))
    with pytest.raises(ConfigError, match="chat template"):
        assemble_text(settings(model, data, tmp_path / "run", {"data.chat_template": "on"}), quiet())


def test_new_tokens_are_known_before_rows_are_encoded(finished: Any, tmp_path: Path) -> None:
    records = [{"text": f"{record['text']} <leaf>", "label": record["label"]} for record in reviews(30)]
    data = write_rows(tmp_path / "rows.jsonl", records)
    setup = assemble_text(settings(finished.model, data, tmp_path, {"lora.new_tokens": "<leaf>"}), quiet())
    assert setup.new_token_ids == (320,) and all(320 in example.ids for example in setup.train.examples)


@pytest.mark.slow
def test_float16_is_refused_where_rows_are_measured_alone(finished: Any, rows: Path, tmp_path: Path) -> None:
    narrow = {"model.dtype": "float16", "model.products": "float32"}
    with pytest.raises(ConfigError, match=r"float16, and lora.start gradient measures rows without the loss scale.* kaiming"):
        assemble_text(settings(finished.model, rows, tmp_path, {**narrow, "lora.start": "gradient"}), quiet())
    setup = assemble_text(settings(finished.model, rows, tmp_path, narrow), quiet())
    assert why_not_together(setup.text, setup.plan) == ""
