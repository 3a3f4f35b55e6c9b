"""`models.text.compare`: two functions on the same batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.data.pack import micro_batches
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.memory.stream import RecordStream
from lorakeet.models.inject import activate
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text import compare as compare_models
from lorakeet.models.text.compare import compare_outputs, first_tokens
from lorakeet.models.text.load import load_text_model, set_attention
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.runs.residency import Residency, Way
from tiny.runs import quiet

SPEC = EvaluateSpec(resamples=100)


def test_a_model_equals_itself_and_differs_from_its_base_as_computed_by_hand(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_models, "CHUNK", 3)  # several chunks a batch
    text = open_adapter(finished.path).text_model(quiet(), dtype="float32")
    rows = finished.result.setup.held_out.examples
    batches = micro_batches(rows, 100)
    assert len(batches) > 1
    same = compare_outputs((text, NAME), (text, NAME), batches, spec=SPEC)
    assert same.max_logit_difference == 0 and same.mean_kl.value == 0 and same.texts == len(rows)
    found = compare_outputs((text, None), (text, NAME), batches, spec=SPEC)
    set_attention(text.model, "sdpa")
    kl, largest, loss = [], 0.0, []
    for row in rows:
        sides = []
        for name in (None, NAME):
            activate(text.model, name)
            with torch.no_grad():
                sides.append(text.model(input_ids=torch.from_numpy(row.ids)[None]).logits[0].double())
        for place in row.supervised.nonzero()[0]:
            base, adapter = (side[place - 1] for side in sides)
            p, q = base.log_softmax(-1), adapter.log_softmax(-1)
            kl.append(float((p.exp() * (p - q)).sum()))
            loss.append(float(p[row.ids[place]] - q[row.ids[place]]))
            largest = max(largest, float((base - adapter).abs().max()))
    assert found.tokens == len(kl)
    assert found.mean_kl.value == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.max_logit_difference == pytest.approx(largest, rel=1e-4)
    assert found.loss_difference is not None
    assert found.loss_difference.value == pytest.approx(sum(loss) / len(loss), rel=1e-4)


def test_two_models_are_compared_each_with_its_own_head(finished: Any) -> None:
    text = open_adapter(finished.path).text_model(quiet(), dtype="float32")
    base = load_text_model(ModelSpec(str(finished.model), dtype="float32"))
    batches = micro_batches(finished.result.setup.held_out.examples, 2048)
    assert compare_outputs((text, None), (base, None), batches, spec=SPEC).max_logit_difference < 1e-5
    with torch.no_grad():
        base.model.model.norm.weight.mul_(2)
    assert compare_outputs((text, None), (base, None), batches, spec=SPEC).max_logit_difference > 0.1


def test_rows_up_to_a_number_of_tokens(finished: Any) -> None:
    rows = finished.result.setup.held_out.examples
    assert first_tokens(rows, 1) == [rows[0]]
    assert first_tokens(rows, len(rows[0].ids) + len(rows[1].ids)) == list(rows[:2])
    assert first_tokens(rows, 10**6) == list(rows)


def test_two_streamed_models_run_one_after_the_other_and_give_the_same_numbers(finished: Any, tmp_path: Path) -> None:
    opened = open_adapter(finished.path)
    batches = micro_batches(finished.result.setup.held_out.examples, 100)
    spec = ModelSpec(str(finished.model), dtype="float32")
    apart = replace(opened, residency=Residency(way=Way(streamed=True), folder=tmp_path / "live"))
    left, right = apart.text_model(quiet(), dtype="float32"), load_text_model(spec, store=tmp_path / "base")
    assert left.streamed is not None and right.streamed is not None and left.store is not right.store
    left.release()
    right.release()
    both: list[bool] = []
    for text, other in ((left, right), (right, left)):
        text.streamed.stream.fetch = watched(text.streamed.stream, other.streamed.stream, both)  # type: ignore[union-attr]
    found = compare_outputs((left, NAME), (right, None), batches, spec=SPEC)
    assert both and not any(both), "blocks of one of them at a time"
    sides = (opened.text_model(quiet(), dtype="float32"), NAME), (load_text_model(spec), None)
    whole = compare_outputs(*sides, batches, spec=SPEC)
    assert found == whole and found.max_logit_difference > 0
    assert left.streamed.stream._slots == right.streamed.stream._slots == []


def watched(stream: RecordStream, other: RecordStream, both: list[bool]) -> Any:
    fetch = stream.fetch

    def brought(index: int, then: int) -> Any:
        both.append(bool(other._slots))
        return fetch(index, then)

    return brought
