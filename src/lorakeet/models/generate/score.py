"""Summed log-probabilities of rows and labels, computed on packed rows, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from lorakeet.data.chat import Candidates, Example, Ids
from lorakeet.data.pack import Batch
from lorakeet.kernels.cpu.workspace import WORKSPACES
from lorakeet.models.text.model import TextModel, token_logprobs

Floats = NDArray[np.float64]
Progress = Callable[[int], None]  # called with the number of rows just done

HEAD_CHUNK = 256
TOGETHER = 512  # labels of several tokens that are put into batches at once


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

    A common ending of all labels (the end-of-turn token) is left out unless one label would then be a prefix of another. Labels
    of one token share one pass over the prompt. Longer ones are rows of their own, and what rows begin with is computed once a
    batch: the prompt for all labels of a row, or examples for many rows, whichever takes less.
    """
    text.model.eval()
    answers = [label_endings(text, row) for row in rows]
    scores = np.full((len(rows), len(rows[0].completions) if rows else 0), np.nan)
    short = [index for index, endings in enumerate(answers) if all(len(ending) == 1 for ending in endings)]
    prompts = [_example(rows[index].prompt, answers[index][0]) for index in short]
    for batch in _numbered_batches(text, prompts, micro_tokens):
        numbers = iter(short[int(key)] for key in batch.keys)
        for log_probs in log_probs_at_targets(text, batch, chunk):
            for row, index in zip(log_probs, numbers, strict=False):
                scores[index] = row[[int(ending[0]) for ending in answers[index]]].double().cpu().numpy()
        if progress is not None:
            progress(len(batch.lengths))
    left = sorted(set(range(len(rows))) - set(short))
    together = max(1, TOGETHER // max((len(answers[index]) for index in left), default=1))
    for start in range(0, len(left), together):
        group = left[start : start + together]
        examples = [_example(rows[index].prompt, ending) for index in group for ending in answers[index]]
        counted = None if progress is None else _by_row(progress, len(examples) // len(group))
        losses = row_losses(text, examples, micro_tokens=micro_tokens, chunk=chunk, progress=counted)[0]
        scores[group] = -losses.reshape(len(group), -1)
    return scores


def _by_row(progress: Progress, labels: int) -> Progress:
    """Counts rows of so many labels where single labels are done."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done // labels > before // labels:
            progress(done // labels - before // labels)

    return advance


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


def _example(prompt: Ids, ending: Ids) -> Example:
    supervised = np.zeros(len(prompt) + len(ending), bool)
    supervised[len(prompt) :] = True
    return Example(np.concatenate([prompt, ending]), supervised, "", None, False)


def log_probs_at_targets(text: TextModel, batch: Batch, chunk: int) -> Iterator[torch.Tensor]:
    """Yields log p over the vocabulary at each target, (chunk, vocabulary) at a time, without gradient."""
    with torch.no_grad():
        hidden = text.hidden(batch.to(text.device))
    for part in hidden.split(chunk):  # type: ignore[no-untyped-call]
        with torch.no_grad():
            log_probs = text.head(part).float().log_softmax(-1)
        yield log_probs
