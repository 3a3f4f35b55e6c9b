"""What a run on text prints before it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakeet.kinds.text.assemble import assemble_text
from lorakeet.kinds.text.terminal import show_rows
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, settings, write_rows
from tiny.terminal import printed


def test_the_plan_shows_rows_leaks_target_tokens_and_matrices(finished: Any) -> None:
    text = printed(show_rows, finished.result.setup)
    assert "53 training, 6 held-out, 13 test" in text
    assert "The prompts do not name all 3 labels" in text and "Answer with one of:" in text, "before the training, not after it"
    assert "1 row is on both sides of a split (1 dropped)" in text and "judged.jsonl:13" in text
    assert "model.layers.[0-1].self_attn.q_proj" in text and "14 pairs, 0 extras, 3,712 trained parameters" in text
    assert "6 steps of 8 rows" in text and "float32 weights" in text and "tokens an epoch" in text
    coloured = printed(show_rows, finished.result.setup, force_terminal=True, color_system="standard")
    example = finished.result.setup.train.examples[0]
    learnt = finished.result.setup.text.tokenizer.decode(example.ids[example.supervised].tolist())
    assert f"\x1b[1;32m{learnt}\x1b[0m" in coloured


def test_rows_that_were_cut_are_counted(finished: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*reviews(30), {"text": "long " * 60, "label": "good"}])
    setup = assemble_text(settings(finished.model, data, tmp_path / "run"), quiet())
    assert "1 training rows shortened to 120 tokens, 0 left out" in printed(show_rows, setup)


def test_a_missing_chat_template_is_said(finished: Any, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    said = "The tokenizer has no chat template, so turns are joined as raw text"
    setup = assemble_text(settings(model, finished.data, tmp_path / "run"), quiet())
    assert said in printed(show_rows, setup) and said not in printed(show_rows, finished.result.setup)
    chosen = assemble_text(settings(model, finished.data, tmp_path / "run", {"data.chat_template": "off"}), quiet())
    assert said not in printed(show_rows, chosen)


def test_brackets_in_names_are_no_markup(finished: Any) -> None:
    setup = finished.result.setup
    odd = replace(setup, text=replace(setup.text, name="[bold]odd[/nothing]"))
    assert "14 pairs" in printed(show_rows, odd)
