"""What the check of a merged, exported or served model compares, and how much of it is in memory at once beside the models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakeet.core.plan import Plan
from lorakeet.data.chat import Candidates, Encoder, Example, Ids
from lorakeet.data.prepare import Dataset
from lorakeet.data.rows import Row
from lorakeet.errors import DataError
from lorakeet.evaluate.parity import CELLS
from lorakeet.export.llama_cpp import PASS, context_bytes
from lorakeet.export.merged_tensors import PART_BYTES
from lorakeet.models.generate.score import distinguishing
from lorakeet.models.text.load import load_tokenizer, read_config
from lorakeet.workflows.planning.forecast_text_run import filling_rows
from lorakeet.workflows.planning.rehearse_text import EvaluationSize, RowShape
from lorakeet.workflows.runs.open_adapter import Opened

FP32 = 4  # bytes
UNCHANGED, CHANGED = 3, 6  # of a stored matrix, as it is read and compared or written: without a change, and with one
ROW_LOGITS = 3  # tables of logits (tokens, vocabulary) at once: live, base and the artefact's
COMPARED = 10 * 8  # bytes for each of the CELLS logits that are compared at once, in fp64 (evaluate/parity)
MERGE_TOKENS = 2048  # of a micro-batch in the check of a merged model
GREEDY_TOKENS = 64  # of a greedy continuation
SAMPLED_TEXTS, SAMPLED_TOKENS = 16, 64  # that the base writes, where there are no held-out rows
FEWEST_TOKENS = 128  # of a row: a check of fewer says little
MARGIN = 16  # positions of llama.cpp's context beyond the longest row and its continuation
SERVERS = ("http://", "https://")


@dataclass(frozen=True)
class CheckSize:
    """What is compared with base + adapter, and how much of it is in memory at once, beside the models."""

    what: str  # such as "the check of a merged model"
    evaluation: EvaluationSize  # the largest batch, and the texts that the base writes
    models: int = 2  # in torch, base + adapter among them; the other side may be llama.cpp or a server
    row: int = 0  # positions of a row whose logits are in memory at once
    tensors: bool = False  # whether stored tensors are compared whole, also those that the adapter does not change
    writing: int = 0  # bytes in memory while the artefact is written
    beside: int = 0  # bytes that another program uses in this process
    waiting: int = 0  # bytes of the artefact's outputs, which wait on disk if models are streamed
    artefact: int = 0  # bytes of it on disk, if it is still to be written
    more_stores: int = 0  # beside one for each model, if they are streamed


def size_of_merge(longest: int, writing: int, texts: tuple[int, int] = (0, 0)) -> CheckSize:
    """What the check of a merged model takes, with rows of `longest` tokens or `texts` (count, tokens) that the base writes.

    `writing` is what writing the model takes, in bytes.
    """
    evaluation = EvaluationSize(filling_rows(longest, max(longest, MERGE_TOKENS)), *texts)
    return CheckSize("the check of a merged model", evaluation, writing=writing)


def size_of_check(
    opened: Opened, targets: Sequence[str], source: Path, what: str, *, rows: int, memory: int = 0, disk: int = 0,
    longest: int | None = None,
) -> CheckSize:  # fmt: skip
    """What comparing `rows` rows with `targets` takes: a second model in torch for a merged folder, llama.cpp's for a GGUF file.

    `memory` and `disk` are the bytes that writing them takes, if they are still to be written; of each row the first `longest`
    tokens are compared.
    """
    length, answers = _measured(opened, source, rows) if opened.run else (SAMPLED_TOKENS + 1, 0)
    length = (length if longest is None else min(length, longest)) + GREEDY_TOKENS
    files = [Path(target) for target in targets if not target.startswith(SERVERS)]
    folders = [file for file in files if not maps_a_file([str(file)])]
    llama, text = len(files) > len(folders), read_config(source).get_text_config()
    return CheckSize(
        what,
        EvaluationSize(RowShape(length), 1 if opened.run else SAMPLED_TEXTS, length if opened.run else SAMPLED_TOKENS),
        models=2 if folders else 1,
        row=min(length, PASS) if len(files) == len(targets) else length,
        tensors=bool(files),
        beside=context_bytes(text, length + MARGIN) if llama else 0,
        waiting=FP32 * ((rows + 1) * length + answers) * int(text.vocab_size) if files else 0,
        writing=memory,
        artefact=disk,
    )


def maps_a_file(targets: Sequence[str]) -> bool:
    """True if llama.cpp maps a file of one of these."""
    files = [Path(target) for target in targets if not target.startswith(SERVERS)]
    return any(not file.is_dir() or (file / "model.gguf").is_file() for file in files)


def compared_rows(dataset: Dataset, encoder: Encoder, rows: int) -> list[tuple[Row, Example]]:
    """The first `rows` held-out rows that are short enough. Raises DataError if none is."""
    chosen: list[tuple[Row, Example]] = []
    for row in dataset.held_out:
        example = encoder.encode(row)
        if example is not None and not example.truncated and len(chosen) < rows:
            chosen.append((row, example))
    if not chosen:
        raise DataError("Every held-out row is longer than data.max_tokens; raise --data.max_tokens or hold out other rows.")
    return chosen


def labelled_rows(dataset: Dataset, encoder: Encoder, chosen: Sequence[tuple[Row, Example]]) -> list[Candidates]:
    """The prompts and labels of those rows that have a label."""
    return [found for row, _ in chosen if dataset.labels and (found := encoder.candidates(row)) is not None]


def _measured(opened: Opened, source: Path, rows: int) -> tuple[int, int]:
    """Tokens of the longest held-out row that will be compared, and after how many positions the answers of labelled rows need
    logits; data.max_tokens and none without a budget.
    """
    if not opened.config.memory.limit:
        return opened.config.data.max_tokens, 0
    dataset, tokenizer = opened.dataset, load_tokenizer(opened.tokenizer or source)
    encoder = Encoder(tokenizer, opened.config.data, dataset.labels)
    chosen = compared_rows(dataset, encoder, rows)
    labelled = labelled_rows(dataset, encoder, chosen)
    return max(len(example.ids) for _, example in chosen), sum(positions_of_answer(row, tokenizer) for row in labelled)


def positions_of_answer(row: Candidates, tokenizer: Any) -> int:
    """After how many tokens choosing a label needs logits."""
    endings = distinguishing_endings(row, tokenizer)
    return 1 if all(len(ending) == 1 for ending in endings) else sum(len(ending) + 1 for ending in endings)


def distinguishing_endings(row: Candidates, tokenizer: Any) -> list[Ids]:
    """The tokens that tell each label from the others."""
    return distinguishing(row.completions, frozenset(int(number) for number in tokenizer.all_special_ids))


def adapted_bytes(plan: Plan, largest: int) -> int:
    """Bytes in fp32 of the largest matrix that the adapter changes; of a stack of experts, one of them.

    What is trained whole or in rows counts as the `largest` of the model, in numbers.
    """
    sizes = [math.prod(entry.shape[1:] if entry.kind == "experts" else entry.shape) for entry in plan.entries]
    return FP32 * max([*sizes, *(largest for _ in plan.extras)], default=0)


def tensor_peak(changed: int, largest: int) -> int:
    """Bytes of one stored tensor while it is made and written, or read and compared: in fp32 the largest that an adapter
    changes has `changed` bytes, and the largest of all `largest` numbers, of which a part is read at a time."""
    return max(CHANGED * changed, min(UNCHANGED * FP32 * largest, PART_BYTES))


def logits_bytes(row: int, vocabulary: int) -> int:
    """Bytes of logits while those after `row` tokens are compared: a table of each side, and copies of a part of two of
    them, or while the last side computes the tiles that its table is put together from."""
    table = row * vocabulary
    return FP32 * ROW_LOGITS * table + max(COMPARED * min(CELLS, table), FP32 * table)
