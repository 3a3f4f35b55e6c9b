"""What a run prints in the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.evaluate.certificate import Certificate, Unchecked, tolerance_check
from lorakeet.workflows.finetuning.assemble_image import assemble_images
from lorakeet.workflows.finetuning.assemble_text import assemble_text
from lorakeet.workflows.finetuning.terminal import show_certificate, show_image_forecast, show_pictures, show_results, show_rows
from tiny.image_runs import image_config
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, settings, write_rows


def printed(show: Any, what: Any, **console: Any) -> str:
    file = io.StringIO()
    show(what, Console(file=file, **{"width": 200, **console}))
    return file.getvalue()


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


def test_brackets_in_rows_and_names_are_no_markup(finished: Any) -> None:
    setup = finished.result.setup
    odd = replace(setup, text=replace(setup.text, name="[bold]odd[/nothing]"))
    assert "14 pairs" in printed(show_rows, odd)
    report = replace(finished.result.report, subtitle="[/x] on [red]rows.jsonl")
    assert "[/x] on [red]rows.jsonl" in printed(show_results, report)


def test_the_results_name_every_system_and_the_verdict(finished: Any) -> None:
    text = printed(show_results, finished.result.report)
    for word in ("adapter", "base", "TF-IDF", "majority class", "Accuracy", "Macro-F1", "Log-loss", "McNemar", "Drift"):
        assert word in text
    sentence = finished.result.report.verdict.sentence
    assert " ".join(sentence.split()) in " ".join(text.split())
    bare = printed(show_results, replace(finished.result.report, comparisons=(), drift=None, verdict=None))
    assert "McNemar" not in bare and "Drift" not in bare


def test_every_check_is_a_line(finished: Any) -> None:
    bad = tolerance_check("merged model", {"logit": 2.0}, tolerance={"logit": 1.0}, between=("a", "b"), n=3)
    good = finished.result.report.certificate.checks
    text = printed(show_certificate, Certificate("x", (*good, bad)))
    assert text.count("pass  ") == len(good) > 0 and "FAIL  merged model: a against b" in text


def test_a_missing_chat_template_is_said(finished: Any, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    said = "The tokenizer has no chat template, so turns are joined as raw text"
    setup = assemble_text(settings(model, finished.data, tmp_path / "run"), quiet())
    assert said in printed(show_rows, setup) and said not in printed(show_rows, finished.result.setup)
    chosen = assemble_text(settings(model, finished.data, tmp_path / "run", {"data.chat_template": "off"}), quiet())
    assert said not in printed(show_rows, chosen)


def test_what_became_of_an_adapter_is_shown_beside_its_own_verdict() -> None:
    own = tolerance_check("adapter on disk", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    other = tolerance_check("http://x: logits", {"x": 2.0}, tolerance={"x": 1.0}, between=("a", "b"))
    missing = Unchecked("http://x", "the stored weights", "a server does not tell them")
    text = printed(show_certificate, Certificate("run", (own, other), unchecked=(missing,)))
    assert "not checked: the stored weights of http://x, since a server does not tell them" in text
    assert text.rstrip().endswith("The own checks passed; http://x failed.")
    assert "own checks" not in printed(show_certificate, Certificate("run", (own,)))


def test_pictures_plan_and_memory(tiny_sd_folder: Path, tmp_path: Path) -> None:
    setup = assemble_images(image_config(tiny_sd_folder, tmp_path), quiet(), forecast=True)
    assert setup.residency.plan is not None and not setup.residency.budget
    text = printed(show_pictures, setup) + printed(show_image_forecast, setup.residency.plan)
    assert "12 training, 8 held-out" in text and "16×16 pixels" in text and "8 steps of 4 pictures" in text
    for word in ("encode", "train step", "saved: activations kept", "certify", "micro-batches of 4 × 16×16 pixels", "On a GPU"):
        assert word in text
