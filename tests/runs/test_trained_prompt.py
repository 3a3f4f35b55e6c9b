"""A text that is typed gets the prompt that the rows of the training had, by the code that `predict` shapes rows with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorakeet.data.spec import DataSpec
from lorakeet.data.split import SPLIT_FORMAT
from lorakeet.errors import ConfigError
from lorakeet.evaluate.values import put_text, to_text
from lorakeet.runs.trained_prompt import prompt_settings, trained_labels, trained_prompt
from lorakeet.train.run import RunFolder

LABELS = ("bad", "good")


def test_the_template_is_filled_as_for_a_row() -> None:
    spec = DataSpec(train="x", text_column="Text", template="Review: {text}\nOne of: bad, good", html_unescape=True)
    assert trained_prompt("fine &amp; dandy", spec, LABELS) == "Review: fine & dandy\nOne of: bad, good"
    assert trained_prompt("{text}", DataSpec(train="x", template="{text}!", system="S"), LABELS) == "{text}!"
    assert trained_prompt("as it is", spec, ()) == "as it is", "prompts with answers have no template"


def test_a_text_that_stands_in_its_template_is_left_as_it_is() -> None:
    spec = DataSpec(train="x", template="Review: {text}\nGood?")
    for text in ("Review: fine\nGood?", "Review: \nGood?"):
        assert trained_prompt(text, spec, LABELS) == text
    assert trained_prompt("Review: fine", spec, LABELS) == "Review: Review: fine\nGood?"
    two = DataSpec(train="x", template="On {drug}: {text}!")
    assert trained_prompt("On A: fine!", two, LABELS) == "On A: fine!", "whatever columns the template has"
    assert trained_prompt("a&amp;b", DataSpec(train="x", html_unescape=True), LABELS) == "a&b", "no template is none to stand in"
    signs = DataSpec(train="x", template="{text}?")
    assert trained_prompt("Is it good?", signs, LABELS) == "Is it good??", "as the rows of the training"


def test_settings_of_prompts_have_labels_and_template_or_neither(tmp_path: Path) -> None:
    """The labels of the split; without that file those of the settings, for chat, Python, the studio and `predict` alike."""
    spec, run = DataSpec(train="x", labels=("old", "older"), template="{text}!"), RunFolder(tmp_path)

    def found(run: RunFolder | None = run, spec: DataSpec = spec) -> tuple[tuple[str, ...], str]:
        settings = prompt_settings(spec, run)
        assert settings.labels == trained_labels(run, spec)
        return settings.labels, settings.template

    assert found() == found(None) == (("old", "older"), "{text}!") and found(spec=replace(spec, labels=())) == ((), "{text}")
    put_text(run.split, to_text({"format": SPLIT_FORMAT, "held_out": [], "labels": ["a", "b"]}))
    assert found() == (("a", "b"), "{text}!")
    put_text(run.split, to_text({"format": SPLIT_FORMAT, "held_out": []}))
    assert found() == ((), "{text}"), "rows of prompts"


def test_what_no_row_could_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'drug' too.*lorakeet predict"):
        trained_prompt("fine", DataSpec(train="x", template="{drug}: {text}"), LABELS)
    with pytest.raises(ConfigError, match="column 'text' is empty"):
        trained_prompt("  ", DataSpec(train="x"), LABELS)


def test_labels_are_those_of_the_split_else_of_the_settings(tmp_path: Path) -> None:
    run, spec = RunFolder(tmp_path), DataSpec(train="x", labels=LABELS)
    assert trained_labels(run, spec) == trained_labels(None, spec) == LABELS
    put_text(run.split, to_text({"format": SPLIT_FORMAT, "held_out": [], "labels": ["a", "b"]}))
    assert trained_labels(run, spec) == ("a", "b")
