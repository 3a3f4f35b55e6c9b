"""`DataSpec`, the `data` part of a run file: files, templates, the split, and the checks of rows."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, field
from typing import Literal

from lorakeet.errors import ConfigError, Problems, spelt
from lorakeet.registry import shape_names
from lorakeet.setting import setting
from lorakeet.settings import require_types

LONGEST_ROW = 1_000_000  # characters: some 250,000 tokens
NO_ROWS = "no rows are read"  # the data.train of a verb that needs none


@dataclass(frozen=True)
class DataSpec:
    """Where the rows are, how they are formatted, split and checked."""

    train: str = setting(
        "", "File of rows, such as a CSV table; or 'archive.zip!member', 'package:DIST/path', a folder, 'hub:owner/name#split'."
    )
    held_out: str | None = setting(None, "File of held-out rows; by default they are split off the training rows.")
    test: str | None = setting(None, "File of test rows, never used to choose a setting or a checkpoint.")
    format: Literal[  # type: ignore[valid-type]  # evaluated at each reading: of every kind
        ("auto", "chat", "completion", "alpaca", "text", "classification", *shape_names())
    ] = setting(
        "auto", "Format of the rows; auto decides by the columns of the first row. A rated row is an answer with true or false."
    )
    text_column: str = setting("text", "Column of the text, for text and classification rows.")
    label_column: str | None = setting(None, "Column of the label, for classification rows (default: label).")
    group_column: str | None = setting(None, "Column whose equal values stay on one side of the split (a patient, an author).")
    labels: tuple[str, ...] = setting((), "Labels in reporting order; by default those of the training rows, sorted.")
    rename_labels: dict[str, str] = field(
        default_factory=dict,
        hash=False,
        metadata={"help": "Labels that are read as another one, such as YES=Yes; in a run file a mapping."},
    )
    template: str = setting("{text}", "Prompt of a classification row, with {text} and any {column}; write {{ and }} for braces.")
    label_template: str = setting("{label}", "Answer of a classification row, made from {label}.")
    system: str | None = setting(None, "System prompt for rows without one; by default the chat template decides.")
    chat_template: Literal["auto", "on", "off"] = setting(
        "auto", "Use the tokenizer's chat template: if it has one (auto), always (on), or never (off: plain text)."
    )
    separator: str = setting("\n", "Text between turns if no chat template is used, unless white space is there already.")
    held_out_fraction: float = setting(0.1, "Share of the training rows to hold out; 0 holds out none.")
    held_out_minimum: int = setting(64, "Hold out at least this many rows if there are ten times as many.")
    max_tokens: int = setting(1024, "Longest row in tokens, template and answer included.")
    too_long: Literal["truncate", "refuse", "drop"] = setting(
        "truncate", "What to do with a longer row: truncate the user's text, stop with an error, or drop the row."
    )
    supervise: Literal["completion", "all"] = setting(
        "completion", "Target tokens of the loss: the answers, or every token of a row."
    )
    near_duplicates: float = setting(
        0.8, "Share of common words from which two texts count as near-copies; 0 finds exact copies only."
    )
    on_leak: Literal["drop", "refuse", "keep"] = setting(
        "drop", "If a training row is also in the held-out or test rows: drop it from training, stop, or keep it."
    )
    bad_rows: Literal["stop", "drop"] = setting(
        "stop", "If rows cannot be read or used: stop and name them, or drop them and say how many."
    )
    encoding: str = setting("utf-8", "Encoding of text files, such as cp1252.")
    delimiter: str | None = setting(None, "Separator of columns in .csv and .tsv files, such as ';' (default: comma, or tab).")
    longest_row: int = setting(LONGEST_ROW, "Longest row in characters; a longer one is named before it is tokenised.")
    largest_unpacked: int = setting(1024, "Largest zip member, .gz or Parquet file, unpacked, in MiB.")
    limit: int | None = setting(None, "Read at most this many rows of each file.")
    html_unescape: bool = setting(False, "Replace HTML escapes in the texts (&#039;) by characters.")
    strip_quotes: bool = setting(False, "Remove one pair of double quotes around a whole text.")
    split_seed: int = setting(0, "Random seed of the split.")

    def __post_init__(self) -> None:
        require_types(self)

    def validate(self) -> None:
        """Raises a ConfigError that lists every wrong setting."""
        problems = Problems("The data settings cannot be used", ConfigError)
        if not self.train.strip():
            problems.add(
                f"data.train is empty; give the file of the training rows, for instance {spelt('data.train', 'rows.jsonl')}."
            )
        if not 0.0 <= self.held_out_fraction < 1.0:
            problems.add(f"data.held_out_fraction is {self.held_out_fraction}; expected a share from 0 to below 1, such as 0.1.")
        if math.isnan(self.near_duplicates) or not 0.0 <= self.near_duplicates <= 1.0:
            problems.add(f"data.near_duplicates is {self.near_duplicates}; expected a similarity from 0 to 1, such as 0.8.")
        if self.held_out_minimum < 0:
            problems.add(f"data.held_out_minimum is {self.held_out_minimum}; expected a number of rows, 0 or more.")
        for name in ("longest_row", "largest_unpacked"):
            if (value := getattr(self, name)) < 1:
                problems.add(f"data.{name} is {value}; expected 1 or more.")
        if self.max_tokens < 2:
            problems.add(f"data.max_tokens is {self.max_tokens}; expected at least 2 tokens, such as 1024.")
        if self.limit is not None and self.limit < 1:
            problems.add(f"data.limit is {self.limit}; expected at least 1 row, or leave it out to read all.")
        self._check_texts(problems)
        if len(set(self.labels)) != len(self.labels):
            twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
            problems.add(f"data.labels names {', '.join(map(repr, twice))} more than once; name each label once.")
        if again := sorted({*self.rename_labels} & {*self.rename_labels.values()}):
            problems.add(f"data.rename_labels renames {again[0]!r}, and another label to it; name the last label for both.")
        if len(self.labels) == 1:
            problems.add(f"data.labels has only {self.labels[0]!r}; a classification needs at least two labels.")
        problems.raise_if_any()

    def _check_texts(self, problems: Problems) -> None:
        try:
            "a".encode(self.encoding)
        except (LookupError, UnicodeError):
            problems.add(f"data.encoding is {self.encoding!r}, which is no text encoding; expected a name such as cp1252.")
        if self.delimiter is not None and (len(self.separator_of_columns or "") != 1 or self.delimiter in '"\r\n'):
            problems.add(f"data.delimiter is {self.delimiter!r}; expected one character such as ';', or tab.")
        for name, template in (("template", self.template), ("label_template", self.label_template)):
            try:
                fields = template_fields(template)
            except ValueError as error:
                problems.add(f"data.{name} {template!r} cannot be read ({error}); write {{{{ and }}}} for literal braces.")
                continue
            if name == "template" and not fields:
                problems.add(f"data.template {template!r} names no column, so all prompts would be the same; use {{text}} in it.")
            if name == "label_template" and set(fields) != {"label"}:
                problems.add(f"data.label_template is {template!r}; expected {{label}} in it and no other field.")

    @property
    def separator_of_columns(self) -> str | None:
        """The delimiter as a character."""
        return "\t" if self.delimiter in ("tab", "\\t") else self.delimiter


def template_fields(template: str) -> list[str]:
    """Returns the column names in braces; ValueError for unbalanced braces or a field with a format."""
    fields = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not name:
            raise ValueError(f"'{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}' is not a column")
        fields.append(name)
    return fields


def fill_template(template: str, values: dict[str, str], free: str) -> tuple[str, tuple[int, int] | None]:
    """Returns the filled template and the span of the value of the field `free` in it (None if unused)."""
    parts: list[str] = []
    length = 0
    span: tuple[int, int] | None = None
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        length += len(literal)
        if name is not None:
            value = values[name]
            if name == free and span is None:
                span = (length, length + len(value))
            parts.append(value)
            length += len(value)
    return "".join(parts), span
