"""What a run prints in the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakeet.evaluate.certificate import Certificate, Unchecked, tolerance_check
from lorakeet.kinds.terminal import show_certificate, show_results
from tiny.terminal import printed


def test_brackets_in_rows_are_no_markup(finished: Any) -> None:
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


def test_what_became_of_an_adapter_is_shown_beside_its_own_verdict() -> None:
    own = tolerance_check("adapter on disk", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    other = tolerance_check("http://x: logits", {"x": 2.0}, tolerance={"x": 1.0}, between=("a", "b"))
    missing = Unchecked("http://x", "the stored weights", "a server does not tell them")
    text = printed(show_certificate, Certificate("run", (own, other), unchecked=(missing,)))
    assert "not checked: the stored weights of http://x, since a server does not tell them" in text
    assert text.rstrip().endswith("The own checks passed; http://x failed.")
    assert "own checks" not in printed(show_certificate, Certificate("run", (own,)))


