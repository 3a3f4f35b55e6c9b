"""`kinds.text.evaluate`: what is measured, equal to a plain computation with transformers' own model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.data.chat import Encoder
from lorakeet.data.rows import Row, Turn
from lorakeet.errors import DataError
from lorakeet.kinds.text.evaluate import LIKELIEST_LABEL, NO_FEW_SHOT, TextEvaluator
from lorakeet.models.generate.sample import sampled_texts
from lorakeet.models.inject import activate
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import TextModel
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.runs.residency import Residency
from lorakeet.train.progress import counted
from tiny.runs import chats, quiet, run, write_rows


@pytest.fixture(scope="module")
def text(finished: Any) -> TextModel:
    return open_adapter(finished.path).text_model(quiet(), dtype="float32")


def judge_of(finished: Any, text: TextModel, rows: Any, **data: Any) -> TextEvaluator:
    setup = finished.result.setup
    config = replace(setup.config, data=replace(setup.config.data, **data))
    return TextEvaluator(config, text, Encoder(text.tokenizer, config.data, setup.dataset.labels), rows, quiet(), NAME)


def by_hand(text: TextModel, evaluator: TextEvaluator, name: str | None) -> np.ndarray:
    """log p(label | prompt) of each row, end of turn included, one forward a label: (rows, labels), normalised."""
    activate(text.model, name)
    before = text.attention
    set_attention(text.model, "sdpa")
    found = []
    for row in evaluator.rows:
        candidates = evaluator.encoder.candidates(row)
        assert candidates is not None
        scores = []
        for completion in candidates.completions:
            ids = torch.from_numpy(np.concatenate([candidates.prompt, completion]))
            with torch.no_grad():
                log_probs = text.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            places = range(len(candidates.prompt), len(ids) - 1)  # without the end of turn that all labels share
            scores.append(sum(float(log_probs[place - 1, ids[place]]) for place in places))
        found.append(torch.tensor(scores).log_softmax(0).numpy())
    set_attention(text.model, before)
    return np.stack(found)


def test_accuracy_and_log_loss_are_those_of_a_plain_computation(finished: Any, text: TextModel) -> None:
    evaluator = judge_of(finished, text, finished.result.setup.dataset.test)
    report = evaluator.report("t", baseline_rows=finished.result.setup.dataset.train)
    labels = evaluator.encoder.labels
    truth = np.array([labels.index(row.label or "") for row in evaluator.rows])
    for system, name in (("base", None), ("adapter", NAME)):
        log_probs = by_hand(text, evaluator, name)
        metrics = next(found for found in report.systems if found.role == system).metrics
        assert metrics["accuracy"].value == pytest.approx(np.mean(log_probs.argmax(1) == truth))
        assert metrics["log_loss"].value == pytest.approx(-np.mean(log_probs[np.arange(len(truth)), truth]), rel=1e-4)
    shown = {row.source: row for row in report.rows}
    likeliest = by_hand(text, evaluator, NAME).argmax(1)
    assert {source: row.adapter.text for source, row in shown.items()} == {
        row.source: labels[best] for row, best in zip(evaluator.rows, likeliest, strict=True)
    }


def test_the_floors_learn_from_the_rows_that_are_named(finished: Any, text: TextModel) -> None:
    dataset = finished.result.setup.dataset
    evaluator = judge_of(finished, text, dataset.test)
    with_floors = evaluator.report("t", baseline_rows=dataset.train[:30])
    assert next(system.note for system in with_floors.systems if system.role == "floor").startswith("fitted to 30 rows; words (")
    assert NO_FEW_SHOT in with_floors.warnings, "no row of 60 tokens fits beside another into 120"
    bare = evaluator.report("t", baseline_rows=())
    assert [system.role for system in bare.systems] == ["adapter", "base"] and NO_FEW_SHOT not in bare.warnings
    without = replace(evaluator, config=replace(evaluator.config, evaluate=replace(evaluator.config.evaluate, baselines=False)))
    assert [system.role for system in without.report("t", baseline_rows=dataset.train).systems] == ["adapter", "base"]


@pytest.mark.slow
def test_examples_pass_through_the_base_once_a_batch(finished: Any, text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The few-shot base computes about the tokens of the rows alone, though each row stands behind all examples."""
    named = [("ab"[number % 2], f"Number {number} is it") for number in range(60)]
    some = [Row((Turn("user", said, False), Turn("assistant", label, True)), label, None, said) for label, said in named]
    before = finished.result.setup.config
    shown = replace(before.evaluate, examples=8)
    config = replace(before, data=replace(before.data, max_tokens=60), evaluate=shown)
    encoder = Encoder(text.tokenizer, config.data, ("a", "b"))
    evaluator = TextEvaluator(config, text, encoder, some[:40], quiet(), NAME)
    decoder, computed = text.model.get_decoder(), []
    forward = decoder.forward

    def counting(*args: Any, **settings: Any) -> Any:
        computed.append(settings["input_ids"].numel())
        return forward(*args, **settings)

    monkeypatch.setattr(decoder, "forward", counting)
    labels: list[str] = []

    def named_as(console: Any, what: str, total: int) -> Any:
        labels.append(what)
        return counted(console, what, total)

    monkeypatch.setattr("lorakeet.kinds.text.evaluate.counted", named_as)
    few = evaluator._few_shot(some[:40], some[40:])
    assert set(labels) == {"few-shot base answers rows"}
    assert few is not None and "up to 7 training rows" in few.note, "all that fit into the context of 256"
    alone = sum(encoder.tokens_of(row) for row in some[:40])
    examples = 7 * encoder.tokens_of(some[0])
    assert sum(computed) <= 1.5 * (alone + len(computed) * examples) < 0.5 * 40 * examples
    labels.clear()
    evaluator._few_shot(some[:2], some[2:])
    [said] = set(labels)
    assert re.fullmatch(r"few-shot base answers rows, \d\d of them training rows that calibrate it", said)


