"""Held-out prompts answered by every system: what is written, which rows, when it stops, and what the report shows."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lorakeet.data.chat import Encoder
from lorakeet.data.read import read_rows
from lorakeet.evaluate.report.report import render_html
from lorakeet.evaluate.spec import LEAST_ANSWERS, EvaluateSpec
from lorakeet.kinds.text import reply
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.kind import KIND
from lorakeet.kinds.text.reply import ADAPTER, Replier
from lorakeet.models.generate.sample import sample
from lorakeet.models.inject import activate
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import TextModel
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.runs.residency import Residency
from lorakeet.verbs.evaluate import evaluate
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.options import EvaluateOptions
from tiny.runs import chats, quiet, settings, write_rows
from tiny.tools import WRITES_TOOLS


def questions(count: int) -> list[dict[str, Any]]:
    plants = ("alder", "birch", "cedar", "daisy", "elder", "fern", "grass", "holly")
    return [{"prompt": f"Number {number} of {plants[number % 8]}", "completion": plants[number % 8]} for number in range(count)]


@pytest.fixture(scope="module")
def ran(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on prompts with one word as the answer; answered prompts are compared by a match."""
    folder = tmp_path_factory.mktemp("questions")
    data = write_rows(folder / "rows.jsonl", questions(64))
    changes = {"evaluate.answers": "6", "data.held_out_fraction": "0.3", "data.held_out_minimum": "0"}
    finetune(settings(tiny_llama_folder, data, folder / "run", changes), console=quiet())
    return folder / "run"


@pytest.fixture(scope="module")
def text(ran: Path) -> TextModel:
    return open_adapter(ran).text_model(quiet(), dtype="float32")


def replier(ran: Path, text: TextModel, **evaluate: Any) -> tuple[Replier, Any]:
    opened = open_adapter(ran)
    config = replace(opened.config, evaluate=replace(opened.config.evaluate, **evaluate))
    return Replier(config, text, Encoder(text.tokenizer, config.data), quiet(), NAME), opened.dataset


