"""The rows of a run as tokens, before its model is loaded: a plan needs their lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.data.chat import Encoded, Encoder, encode_rows
from lorakeet.data.locate import state_of_data
from lorakeet.data.pairs import encode_pairs
from lorakeet.data.prepare import find_labels, load_dataset
from lorakeet.data.read import is_absent, read_rows
from lorakeet.data.rows import Row
from lorakeet.data.spec import NO_ROWS
from lorakeet.errors import DataError
from lorakeet.memory.remembered import keep, recall, state_of
from lorakeet.models.files.source import bytes_to_unpack, find_source
from lorakeet.models.text.from_config import local_files
from lorakeet.models.text.load import load_tokenizer, read_config
from lorakeet.models.text.model import context_of
from lorakeet.planning.forecast_text_run import RowLengths, Workload
from lorakeet.runs.remarks import remarks_on

Say = Callable[[str], None]
MOST_COMPARED = 20_000  # rows; to search so many for copies takes some seconds


class EncodedRows:
    """Rows in `parts`, the training rows first, encoded by the tokenizer of the run's model when they are first needed.

    `model` is the configuration and the folder of the model; left out, they are found. Raises DataError for rows that cannot be
    encoded.
    """

    def __init__(
        self, config: RunConfig, parts: Sequence[Sequence[Row]], labels: Sequence[str], say: Say,
        model: tuple[Any, Path] | None = None,
    ) -> None:  # fmt: skip
        self.given, self.rows, self.labels, self.say, self.model = config, parts, labels, say, model

    @cached_property
    def _files(self) -> tuple[Any, Path]:
        source = find_source(self.given.model, self.say) if self.model is None else self.model[1]
        return (read_config(source), source) if self.model is None else self.model

    @cached_property
    def config(self) -> RunConfig:
        """The settings with data.max_tokens at most the model's context length; says if it was lowered."""
        return within_context(self.given, self.given.model.path, context_of(self._files[0]), self.say)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, with the tokens that the run adds."""
        found = load_tokenizer(self._files[1])
        found.add_tokens(list(self.given.lora.new_tokens), special_tokens=True)
        return found

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.config.data, self.labels)

    @cached_property
    def parts(self) -> tuple[Encoded, ...]:
        """Each part as tokens; rows with two answers give two examples, the chosen one first."""
        encode = encode_rows if self.given.train.registered.answers == 1 else encode_pairs
        return tuple(encode(rows, self.encoder) for rows in self.rows)

    def lengths(self) -> RowLengths:
        """Tokens of the longest row of any part, of the longest training rows that a step can have, and of all training rows."""
        return lengths_of(*self.measured(), self.given.train.sequences)

    def measured(self) -> tuple[int, list[int]]:
        """Tokens of the longest row of any part, with any answer, and of each training row, the longest first."""
        train = sorted((len(example.ids) for example in self.parts[0].examples), reverse=True)
        return self.encoder.longest(example for part in self.parts for example in part.examples), train

    def workload(self, members: int = 1) -> Workload:
        """What is known of these rows, for `members` adapters in training at once."""
        characters = sum(len(row.text) for rows in self.rows for row in rows)
        return Workload(bool(self.labels), characters, members, lengths=self.lengths)


def lengths_of(longest: int, train: Sequence[int], sequences: int, *, exact: bool = True) -> RowLengths:
    """The lengths of training rows, the longest first, for steps of so many `sequences`; `longest` is of any part."""
    return RowLengths(longest, max(longest, sum(train[:sequences])), len(train), sum(train), exact)


def workload_of_files(config: RunConfig, model_config: Any, say: Say) -> Workload:
    """What is known of the rows of data.train, data.held_out and data.test, for `lorakeet plan`: prepared as a run prepares them,
    except that copies are not searched among more than MOST_COMPARED rows, which is said.

    Nothing where data.train names none, or, which is said, where rows or the tokenizer are not on this machine.
    """
    data = config.data
    if data.train in ("", NO_ROWS):
        return Workload()
    if absent := next((name for name in (data.train, data.held_out, data.test) if name and is_absent(name)), None):
        say(
            f"{absent} is not on this machine, so the run's rows are not counted: each is planned with data.max_tokens, "
            f"{data.max_tokens}."
        )
        return Workload()
    source = _tokenizer_folder(config, say)
    if source is None:
        say(
            f"The tokenizer of {config.model.path} is not on this machine, so the rows of {data.train} are not counted: each is "
            f"planned with data.max_tokens, {data.max_tokens}."
        )
        return Workload()
    keys = _keys(config, source)
    for key in keys:
        if (found := recall(key)) is not None and (key == keys[1] or found[1] <= data.max_tokens):
            labelled, longest, train_lengths, characters, said, refused, exact = found
            for line in said:
                say(line)
            given = partial(lengths_of, longest, train_lengths, config.train.sequences, exact=exact)
            return Workload(labelled, characters, lengths=given, absent=True, refused=refused)
    parts, labels, said, refused, exact = _prepared(config)
    for line in said:
        say(line)
    encoded = EncodedRows(config, parts, labels, say, (model_config, source))
    workload = encoded.workload()

    def lengths() -> RowLengths:
        longest, rows = encoded.measured()
        key = keys[longest >= encoded.config.data.max_tokens] if keys else None
        if key is not None and recall(key) is None:
            keep(key, (workload.labelled, longest, rows, workload.characters, said, refused, exact))
        return lengths_of(longest, rows, config.train.sequences, exact=exact)

    return replace(workload, lengths=lengths, refused=refused)


def _prepared(config: RunConfig) -> tuple[Sequence[Sequence[Row]], tuple[str, ...], list[str], str, bool]:
    """The parts of the rows, the labels, what a dry run says of them, why no run starts with them, and if copies were searched.

    Rows with which no run starts are in one part, as they are in their files.
    """
    data, registered = config.data, config.train.registered
    try:
        dataset = load_dataset(data, registered, most_compared=MOST_COMPARED)
    except DataError as error:
        notes: list[str] = []
        names = [name for name in (data.train, data.held_out, data.test) if name]
        parts = [registered.taken(read_rows(name, data, notes, registered), name, trained=name == data.train) for name in names]
        return parts, find_labels(parts[0], data), notes, str(error), True
    said = [*dataset.notes, *(remark.words for remark in remarks_on(dataset, data, few_shot=config.evaluate.examples > 0))]
    if not (exact := bool(dataset.leaks.searched)):
        said.append(f"More than {MOST_COMPARED:,} rows: a run leaves out copies of measured rows, which are not searched here.")
    return (dataset.train, dataset.held_out, dataset.test), dataset.labels, said, "", exact


def _keys(config: RunConfig, source: Path) -> tuple[str, ...]:
    """Under which lengths of rows are kept of which none is cut, and those that are cut to data.max_tokens.

    Empty where nothing says whether a file of rows has changed: then none are kept.
    """
    data = config.data
    files = [state_of_data(name) for name in (data.train, data.held_out, data.test)]
    if None in files:
        return ()
    settings = replace(data, max_tokens=1), config.lora.new_tokens, config.train.registered.name, config.evaluate.examples > 0
    parts = files, state_of(source), *settings
    return f"rows {parts!r}", f"rows {parts!r} {data.max_tokens}"


def _tokenizer_folder(config: RunConfig, say: Say) -> Path | None:
    """The folder of a tokenizer that can be loaded here, without fetching or unpacking a model; None if there is none."""
    local = local_files(config.model.path)
    if local is None or bytes_to_unpack(config.model):
        return None
    source = local if local.is_dir() else find_source(config.model, say)
    try:
        load_tokenizer(source)
    except DataError:
        return None
    return source


def within_context(config: RunConfig, name: str, limit: int | None, say: Say) -> RunConfig:
    """The settings with data.max_tokens at most `limit`, the context of the model `name`; says if it was lowered."""
    requested = config.data.max_tokens
    if limit is None or requested <= limit:
        return config
    say(f"data.max_tokens is {requested}, but {name} takes rows of at most {limit} tokens; {limit} is used.")
    return config.changed(data={"max_tokens": limit})