def test_how_the_base_answers_labelled_rows_is_said(finished: Any, text: TextModel) -> None:
    report = judge_of(finished, text, finished.result.setup.dataset.test).report("t", baseline_rows=())
    assert next(system.note for system in report.systems if system.role == "base") == LIKELIEST_LABEL


@pytest.mark.slow
def test_few_shot_rows_pass_in_wider_batches_where_memory_allows_it(
    finished: Any, text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples are computed for four times as many rows at once: fewer tokens, the same answers."""
    named = [("ab"[number % 2], f"Number {number} is it") for number in range(60)]
    some = [Row((Turn("user", said, False), Turn("assistant", label, True)), label, None, said) for label, said in named]
    before = finished.result.setup.config
    config = replace(before, data=replace(before.data, max_tokens=60), train=replace(before.train, micro_tokens=64))
    config = replace(config, evaluate=replace(before.evaluate, examples=8))
    evaluator = TextEvaluator(config, text, Encoder(text.tokenizer, config.data, ("a", "b")), some[:30], quiet(), NAME)
    decoder, computed = text.model.get_decoder(), list[int]()
    forward = decoder.forward

    def counting(*args: Any, **settings: Any) -> Any:
        computed.append(settings["input_ids"].numel())
        return forward(*args, **settings)

    monkeypatch.setattr(decoder, "forward", counting)
    usual = evaluator._few_shot(some[:30], some[30:])
    narrow = sum(computed)
    computed.clear()
    wide = replace(evaluator, residency=Residency())._few_shot(some[:30], some[30:])
    assert usual is not None and wide is not None and "fitted to 23 others" in wide.note
    np.testing.assert_allclose(wide.log_probs, usual.log_probs, atol=1e-4)
    assert sum(computed) < 0.7 * narrow


def test_labels_of_several_tokens_have_few_examples(finished: Any, text: TextModel) -> None:
    """A row stands in a batch once for each of its labels, which leaves less space."""
    dataset = finished.result.setup.dataset
    evaluator = judge_of(finished, text, dataset.test)
    assert evaluator._few_shot_limits(dataset.test).encoder is evaluator.encoder


def test_rows_that_do_not_fit_are_left_out_of_every_system(finished: Any, text: TextModel) -> None:
    rows = finished.result.setup.dataset.test
    lengths = sorted(len(example.ids) for example in finished.result.setup.test.examples)
    evaluator = judge_of(finished, text, rows, max_tokens=lengths[6], too_long="drop")
    report = evaluator.report("t", baseline_rows=finished.result.setup.dataset.train)
    assert 0 < report.rows_of < len(rows)
    assert {system.metrics["accuracy"].n for system in report.systems} == {report.rows_of}
    with pytest.raises(DataError, match="no rows to evaluate on"):
        judge_of(finished, text, rows, max_tokens=8, too_long="drop").report("t", baseline_rows=())


@pytest.mark.slow
def test_loss_of_rows_without_labels_is_that_of_transformers(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "chats.jsonl", chats(30))
    result = run(tiny_llama_folder, data, tmp_path / "run", {"train.steps": 2})
    assert result.report is not None
    text = result.setup.text
    set_attention(text.model, "sdpa")
    for system in result.report.systems[:2]:
        activate(text.model, None if system.role == "base" else "default")
        sums, count = 0.0, 0
        for example in result.setup.held_out.examples:
            labels = torch.from_numpy(np.where(example.supervised, example.ids, -100))[None]
            with torch.no_grad():
                loss = text.model(input_ids=torch.from_numpy(example.ids)[None], labels=labels).loss
            sums, count = sums + float(loss) * int(example.supervised.sum()), count + int(example.supervised.sum())
        assert system.metrics["loss"].value == pytest.approx(sums / count, rel=1e-5)


def test_drift_texts_are_the_same_whatever_adapter_is_on(finished: Any, text: TextModel) -> None:
    activate(text.model, NAME)
    one = sampled_texts(text, 5, 12, seed=3)
    activate(text.model, None)
    other, third = sampled_texts(text, 5, 12, seed=3), sampled_texts(text, 5, 12, seed=4)
    assert [example.ids.tolist() for example in one] == [example.ids.tolist() for example in other]
    assert [example.ids.tolist() for example in one] != [example.ids.tolist() for example in third]
    assert all(not example.supervised[0] and example.supervised[1:].all() for example in one)
    assert {int(example.ids[0]) for example in one} == {text.tokenizer.bos_token_id}


def test_an_adapter_that_does_nothing_has_not_drifted(finished: Any) -> None:
    opened = open_adapter(finished.path)
    for pair in opened.adapter.pairs.values():
        pair.B.zero_()
    text = opened.text_model(quiet(), dtype="float32")
    drift = judge_of(finished, text, finished.result.setup.dataset.test).drift()
    assert drift is not None and drift.mean_kl.value < 1e-12 and "seed 0" in drift.detail
