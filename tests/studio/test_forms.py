"""`studio.forms`: forms, commands and run files are made from the settings' dataclasses, and mean the same run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from lorakeet.cli.flags import SettingsCommand, given_values, setting_flags
from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError
from lorakeet.evaluate.report.templates import page_templates
from lorakeet.settings import fields_of
from lorakeet.studio.forms import (
    command_line,
    first_fields,
    given_settings,
    more_fields,
    run_config,
    run_fields,
    run_file,
    run_words,
    typed,
)  # fmt: skip

GIVEN = {
    "model.path": "m", "data.train": "my rows.jsonl", "lora.rank": "8", "lora.rank_pattern": "q_proj=4", "data.labels": "a,b",
    "data.system": "Two\nlines: 'x'", "train.length_grouping": "false", "model.quantize.method": "nf4", "train.steps": "6",
}  # fmt: skip


def test_every_setting_is_a_field_once() -> None:
    paths = [field.path for field in run_fields()]
    assert paths == [setting.path for setting in fields_of(RunConfig)] and len(paths) > 100
    shown = [*first_fields(), *(field for fields in more_fields().values() for field in fields)]
    assert sorted(field.path for field in shown) == sorted(paths) and len({field.id for field in shown}) == len(paths)
    assert all(field.help for field in shown)


def test_a_field_is_what_its_type_says() -> None:
    by_path = {field.path: field for field in run_fields()}
    assert by_path["model.quantize.method"].choices[0] == "none" and by_path["model.quantize.method"].widget == "choice"
    assert by_path["train.length_grouping"].choices == ("true", "false") and by_path["lora.rank"].widget == "number"
    assert by_path["lora.rank_pattern"].widget == "text" and by_path["model.path"].required


def test_what_is_empty_or_a_default_is_not_given() -> None:
    form = {"lora.rank": "8", "train.epochs": "3.0", "data.train": " ", "csrf": "x", "model": "y"}
    assert given_settings(form) == {"lora.rank": "8"}


def test_a_field_has_no_sign_that_turns_the_order_and_means_it() -> None:
    """A path with U+202E stood in the field as it is; a page's escape of it named no file."""
    turned = "data\u202evsc.\x1b[1m\u2066.csv"
    [written] = {page_templates(lambda name: "{{ value }}").get_template("x").render(value=turned)}
    assert written.isprintable() and given_settings({"data.train": written}) == {"data.train": turned}
    assert typed("C:\\u00e9\\u202") == "C:\\u00e9\\u202"


def test_form_file_and_command_are_the_same_run(tmp_path: Path) -> None:
    config = run_config(given_settings(GIVEN), tmp_path / "run")
    (tmp_path / "run.yaml").write_text(run_file(config))
    assert read_run(tmp_path / "run.yaml") == config
    assert "epsilon" not in run_file(config)
    command = SettingsCommand("finetune", arguments={}, params=setting_flags(RunConfig))
    words = shlex.split(command_line(run_words(config)))
    assert words[:2] == ["lorakeet", "finetune"]
    with command.make_context("finetune", words[2:]) as context:
        flags = given_values(command, context.params, lambda param: True)
    assert replace(read_run(None, flags), out="") == replace(config, out="")


def test_every_problem_of_a_form_is_named_as_the_command_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)model is missing.*data\.train is empty.*train\.steps .* is 'x'") as found:
        run_config({"train.steps": "x"}, tmp_path)
    assert "flag --train.steps" in str(found.value)


def test_a_value_that_begins_like_a_flag_stays_one() -> None:
    words = run_words(read_run(None, {"model.path": "m", "data.train": "r", "data.separator": "--x", "data.system": "- a"}))
    assert "--data.separator=--x" in words and "--data.system=- a" in words


def test_a_text_of_several_lines_has_a_field_that_keeps_them() -> None:
    widgets = {field.path: field.widget for field in run_fields()}
    assert given_settings({"data.template": "{text}\r\nOne of: a, b"}) == {"data.template": "{text}\nOne of: a, b"}
    assert widgets["data.template"] == widgets["data.system"] == "lines" and widgets["data.train"] == "text"
