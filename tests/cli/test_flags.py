"""`cli.flags`: one flag for each leaf of the settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import click
import pytest

from lorakeet.cli.flags import SettingFlag, SettingsCommand, given_values, option_flags, setting_flags
from lorakeet.cli.main import lorakeet
from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError
from lorakeet.settings import Setting, fields_of, load, shown_default
from lorakeet.verbs.options import VERBS, EvaluateOptions, MergeOptions


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
    assert [param.name for param in parameters] == ["run_or_adapter", *rows, *tasks, "task_chat", "memory", "uncertified"]


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


def is_switch(setting: Setting) -> bool:
    return setting.kind in (bool, bool | None)


OPTION_SWITCHES = [(verb.name, leaf.path) for verb in VERBS for leaf in fields_of(verb.options) if is_switch(leaf)]
SETTING_SWITCHES = [leaf.path for leaf in fields_of(RunConfig) if is_switch(leaf)]


def held(verb: str, path: str, words: list[str]) -> Any:
    """What the options or the run of the verb hold at `path` after these words, between others; None where it is not given."""
    command = lorakeet.get_command(click.Context(lorakeet), verb)
    assert command is not None
    positional = [param for param in command.params if isinstance(param, click.Argument)]
    rest = [f"word{number}" for number, _ in enumerate(positional)]
    values = command.make_context(verb, [*rest[:1], *words, *rest[1:]]).params
    assert all(values[param.name] for param in positional if param.name)  # no flag took the word of another
    return given_values(command, values, lambda param: True).get(path)


@pytest.mark.parametrize(("verb", "path"), [*OPTION_SWITCHES, *(("finetune", path) for path in SETTING_SWITCHES)])
def test_every_truth_value_can_be_set_to_both(verb: str, path: str) -> None:
    cls = next(each.options for each in VERBS if each.name == verb) if (verb, path) in OPTION_SWITCHES else RunConfig
    name = path if cls is RunConfig else path.replace("_", "-")
    ways = {
        True: ([f"--{name}"], [f"--{name}", "true"], [f"--{name}=yes"], [f"--no-{name}", f"--{name}"]),
        False: ([f"--no-{name}"], [f"--{name}", "false"], [f"--{name}=off"], [f"--{name}", f"--no-{name}"]),
    }
    for expected, forms in ways.items():
        for form in forms:
            given = held(verb, path, form)
            kind = next(leaf.kind for leaf in fields_of(cls) if leaf.path == path)
            one = dataclasses.make_dataclass("One", [("value", kind)])
            assert load(one, {"value": given}, where="the test").value is expected, form  # type: ignore[attr-defined]
    assert held(verb, path, []) is None
    command = lorakeet.get_command(click.Context(lorakeet), verb)
    assert command is not None and f"--{name} / --no-{name}" in command.get_help(click.Context(command, terminal_width=400))
    offered = {item.value for item in command.shell_complete(click.Context(command), "--")}
    assert {f"--{name}", f"--no-{name}"} <= offered


def test_a_truth_value_that_is_neither_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sym .*'maybe'.*expected true or false"):
        load(next(verb.options for verb in VERBS if verb.name == "quantize"), {"model": "m", "method": "nf4", "out": "o",
             "sym": held("quantize", "sym", ["--sym=maybe"])}, where="the test")  # fmt: skip


def test_the_text_of_a_flag_is_its_own_whatever_it_looks_like() -> None:
    assert held("chat", "system", ["--system", "--plain"]) == "--plain"
    assert held("chat", "plain", ["--system", "--plain"]) is None
    assert held("finetune", "train.learning_rate", ["--train.learning_rate", "none"]) == "none"
    assert held("evaluate", "task_chat", ["--task-chat", "--"]) == "true"
