"""What the screen Data shows of a run's rows: how they are read, the tokens that are trained, leaks, the split, and lengths.

Imports torch: it is carried out by the workbench alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np

from lorakeet.config import RunConfig, read_run
from lorakeet.data.chat import Encoder, Example
from lorakeet.data.leaks import KINDS, LeakPair, LeakReport, counted_once
from lorakeet.data.locate import WORKBOOKS, locate_data
from lorakeet.data.prepare import Dataset, label_counts, load_dataset
from lorakeet.data.proposals.columns import SAMPLED, overlooked_label, possible_labels, propose_columns
from lorakeet.data.proposals.labels import merges
from lorakeet.data.read import all_problems, read_records
from lorakeet.data.rows import Row
from lorakeet.data.shapes import columns_used
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.data.workbook import sheet_names, sheets_note
from lorakeet.errors import DataError, EnvironmentProblem, Remedy, percent
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.planning.encoded_rows import EncodedRows
from lorakeet.registry import function_at
from lorakeet.runs.remarks import Remark, remarks_on
from lorakeet.studio.local import require_local_rows, unready_model
from lorakeet.studio.remedies import one_click, page_words, remedies_together
from lorakeet.studio.workbench import Send

MOST_LABELS = 30  # with a bar
FIRST, PAIRS, COUNTED = 5, 60, 4000  # rows, pairs, rows whose lengths are counted, that are shown
ALL_MEASURED = "they stay, and each is measured"  # of compared answers
REPEATED = "exact copies among measured rows are measured once; repeated training rows count twice"
BARS = 24
NO_MODEL = "none"
_LONGEST = 4000  # characters of a text that a page shows


def show_rows_of(settings: Mapping[str, str], send: Send) -> None:
    """Reads the rows of `settings` as a run would, and sends each part as soon as it is known.

    Parts: sheets (of a workbook), first (records and columns), columns (what they become), split (counts, labels, leaks), tokens
    (rows as the model sees them), lengths. A kind with a page of its own sends its own parts. Raises what a run would raise;
    what is known before that was sent.
    """
    config = read_run(None, {"model.path": NO_MODEL, **settings})
    require_local_rows(config.data)
    with quiet_transformers():
        if not (page := config.declaration.rows_page):
            _show_text(config, send)
            return
        function_at(page)(config, lambda part: send(_in_page_words(part)))


def _in_page_words(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, "remarks": [page_words(line) for line in part["remarks"]]} if "remarks" in part else part


def _show_text(config: RunConfig, send: Send) -> None:
    data, registered = config.data, config.train.registered
    if (found := sheet_values(data.train))["sheets"]:
        send({"part": "sheets", **found})
    with all_problems(data.train, data, registered):
        records = list(islice(read_records(data.train, RowProblems(data.train), data), SAMPLED))
        send({"part": "first", **first_values(records[:FIRST])})
        if not records:
            raise DataError(f"{data.train} has no rows; expected at least one record below the header.")
        try:
            shape, used = columns_used(records[0], data.train, data, registered)
        except DataError as error:
            given: dict[str, str | None] = {"text": data.text_column, "label": data.label_column}
            proposal = propose_columns(records, given)
            error.remedies = error.remedies or (proposal.remedies if proposal else ())
            raise
    send({"part": "columns", "shape": shape, "used": used, **label_values(records, used, data)})
    send({"say": "Reads all rows"})
    dataset = load_dataset(data, registered, say=lambda line: send({"say": line}))
    remarks = remarks_on(dataset, data, few_shot=config.evaluate.examples > 0)
    send({"part": "split", **split_values(dataset, remarks, data)})
    if config.model.path == NO_MODEL:
        return
    if why := unready_model(config):
        raise EnvironmentProblem(f"{why} Until then rows are shown without their tokens.")
    send({"say": "Makes tokens of the rows"})
    encoded = EncodedRows(config, (dataset.train, dataset.held_out), dataset.labels, lambda line: send({"say": line}))
    send({"part": "tokens", "rows": [values for row in dataset.train[:FIRST] if (values := row_values(row, encoded.encoder))]})
    every = (*dataset.train, *dataset.held_out, *dataset.test)
    send({"part": "lengths", **length_values(every, encoded.encoder)})


def label_values(records: Sequence[FileRecord], used: Mapping[str, str], data: DataSpec) -> dict[str, Any]:
    """What one click makes the label of rows that are read as plain texts, and what to ask before it."""
    beside = {*used, data.group_column or ""}
    found = [] if "text" not in used.values() else possible_labels(records, beside)
    text = Remedy("data.text_column", data.text_column, f"{data.text_column!r} is the text")
    if other := overlooked_label(records, beside) if "text" in used.values() else None:
        says = f"Is {other.value!r} what the model should learn to name? As it is, it learns to write the texts."
        return {"says": says, "remedies": remedies_together([text, other])[:1]}
    says = "What should the model learn to name? As it is, it learns to write the texts." if found else ""
    return {"says": says, "remedies": [one_click({one.setting: one.value, text.setting: text.value}, one.words) for one in found]}


def first_values(records: Sequence[FileRecord]) -> dict[str, Any]:
    """The first records as they are in the file."""
    columns = list(dict.fromkeys(column for record in records for column in record.values))
    rows = [
        {"source": record.source, "cells": [_shortened(record.values.get(column)) for column in columns]} for record in records
    ]
    return {"columns": columns, "rows": rows}


def sheet_values(name: str) -> dict[str, Any]:
    """The sheets of a workbook, each with the name of the rows in it, and the one that is read; none of other files."""
    file = name.partition("#")[0]
    names, chosen = sheet_names(locate_data(name)) if file.lower().endswith(WORKBOOKS) else ([], "")
    return {"sheets": [[sheet, f"{file}#{sheet}"] for sheet in names], "chosen": chosen}


def split_values(dataset: Dataset, remarks: Sequence[Remark], data: DataSpec) -> dict[str, Any]:
    """How the rows are split, their labels, every pair of copies with both rows, and `remarks` with what one click sets."""
    report, rows = dataset.leaks, data.train
    counts = label_counts((*dataset.train, *dataset.held_out, *dataset.test), dataset.labels)
    dropped = {row.source for row in report.dropped}
    chosen_above = sheets_note(rows)  # the sheet has a menu
    within = sorted(report.within, key=_contradicts, reverse=True)  # what needs a decision comes first
    preferred = any(pair.row.rejected or pair.row.desirable is not None for pair in report.within)
    return {
        "counts": {"training": len(dataset.train), "held-out": len(dataset.held_out), "test": len(dataset.test)},
        "labels": [[label, count] for label, count in Counter(dataset.label_counts).most_common(MOST_LABELS)],
        "all_labels": len(dataset.labels),
        "merges": [remedies_together([one])[0] for one in merges(counts, data.rename_labels)],
        "measured": len(dataset.test or dataset.held_out) if preferred else len(counted_once(dataset.test or dataset.held_out)),
        "notes": [
            *({"words": words, "remedies": []} for words in unmeasured_labels(dataset)),
            *({"words": page_words(note, rows), "remedies": []} for note in dataset.notes if note != chosen_above),
            *(
                {"words": page_words(one.words, rows, one.remedies), "remedies": remedies_together(one.remedies)}
                for one in remarks
            ),
        ],
        "method": page_words(report.method()),
        "leaks": len(report.across),
        "dropped": len(report.dropped),
        "near": near_values(report),
        "repeats": len(report.within),
        "repeated": ALL_MEASURED if preferred else REPEATED,
        "contradicted": sum(map(_contradicts, report.within)),
        "pairs": [pair_values(pair, dropped) for pair in (*report.across, *within)[:PAIRS]],
        "all": len(report.pairs),
    }


def near_values(report: LeakReport) -> dict[str, Any]:
    """What to say of near-copies that are left out, or not searched, and what one click makes of them."""
    path = "data.near_duplicates"
    if not report.threshold:
        again = one_click({path: ""}, "Search near-copies again")
        return {"says": "Near-copies are not searched, and kept.", "remedies": [again]}
    gone = {pair.row.source for pair in report.across if pair.kind == "near"} & {row.source for row in report.dropped}
    says = f"{len(gone):,} {'differs' if len(gone) == 1 else 'differ'} from another row in a word or two." if gone else ""
    return {"says": says, "remedies": [one_click({path: "0"}, f"Keep near-copies ({len(gone):,})")] if gone else []}


def unmeasured_labels(dataset: Dataset) -> list[str]:
    """A sentence where labels have no row to measure on."""
    measured = {row.label for row in dataset.test or dataset.held_out}
    absent = [label for label in dataset.labels if label not in measured]
    if not absent or not measured:
        return []
    named = ", ".join(f"“{label:.60}”" for label in absent[:8]) + (f" and {len(absent) - 8:,} more" if absent[8:] else "")
    return [f"No row to measure on has the label {named}: the verdict will say nothing of it."]


def _contradicts(pair: LeakPair) -> bool:
    """True for two labelled rows of one text whose labels differ: one of them is wrong."""
    return pair.kind == "prompt" and pair.row.label is not None


def pair_values(pair: LeakPair, dropped: set[str]) -> dict[str, Any]:
    """Two rows that are alike: where they are, how alike, and both texts around their first difference."""
    one, other = pair.excerpts()
    leak = pair.row_part != pair.twin_part
    if leak:
        fate = f"the first is left out of {pair.row_part}" if pair.row.source in dropped else "both are kept"
    else:
        gone = [row.source for row in (pair.row, pair.twin) if row.source in dropped]
        fate = f"{' and '.join(gone)} {'are' if gone[1:] else 'is'} left out for a leak" if gone else "both are kept"
    return {
        "kind": KINDS[pair.kind] + (f", {percent(pair.similarity, 0)} alike" if pair.kind == "near" else ""),
        "leak": leak,
        "fate": fate,
        "rows": [
            {"part": pair.row_part, "source": pair.row.source, "text": one},
            {"part": pair.twin_part, "source": pair.twin.source, "text": other},
        ],
    }


def row_values(row: Row, encoder: Encoder) -> dict[str, Any] | None:
    """One row as the model sees it: pieces of text, each with whether it is trained; None for one that is left out."""
    example = encoder.encode(row)
    if example is None:
        return None
    pieces = token_pieces(example, encoder)
    targets = int(example.supervised.sum())
    return {"source": row.source, "pieces": pieces, "tokens": len(example.ids), "trained": targets, "cut": example.truncated}


def token_pieces(example: Example, encoder: Encoder) -> list[list[Any]]:
    """The text of each stretch of tokens that are all trained, or all not."""
    borders = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1).tolist(), len(example.ids)]
    decode = partial(encoder.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [
        [str(decode(example.ids[start:end].tolist()))[:_LONGEST], bool(example.supervised[start])]
        for start, end in pairwise(borders)
    ]


def length_values(rows: Sequence[Row], encoder: Encoder) -> dict[str, Any]:
    """A histogram of the rows' tokens before they are shortened, with data.max_tokens; of many rows some are counted."""
    each = -(-len(rows) // COUNTED)
    counted = rows[::each]
    lengths = np.array([encoder.tokens_of(row) for row in counted])
    limit = encoder.spec.max_tokens
    high = int(max(lengths.max(), 1))
    width = _round_width(high)
    counts = np.bincount((lengths - 1) // width, minlength=1)
    bars = [[place * width + 1, (place + 1) * width, int(count)] for place, count in enumerate(counts)]
    longer = int((lengths > limit).sum())
    return {
        "bars": bars, "limit": limit, "counted": len(counted), "rows": len(rows), "longer": longer,
        "median": int(np.median(lengths)), "longest": high, "too_long": encoder.spec.too_long,
    }  # fmt: skip


def _round_width(high: int) -> int:
    """A round width of a bar, by which at most BARS of them reach `high`."""
    least = max(1, -(-high // BARS))
    size = int(10 ** (len(str(least)) - 1))
    factors = (factor for factor in (1, 2, 5) if factor * size >= least)
    return size * next(factors, 10)


def _shortened(value: object) -> str:
    text = "" if value is None else value if isinstance(value, str) else repr(value)
    return text if len(text) <= 300 else f"{text[:300]} …"
