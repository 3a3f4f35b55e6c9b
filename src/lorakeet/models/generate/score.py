"""Summed log-probabilities of rows and labels, computed on packed rows, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from lorakeet.data.chat import Candidates, Example, Ids
from lorakeet.data.pack import Batch
from lorakeet.kernels.cpu.workspace import WORKSPACES
from lorakeet.kernels.host_copies import together_on
from lorakeet.models.text.model import TextModel, token_logprobs

Floats = NDArray[np.float64]
Progress = Callable[[int], None]  # called with the number of rows just done

HEAD_CHUNK = 256
TOGETHER = 512  # branches of labels that are put into batches at once, where rows have several


def row_losses(
    text: TextModel, rows: Sequence[Example], *, micro_tokens: int, chunk: int = HEAD_CHUNK, progress: Progress | None = None
) -> tuple[Floats, Floats]:
    """Returns −Σ log p over the targets of each row (rows,), in the order of `rows`, and their number (rows,)."""
    text.model.eval()
    WORKSPACES.release()  # frees the buffers of a training step for the logits
    sums, weights = np.zeros(len(rows)), np.zeros(len(rows))
    for batch in _numbered_batches(text, rows, micro_tokens):
        losses = -token_logprobs(text, batch.to(text.device), chunk=chunk).double().cpu().numpy()
        row_of_target, count = batch.target_rows.cpu().numpy(), len(batch.lengths)
        numbers = [int(key) for key in batch.keys]
        sums[numbers] = np.bincount(row_of_target, weights=losses, minlength=count)
        weights[numbers] = np.bincount(row_of_target, minlength=count)
        if progress is not None:
            progress(count)
    return sums, weights


def scored_rows(
    text: TextModel, rows: Sequence[Example], *, micro_tokens: int, chunk: int = HEAD_CHUNK
) -> tuple[Floats, NDArray[np.bool_]]:
    """Returns Σ log p over the targets of each row (rows,), and whether each of them is the likeliest token (rows,)."""
    text.model.eval()
    WORKSPACES.release()
    sums, likeliest = np.zeros(len(rows)), np.ones(len(rows), np.bool_)
    for batch in _numbered_batches(text, rows, micro_tokens):
        row_of_target, targets = batch.target_rows.cpu().numpy(), batch.target_ids.cpu()
        numbers, at = [int(key) for key in batch.keys], 0
        for log_probs in log_probs_at_targets(text, batch, chunk):
            ids = targets[at : at + len(log_probs)].to(log_probs.device)
            own = log_probs.gather(1, ids[:, None])[:, 0].double().cpu().numpy()
            equal = (log_probs.argmax(1) == ids).cpu().numpy()
            for place, score, same in zip(row_of_target[at : at + len(ids)], own, equal, strict=True):
                sums[numbers[place]] += score
                likeliest[numbers[place]] &= same
            at += len(ids)
    return sums, likeliest


def label_scores(
    text: TextModel, rows: Sequence[Candidates], *, micro_tokens: int, chunk: int = HEAD_CHUNK, progress: Progress | None = None
) -> Floats:
    """Returns log p(label | prompt) of every label of every row (rows, labels), summed over the label's tokens.

    A common ending of all labels (the end-of-turn token) is left out unless one label would then be a prefix of another. Of a
    label all tokens but the last are computed, and labels that begin alike, or have one token, are read from the same row. What
    rows begin with is computed once a batch: the prompt for all labels of a row, or examples for many rows, whichever takes less.
    """
    text.model.eval()
    WORKSPACES.release()
    branches = [label_branches(label_endings(text, row)) for row in rows]
    scores = np.zeros((len(rows), len(rows[0].completions) if rows else 0))
    single = [index for index, each in enumerate(branches) if len(each) == 1]
    several = [index for index, each in enumerate(branches) if len(each) > 1]
    together = max(1, TOGETHER // max((len(branches[index]) for index in several), default=1))
    groups = [single, *(several[start : start + together] for start in range(0, len(several), together))]
    for group in groups:
        flat = [(index, branch) for index in group for branch in branches[index]]
        examples = [_example(rows[index].prompt, branch) for index, branch in flat]
        left = {index: len(branches[index]) for index in group}
        for batch in _numbered_batches(text, examples, micro_tokens):
            own = [flat[int(key)] for key in batch.keys]
            reads = [(index, read) for index, branch in own for read in branch.reads.values()]
            numbers = iter(reads)
            for log_probs in log_probs_at_targets(text, _without_last(batch), chunk):
                _add_read(log_probs, list(islice(numbers, len(log_probs))), scores)
            for index, _ in own:
                left[index] -= 1
                if progress is not None and not left[index]:
                    progress(1)
    return scores


def _add_read(log_probs: torch.Tensor, reads: Sequence[tuple[int, tuple[list[int], list[int]]]], scores: Floats) -> None:
    """Adds what is read from `log_probs` (n, vocabulary) to `scores` (rows, labels): for each of n a row, labels, and tokens.
    One copy comes from a GPU."""
    owners, labels, places, tokens = np.array(
        [
            (owner, label, place, token)
            for place, (owner, each) in enumerate(reads)
            for label, token in zip(*each, strict=True)
        ],
        np.int64,
    ).T
    found = log_probs[tuple(together_on((places, tokens), log_probs.device))]
    np.add.at(scores, (owners, labels), found.double().cpu().numpy())


@dataclass(frozen=True)
class LabelBranch:
    """Tokens that follow a prompt, and what is read behind it: `reads[n]` after n of them, labels and the next token of each."""

    ids: tuple[int, ...]
    reads: dict[int, tuple[list[int], list[int]]]


def label_branches(endings: Sequence[Ids]) -> tuple[LabelBranch, ...]:
    """The fewest branches from which every token of every ending is read, each once; one without tokens if all have one."""
    return _branches(tuple(tuple(ending.tolist()) for ending in endings))


@lru_cache(maxsize=64)
def _branches(endings: tuple[tuple[int, ...], ...]) -> tuple[LabelBranch, ...]:
    paths = sorted({ending[:-1] for ending in endings})
    kept = [path for path, after in zip(paths, [*paths[1:], None], strict=True) if after is None or path != after[: len(path)]]
    reads: list[dict[int, tuple[list[int], list[int]]]] = [{} for _ in kept]
    for label, ending in enumerate(endings):
        for depth, token in enumerate(ending):
            owner = next(number for number, path in enumerate(kept) if path[:depth] == ending[:depth])
            labels, tokens = reads[owner].setdefault(depth, ([], []))
            labels.append(label)
            tokens.append(token)
    return tuple(LabelBranch(path, dict(sorted(of.items()))) for path, of in zip(kept, reads, strict=True))


def label_endings(text: TextModel, row: Candidates) -> list[Ids]:
    """The tokens of each label that are scored, as `distinguishing` leaves them."""
    return distinguishing(row.completions, frozenset(int(number) for number in text.tokenizer.all_special_ids))


def distinguishing(completions: Sequence[Ids], ends: frozenset[int]) -> list[Ids]:
    """Returns the completions without special tokens at the end of all, unless one would then be a prefix of another."""
    shared = 0
    shortest = min(len(completion) for completion in completions)
    while shared < shortest - 1 and _ending_of_all(completions, shared) & ends:
        shared += 1
    for cut in range(shared, 0, -1):
        endings = [completion[: len(completion) - cut] for completion in completions]
        if not any(
            one is not other and len(one) <= len(other) and np.array_equal(one, other[: len(one)])
            for one in endings
            for other in endings
        ):
            return endings
    return list(completions)


def _ending_of_all(completions: Sequence[Ids], back: int) -> frozenset[int]:
    """Returns the token that all completions have `back` positions before their last one; empty if they differ."""
    found = frozenset(int(completion[-1 - back]) for completion in completions)
    return found if len(found) == 1 else frozenset()


def _numbered_batches(text: TextModel, rows: Sequence[Example], micro_tokens: int) -> list[Batch]:
    """Returns micro-batches whose keys are the rows' numbers, since packing changes the order."""
    return text.micro_batches([replace(row, key=str(number)) for number, row in enumerate(rows)], micro_tokens)


