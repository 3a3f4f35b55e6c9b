"""`cli.flags`: one flag for each leaf of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click
import pytest

from lorakeet.cli.flags import SettingFlag, SettingsCommand, given_values, option_flags, setting_flags
from lorakeet.config import RunConfig
from lorakeet.settings import Setting, fields_of, shown_default
from lorakeet.workflows.options import EvaluateOptions, MergeOptions


def test_every_setting_is_a_flag_with_help() -> None:
    flags = [flag for flag in setting_flags(RunConfig) if isinstance(flag, SettingFlag)]
    assert [flag.setting.path for flag in flags] == [leaf.path for leaf in fields_of(RunConfig)]
    for flag in flags:
        assert f"--{flag.setting.path}" in flag.opts
        assert flag.help and flag.setting.help in flag.help
    assert "--model" in flags[0].opts


def test_help_is_grouped_by_section() -> None:
    command = SettingsCommand("demo", arguments={"CONFIG": "The run file."}, params=setting_flags(RunConfig))
    text = command.get_help(click.Context(command, terminal_width=200))
    heads = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    sections = list(dict.fromkeys(leaf.section or "run" for leaf in fields_of(RunConfig)))
    assert heads == ["Arguments", "Options", *sections]
    assert "--lora.rank N" in text and "(16)" in text and "--lora.variant lora|dora" in text


def test_options_of_a_verb_become_arguments_and_flags() -> None:
    parameters, arguments = option_flags(EvaluateOptions)
    assert list(arguments) == ["RUN_OR_ADAPTER"]
    rows, tasks = ["data", "config", "base", "out", "metric", "judge"], ["tasks", "task_folder", "task_rows", "task_examples"]
    assert [param.name for param in parameters] == ["run_or_adapter", *rows, *tasks, "task_chat", "memory"]


def test_an_argument_of_several_values_takes_all_of_them() -> None:
    parameters, arguments = option_flags(MergeOptions)
    assert list(arguments) == ["RUNS_OR_ADAPTERS"] and parameters[0].nargs == -1
    command = click.Command("merge", params=parameters)
    for typed in (["a,b"], ["a", "b"]):
        values = command.make_context("merge", list(typed)).params
        assert given_values(command, values, lambda param: True)["runs_or_adapters"] == typed


def test_only_what_was_typed_is_handed_on() -> None:
    command = click.Command("demo", params=setting_flags(RunConfig))
    typed = ["--train.seed", "0", "--lora.rank_pattern", "a=1", "--lora.rank_pattern", "b=2", "--data.labels", "x"]
    values = command.make_context("demo", typed).params
    found = given_values(command, values, lambda param: isinstance(param, SettingFlag))
    assert found == {"train.seed": "0", "lora.rank_pattern": {"a": "1", "b": "2"}, "data.labels": "x"}


@pytest.mark.parametrize(
    ("kind", "metavar"),
    [
        (int, "N"), (float | None, "X"), (Path, "PATH"), (bool, "true|false"), (Literal["a", "b"], "a|b"),
        (tuple[str, ...], "TEXT,…"), (dict[str, int], "NAME=N,…"), (Literal["a"] | None, "a"),
    ],
)
def test_the_help_shows_what_a_flag_takes(kind: Any, metavar: str) -> None:
    assert SettingFlag("--x", Setting("x", kind, None, "Help.")).metavar == metavar


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), ((), "none"), (True, "true"), (0, "0"), (("a", "b"), "a,b"), ({"q": 8}, "q=8"), ("\n", "'\\n'")],
)
def test_defaults_are_shown_as_typed(value: Any, text: str) -> None:
    assert shown_default(value) == text
