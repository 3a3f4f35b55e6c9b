"""Forms from the same dataclasses as flags and run files, and the command and the run file that do the same as a form."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakeet.config import RunConfig, dump_yaml, read_run
from lorakeet.errors import LorakeetError
from lorakeet.evaluate.report.templates import SHOWN
from lorakeet.registry import declarations
from lorakeet.settings import Setting, choices, fields_of, shown_default, to_mapping

# What a first run needs; everything else stands behind "More settings".
FIRST = (
    "model.path", "data.train", "out", "lora.rank", "train.epochs", "train.learning_rate", "model.quantize.method",
    "memory.budget",
)  # fmt: skip
_LABELS = {  # where the last part of the path says too little
    "model.path": "model", "data.train": "rows", "model.quantize.method": "quantisation", "memory.budget": "memory budget",
    "data.held_out": "held-out rows", "data.test": "test rows", "data.held_out_fraction": "share held out",
    "data.max_tokens": "longest row in tokens", "data.too_long": "longer rows", "data.near_duplicates": "near-copies",
    "data.on_leak": "copies on both sides", "data.bad_rows": "rows that cannot be read", "data.format": "format of the rows",
    "data.rename_labels": "labels to merge",
    "data.template": "prompt template", "data.system": "system prompt", "data.delimiter": "separator",
    "train.micro_tokens": "tokens at once",
    "kind": " or ".join(one.rows_called for one in declarations().values() if not one.over),
}  # fmt: skip
_LINES = ("data.template", "data.label_template", "data.system", "data.separator")  # whose texts may have several lines
Widget = Literal["choice", "number", "text", "lines"]


@dataclass(frozen=True)
class FormField:
    """One setting as a field of a form."""

    path: str  # dotted, which is the field's name in the form
    label: str
    help: str
    widget: Widget
    default: str  # as it would be typed
    choices: tuple[str, ...] = ()
    required: bool = False

    @property
    def section(self) -> str:
        return self.path.partition(".")[0] if "." in self.path else "run"

    @property
    def id(self) -> str:
        """The field's id on a page."""
        return f"field-{self.path.replace('.', '-')}"


def form_field(setting: Setting) -> FormField:
    """The field of one setting."""
    default = "" if setting.default is dataclasses.MISSING else shown_default(setting.default)
    words = choices(setting.kind) or (("true", "false") if setting.kind is bool else ())
    numeric = not words and {setting.kind, *typing.get_args(setting.kind)} & {int, float}
    plural = typing.get_origin(setting.kind) in (tuple, dict)
    widget: Widget = "choice" if words and not plural else "number" if numeric and not plural else "text"
    widget = "lines" if setting.path in _LINES else widget
    name = setting.path.rpartition(".")[2]
    label = _LABELS.get(setting.path) or _LABELS.get(f"data.{name}") or name.replace("_", " ")
    return FormField(setting.path, label, setting.help, widget, default, words, setting.path in ("model.path", "data.train"))


@functools.cache
def run_fields() -> tuple[FormField, ...]:
    """The fields of all settings of a run, in the order of the run file."""
    return tuple(map(form_field, fields_of(RunConfig)))


def first_fields() -> tuple[FormField, ...]:
    """The fields that a first run needs."""
    by_path = {field.path: field for field in run_fields()}
    return tuple(by_path[path] for path in FIRST)


def more_fields() -> dict[str, tuple[FormField, ...]]:
    """All other fields, by section of the run file."""
    found: dict[str, list[FormField]] = {}
    for field in run_fields():
        if field.path not in FIRST:
            found.setdefault(field.section, []).append(field)
    return {section: tuple(fields) for section, fields in found.items()}


def typed(text: str) -> str:
    """What a field of a page means: signs that turn the order of what follows stand in it as escapes (`page_templates`)."""
    return re.sub("|".join(map(re.escape, SHOWN.values())), lambda found: chr(int(found[0][2:], 16)), text)


def given_settings(form: Mapping[str, str]) -> dict[str, str]:
    """The settings of a run that a form or an address gives, by dotted path: those that are filled in and no default."""
    defaults = {field.path: field.default for field in run_fields()}
    found = {path: typed(form.get(path, "")).replace("\r\n", "\n").strip() for path in defaults}  # as browsers send lines
    return {path: text for path, text in found.items() if text and text != defaults[path]}


def run_config(settings: Mapping[str, str], out: Path) -> RunConfig:
    """The run of a form's settings, to be written to the folder `out`. ConfigError lists every problem, as the command does."""
    return read_run(None, {**settings, "out": str(out)})


def run_file(config: RunConfig) -> str:
    """The run file of `config` with the settings that differ from their defaults."""
    return dump_yaml(_changed(to_mapping(config), _defaults()))


def run_words(config: RunConfig, verb: str = "finetune") -> list[str]:
    """The arguments of the command that does the same, by flags alone."""
    words = [verb]
    values, defaults = _leaves(to_mapping(config)), _leaves(_defaults())
    for setting in fields_of(RunConfig):
        value = values[setting.path]
        if value != defaults[setting.path]:
            for item in value if isinstance(value, list) else [value]:
                name, text = setting.shorthand or setting.path, item if isinstance(item, str) else shown_default(item)
                flag = f"--{name}"
                if isinstance(item, bool):
                    words.append(flag if item else f"--no-{name}")
                    continue
                words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def settings_of(*folders: Path) -> dict[str, str]:
    """The settings of a run as a form has them, without `out`: from the first run file in `folders`; empty without one."""
    files = [path for folder in folders for path in (folder / "run.yaml", folder / "config.yaml") if path.is_file()]
    try:
        return form_settings(read_run(files[0])) if files else {}
    except LorakeetError:  # a broken file: the form is empty
        return {}


def form_settings(config: RunConfig) -> dict[str, str]:
    """The settings of a run that are no defaults, as a form has them, without `out`."""
    values, defaults = _leaves(to_mapping(config)), _leaves(_defaults())
    given = {path: value for path, value in values.items() if path != "out" and value != defaults[path]}
    return {path: value if isinstance(value, str) else shown_default(value) for path, value in given.items()}


def command_line(words: Sequence[str]) -> str:
    """The words as a line for a shell."""
    return shlex.join(["lorakeet", *words])


@functools.cache
def _defaults() -> dict[str, Any]:
    """All settings at their defaults; those that must be given are empty."""
    found: dict[str, Any] = {}
    for spec in dataclasses.fields(RunConfig):
        value: Any = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
        found[spec.name] = to_mapping(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return found


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        before = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and before:
            if kept := _changed(value, before):
                found[name] = kept
        elif value != before:
            found[name] = value
    return found


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by dotted path; mappings that are values of a setting stay whole."""
    paths = {setting.path for setting in fields_of(RunConfig)}
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        path = f"{prefix}{name}"
        if path not in paths and isinstance(value, Mapping):
            found |= _leaves(value, f"{path}.")
        else:
            found[path] = value
    return found