def _example(prompt: Ids, branch: LabelBranch) -> Example:
    """The prompt and the branch with one token more, which stands for all that may be next."""
    ids = np.concatenate([prompt, np.array([*branch.ids, prompt[-1]], np.int64)])
    supervised = np.zeros(len(ids), bool)
    supervised[[len(prompt) + depth for depth in branch.reads]] = True
    return Example(ids, supervised, "", None, False)


def _without_last(batch: Batch) -> Batch:
    """The batch without each row's last token, behind which nothing is read."""
    ids, positions, targets = batch.on_host()
    ends = np.cumsum(batch.lengths) - 1
    kept = np.ones(len(ids), bool)
    kept[ends] = False
    numbers = ids[kept], positions - np.searchsorted(ends, positions), targets
    tokens, places, wanted = (torch.from_numpy(each) for each in numbers)
    return Batch(tokens, tuple(length - 1 for length in batch.lengths), places, wanted, batch.keys, numbers)


def log_probs_at_targets(text: TextModel, batch: Batch, chunk: int) -> Iterator[torch.Tensor]:
    """Yields log p over the vocabulary at each target, (chunk, vocabulary) at a time, without gradient."""
    with torch.no_grad():
        hidden = text.hidden(batch.to(text.device))
    for part in hidden.split(chunk):  # type: ignore[no-untyped-call]
        with torch.no_grad():
            log_probs = text.head(part).float().log_softmax(-1)
        yield log_probs