def greedy(text: TextModel, prompt: Any, name: str | None, limit: int) -> list[int]:
    """The likeliest next token, `limit` times, by the plain model without a cache."""
    activate(text.model, name)
    before = text.attention
    set_attention(text.model, "sdpa")
    ids, start = [int(token) for token in prompt], len(prompt)
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(text.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == text.tokenizer.eos_token_id:
            break
    set_attention(text.model, before)
    return ids[start:]


def test_replies_are_the_models_own_greedy_ones(ran: Path, text: TextModel) -> None:
    writer, dataset = replier(ran, text)
    prompts = writer.prompts(dataset.held_out, dataset.train)
    assert prompts is not None and len(prompts.rows) == 6 and len(set(prompts.indices)) == 6
    for system, name in ((reply.ADAPTER, NAME), (reply.BASE, None)):
        found = writer.write(system, prompts)
        for row, said in zip(prompts.rows, found.texts, strict=True):
            question = writer.encoder.question(row)
            assert question is not None
            expected = text.tokenizer.decode(greedy(text, question[0], name, prompts.limit), skip_special_tokens=True).strip()
            assert said == (expected.split("\n", 1)[0].rstrip() if prompts.ending == "\n" else expected)


def test_every_system_answers_the_same_prompts(ran: Path, text: TextModel) -> None:
    writer, dataset = replier(ran, text)
    found = writer.answered(dataset.held_out, dataset.train)
    assert found is not None and found.metric == "normalised_match"
    assert [each.system for each in found.rivals][:2] == ["base", "few-shot base"]
    assert {each.system for each in found.copies} == {"nearest training answer", "constant answer"}
    references = tuple(dataset.held_out[index].turns[-1].text for index in found.rows)
    assert all(each.references == references for each in (found.adapter, *found.rivals))
    again = writer.answered(dataset.held_out, dataset.train)
    assert again is not None and again.adapter.texts == found.adapter.texts and again.rows == found.rows
    fewer = replier(ran, text, examples=0, baselines=False)[0].answered(dataset.held_out, dataset.train)
    assert fewer is not None and fewer.rivals == (fewer.base,)


def test_the_time_cuts_prompts_beyond_the_first_ones_only(ran: Path, text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of them are answered however slow the machine is, and the report says how many were."""
    monkeypatch.setattr(reply, "TOGETHER", 2)
    writer, dataset = replier(ran, text, answer_seconds=1)
    late = replace(writer, clock=iter(np.arange(0.0, 1e6, 1e3).tolist()).__next__)
    prompts = late.prompts(dataset.held_out, dataset.train)
    assert LEAST_ANSWERS == 64 == EvaluateSpec().answers and prompts is not None and prompts.available > 6
    assert len(late.write(ADAPTER, prompts, seconds=1).texts) == 6, "all, since there are fewer than 64"
    monkeypatch.setattr(reply, "LEAST_ANSWERS", 4)
    found = late.answered(dataset.held_out, dataset.train)
    assert found is not None and len(found.adapter.texts) == 4 == len(found.base.texts) == len(found.rows)
    assert found.wanted == 6 and found.adapter.note.startswith(f"answers 4 of {prompts.available} prompts (evaluate.answers)")


def test_settings_of_replies_say_where_they_change_nothing(
    ran: Path, text: TextModel, finished: Any, tmp_path: Path
) -> None:
    """A judge or an own metric of labelled rows, of no prompts, of raw text: said at the start, of a run and of `evaluate`."""
    judged = {"judge": "http://localhost:1#one"}
    writer, dataset = replier(ran, text, **judged, metric="my.py:f")
    assert reply.without_effect(writer.config, dataset.held_out, ()) == ""
    assert reply.without_effect(replier(ran, text)[0].config, dataset.held_out, ("yes", "no")) == ""
    labelled = reply.without_effect(writer.config, dataset.held_out, ("yes", "no"))
    assert labelled.startswith("evaluate.judge and evaluate.metric have no effect: these rows have labels, ")
    none = replier(ran, text, **judged, answers=0)[0].config
    assert reply.without_effect(none, dataset.held_out, ()).startswith("evaluate.judge has no effect: evaluate.answers is 0, ")
    raw = read_rows(str(write_rows(tmp_path / "raw.jsonl", [{"text": "A text of its own."}])), writer.config.data)
    assert "none of these rows ends in an answer" in reply.without_effect(writer.config, raw, ())
    setup, file = finished.result.setup, io.StringIO()
    KIND.show(replace(setup, config=setup.config.changed(evaluate=judged)), Console(file=file, width=300), dry_run=False)
    assert "evaluate.judge has no effect: these rows have labels" in file.getvalue()


def test_evaluate_says_that_a_judge_of_labelled_rows_changes_nothing(finished: Any) -> None:
    file = io.StringIO()
    evaluate(EvaluateOptions(str(finished.path), judge="http://localhost:1#one"), console=Console(file=file, width=300))
    assert file.getvalue().count("evaluate.judge has no effect: these rows have labels") == 1


def test_replies_are_written_in_as_few_batches_as_fit(ran: Path, text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are read once a token for all prompts, not for sixteen of them; wider batches where memory allows it."""
    writer, dataset = replier(ran, text, answers=19)
    prompts = writer.prompts(dataset.held_out, dataset.train)
    assert prompts is not None and len(prompts.rows) > 16
    sizes = list[int]()

    def counting(model: TextModel, questions: Any, **settings: Any) -> Any:
        sizes.append(len(questions))
        return sample(model, questions, **settings)

    monkeypatch.setattr(reply, "sample", counting)
    whole = writer.write(ADAPTER, prompts)
    assert sizes == [len(prompts.rows)]
    sizes.clear()
    monkeypatch.setattr(reply, "REPLY_TOKENS", 3 * max(len(one) + prompts.limit for one in prompts.questions))
    narrow = replace(writer, config=writer.config.changed(train={"micro_tokens": 64}))
    assert narrow.write(ADAPTER, prompts).texts == whole.texts and max(sizes) <= 4 < len(sizes)
    sizes.clear()
    assert replace(narrow, residency=Residency()).write(ADAPTER, prompts).texts == whole.texts and len(sizes) <= 2


def test_no_answers_no_replies(ran: Path, text: TextModel, tmp_path: Path) -> None:
    writer, dataset = replier(ran, text, answers=0)
    assert writer.answered(dataset.held_out, dataset.train) is None
    writer, dataset = replier(ran, text)
    raw = read_rows(str(write_rows(tmp_path / "raw.jsonl", [{"text": "A text of its own."}])), writer.config.data)
    assert writer.answered(tuple(raw), dataset.train) is None


def test_the_report_has_replies_first_and_the_headline_is_theirs(ran: Path) -> None:
    report = evaluate(EvaluateOptions(str(ran)), console=quiet()).report
    assert [system.name for system in report.systems][:3] == ["adapter", "base", "few-shot base"] and len(report.systems) == 5
    compared = ["normalised_match", "exact_match", "token_f1", "chrf", "rouge_l"]
    assert [one.metric for one in report.comparisons] == [name for name in compared for _ in range(4)] + ["loss"]
    assert report.verdict is not None and "normalised match" in report.verdict.sentence
    named = [copy for copy in ("constant answer", "nearest training") if copy in report.verdict.sentence]
    assert len(named) == 1, "the better copy only"
    assert len(report.rows) == 6 and all(row.adapter.text and row.base.text for row in report.rows)
    assert all(row.adapter.right is not None for row in report.rows)
    page = render_html(report)
    assert "Normalised match" in page and "held-out rows" in page


@pytest.mark.slow
def test_chats_are_compared_by_their_last_answers(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", chats(40))
    result = finetune(settings(tiny_llama_folder, data, tmp_path / "run"), console=quiet())
    assert result.report is not None and result.report.comparisons[0].metric in ("normalised_match", "chrf")
    assert any(row.adapter.text for row in result.report.rows)
    assert all(row.truth and len(row.truth.split()) == 4 and len(row.text.splitlines()) == 3 for row in result.report.rows)


def test_an_own_metric_decides(ran: Path, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def length(reply, reference):\n    return min(1, len(reply) / 100)\n")
    given = f"{tmp_path / 'my.py'}:length"
    report = evaluate(EvaluateOptions(str(ran), metric=given), console=quiet()).report
    assert report.comparisons[0].metric == given and given in report.systems[0].metrics
    assert render_html(report)


@pytest.mark.slow
def test_the_few_shot_base_is_shown_to_classifiers(finished: Any) -> None:
    """Labels named, examples given, calibrated: a contender of the adapter's, with its own note."""
    setup = finished.result.setup
    config = replace(setup.config, data=replace(setup.config.data, max_tokens=400))
    encoder = Encoder(setup.text.tokenizer, config.data, setup.dataset.labels)
    evaluator = TextEvaluator(config, setup.text, encoder, setup.dataset.test, quiet())
    report = evaluator.report("t", baseline_rows=setup.dataset.train)
    few = next(system for system in report.systems if system.name == "few-shot base")
    assert "training rows with their labels" in few.note and "fitted to" in few.note
    assert "few-shot base" in {one.right for one in report.comparisons if one.metric == "accuracy"}
    assert any("do not name all" in warning for warning in report.warnings)


def test_few_shot_rows_pass_together_in_micro_tokens_or_one_row(ran: Path, text: TextModel) -> None:
    """Not in more where no budget is given: that is what a run's plan counts."""
    writer, _ = replier(ran, text)
    for micro, most in ((64, 256), (512, 512)):
        limits = reply.few_shot_limits(writer.config.changed(train={"micro_tokens": micro}), text, writer.encoder)
        assert limits.encoder.spec.max_tokens == 256 and limits.tokens == most


def test_tool_calls_are_answered_as_the_template_writes_them(ran: Path, text: TextModel, tmp_path: Path) -> None:
    """A row that ends in a call has the call as its reference, and one that goes on after it the last answer."""
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    asked = {"role": "user", "content": "Is it hot in Rome?"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    after = [{"role": "tool", "content": "31"}, {"role": "assistant", "content": "Yes, 31 degrees."}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    records = [{"messages": [asked, called, *more], "tools": tools} for more in ([], after)]
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.chat_template = WRITES_TOOLS.replace("{% endfor %}\n", "{% endfor %}{{ '" + tokenizer.eos_token + "' }}\n")
    writer, _ = replier(ran, text)
    writer = replace(writer, encoder=Encoder(tokenizer, replace(writer.config.data, chat_template="auto", max_tokens=256)))
    rows = read_rows(str(write_rows(tmp_path / "rows.jsonl", records)), writer.encoder.spec)
    found = writer.prompts(rows, ())
    assert found is not None and len(found.rows) == 2
    by_row = dict(zip((row.source for row in found.rows), found.references, strict=True))
    assert "weather" in by_row["rows.jsonl:1"] and "Rome" in by_row["rows.jsonl:1"]
    assert by_row["rows.jsonl:2"] == "Yes, 31 degrees."
    assert len(writer.write(ADAPTER, found).texts) == 2
    report = TextEvaluator(writer.config, text, writer.encoder, rows, quiet(), NAME).report("t", baseline_rows=())
    assert {row.source: row.truth for row in report.rows} == by_row, "shown is what is compared"
    assert "Rome" in next(row.text for row in report.rows if row.source == "rows.jsonl:2"), "with the earlier call"
