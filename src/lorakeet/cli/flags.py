"""Settings as command-line flags: one flag per setting, named by its dotted path and grouped by section in the help."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakeet.errors import nearest_name
from lorakeet.setting import Removed
from lorakeet.settings import TRUTH_WORDS, Setting, choices, fields_of, removed_from, shown_default
from lorakeet.verbs.options import VERBS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from click.shell_completion import CompletionItem

__all__ = ["SettingFlag", "SettingsCommand", "given_values", "nearest_flag", "option_flags", "removed_flags", "setting_flags"]

_METAVARS = {bool: "true|false", int: "N", float: "X", str: "TEXT", Path: "PATH"}


class _Flag(click.Option):
    """A flag whose text is not parsed here: `settings.load` parses all flags together and reports every problem at once.

    One of a truth value stands alone or with a word (`--flag`, `--flag false`), and has a second form, `--no-flag`. With
    `whole`, a comma is part of the text of a list.
    """

    def __init__(self, names: Sequence[str], setting: Setting, *, whole: bool = False) -> None:
        kind, self.whole = setting.kind, whole
        metavar = _metavar(kind).removesuffix(",…") if whole else _metavar(kind)
        repeatable = typing.get_origin(kind) in (tuple, dict)
        super().__init__(names, type=_Text(kind), multiple=repeatable, help=_help(setting), metavar=metavar)
        self.is_switch = kind is bool or bool in typing.get_args(kind)
        if self.is_switch:
            self.secondary_opts = [f"--no-{flag.removeprefix('--')}" for flag in self.opts]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        if self.is_switch:
            parser.add_option(obj=self, opts=self.secondary_opts, dest=self.name, action="store_const", const="false")

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        return (" / ".join([*self.opts, *self.secondary_opts]), record[1]) if record and self.is_switch else record


class SettingFlag(_Flag):
    """The flag of a setting of the run file, named by its dotted path."""

    def __init__(self, flag: str, setting: Setting) -> None:
        self.setting = setting
        short = [f"--{setting.shorthand}"] if setting.shorthand else []
        super().__init__([setting.path.replace(".", "__"), flag, *short], setting)


class SettingsCommand(click.Command):
    """A command whose help describes its arguments and groups its flags by section of the run file."""

    def __init__(self, name: str, *, arguments: dict[str, str], **rest: Any) -> None:
        super().__init__(name, **rest)
        self.arguments = arguments

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_words(args, self.params))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(list(self.arguments.items()))
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                setting = getattr(param, "setting", None)
                section = setting.section or "run" if setting else "Options"
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records, col_max=36)


def _with_words(args: Sequence[str], params: Sequence[click.Parameter]) -> list[str]:
    """The arguments, in which each flag of a truth value that stands alone has the word true."""
    flags = {name: param for param in params if isinstance(param, click.Option) for name in param.opts}
    found: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        param = flags.get(word)
        switch = isinstance(param, _Flag) and param.is_switch
        if word == "--":
            return [*found, word, *rest]
        if switch and not (rest and rest[0].lower() in TRUTH_WORDS):
            word = f"{word}=true"
        found.append(word)
        if param is not None and "=" not in word and not param.is_flag:  # the next one is its text, whatever it looks like
            found += rest[:1]
            rest = rest[1:]
    return found


class _Text(click.ParamType[str]):
    """Any text; shell completion offers the allowed values."""

    name = "text"

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        words = choices(self.kind) or (("true", "false") if bool in (self.kind, *typing.get_args(self.kind)) else ())
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def setting_flags(cls: type[DataclassInstance]) -> list[click.Parameter]:
    """Returns one flag per setting: `--lora.rank`, and `--model` as an alias of `--model.path`."""
    return [SettingFlag(f"--{setting.path}", setting) for setting in fields_of(cls)]


def option_flags(options: type[DataclassInstance]) -> tuple[list[click.Parameter], dict[str, str]]:
    """Returns the click parameters of a verb's options, and the help of the positional ones by metavar."""
    parameters: list[click.Parameter] = []
    arguments: dict[str, str] = {}
    by_name = {spec.name: spec for spec in dataclasses.fields(options)}
    for setting in fields_of(options):
        if by_name[setting.path].metadata.get("positional"):
            metavar = setting.path.upper()
            arguments[metavar] = setting.help
            several = typing.get_origin(setting.kind) is tuple
            shown = f"{metavar}…" if several else metavar
            parameters.append(click.Argument([setting.path], metavar=shown, nargs=-1 if several else 1, required=False))
        else:
            whole = bool(by_name[setting.path].metadata.get("whole"))
            parameters.append(_Flag([setting.path, "--" + setting.path.replace("_", "-")], setting, whole=whole))
    return parameters, arguments


def given_values(command: click.Command, values: dict[str, Any], chosen: Callable[[click.Parameter], bool]) -> dict[str, Any]:
    """Returns the typed value by dotted path, for the chosen parameters that were given."""
    found: dict[str, Any] = {}
    for param in command.params:
        value = values.get(param.name or "")
        if chosen(param) and value not in (None, (), False):
            path = param.setting.path if isinstance(param, SettingFlag) else str(param.name)
            whole = isinstance(value, tuple) and (isinstance(param, click.Argument) or getattr(param, "whole", False))
            found[path] = list(value) if whole else _joined(value, getattr(param, "setting", None))
    return found


def nearest_flag(typed: str, command: click.Command) -> str:
    """Returns the flag that is most like an unknown one, also if only its last part was typed; else an empty string."""
    flags = [flag for param in command.params if isinstance(param, click.Option)
             for flag in (*param.opts, *param.secondary_opts)]  # fmt: skip
    by_leaf = {flag.lstrip("-").rpartition(".")[2]: flag for flag in reversed(flags)}
    leaf = typed.lstrip("-").rpartition(".")[2].replace("-", "_")
    if leaf in by_leaf:
        return by_leaf[leaf]
    section = [flag for flag in flags if flag.rpartition(".")[0] == typed.rpartition(".")[0]]
    return nearest_name(typed, section) or nearest_name(typed, flags)


def removed_flags(command: click.Command) -> dict[str, Removed]:
    """The flags that the command had in earlier versions."""
    from lorakeet.config import RunConfig

    verb = next((verb for verb in VERBS if verb.name == command.name), None)
    found = {} if verb is None else removed_from(verb.options) | (removed_from(RunConfig) if verb.config != "none" else {})
    return {f"--{name.replace('_', '-') if '.' not in name else name}": one for name, one in found.items()}


def _joined(value: Any, setting: Setting | None) -> Any:
    """Returns the text of a flag given once; for one given several times, a list or a mapping of its texts."""
    if not isinstance(value, tuple):
        return value
    if len(value) == 1:
        return value[0]
    if setting is not None and typing.get_origin(setting.kind) is dict and all("=" in text for text in value):
        return {text.rpartition("=")[0]: text.rpartition("=")[2] for text in value}
    return list(value)


def _metavar(kind: Any) -> str:
    if choices(kind):
        return "|".join(choices(kind))
    inner = [arm for arm in typing.get_args(kind) if arm not in (type(None), ...)]
    origin = typing.get_origin(kind)
    if origin is dict:
        return f"NAME={_metavar(inner[1])},…"
    if origin is tuple:
        return f"{_metavar(inner[0])},…"
    return _METAVARS.get(kind) or "|".join(_metavar(arm) for arm in inner)


def _help(setting: Setting) -> str:
    if setting.default is dataclasses.MISSING:
        return f"{setting.help} (required)"
    return f"{setting.help} ({shown_default(setting.default)})"
