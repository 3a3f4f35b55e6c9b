"""The checks of one artefact against the live adapter: prompts, logits, answers, greedy texts, and every stored weight."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorakeet.data.chat import Candidates, Ids
from lorakeet.data.template import decoded
from lorakeet.evaluate.certificate import Check, tolerance_check
from lorakeet.evaluate.intervals import Floats, share
from lorakeet.evaluate.parity import ParityMeter
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.merged_tensors import StoredTensor
from lorakeet.exporting.tolerances import Allowed
from lorakeet.memory.spill import Spill
from lorakeet.models.generate.sample import end_ids
from lorakeet.planning.check import GREEDY_TOKENS, distinguishing_endings
from lorakeet.runs.open_adapter import Opened
from lorakeet.train.progress import Count, uncounted
from lorakeet.verification.artefact import Artefact, InTorch, Messages
from lorakeet.verification.probes import Probes

_SWALLOWED = 1.5  # rounding so many times larger than the change, and no larger than it has to be, is no mistake
_SIGMA = 5  # of what rounding alone explains


def check_prompts(live: InTorch, artefact: Artefact, probes: Probes) -> Check:
    """Whether the artefact reads conversations and raw texts as the same ids; the detail names the first that differs."""
    pairs: list[tuple[list[int], list[int], str]] = []
    for messages, ids in probes.conversations:
        theirs = artefact.prompt(messages)
        pairs.append((ids.tolist(), [] if theirs is None else theirs, "prompt"))
    pairs += [(live.tokenise(text), artefact.tokenise(text), "raw text") for text in probes.texts]
    return check_ids(live, artefact.name, pairs)


def named_check(
    what: str, names: tuple[str, str], measured: Mapping[str, float], tolerance: Mapping[str, float], *, n: int,
    detail: str = "", floors: tuple[str, ...] = (),
) -> Check:  # fmt: skip
    """A check of the second of `names`, which it is called by, against the first; as `tolerance_check`."""
    named = f"{names[1]}: {what}"
    return tolerance_check(named, measured, tolerance=tolerance, between=names, n=n, detail=detail, floors=floors)


def check_ids(live: InTorch, name: str, pairs: Sequence[tuple[list[int], list[int], str]]) -> Check:
    """The check of (ids here, ids there, what was encoded), with a sentence on the first that differ."""
    wrong, detail = 0, ""
    for ours, theirs, what in pairs:
        if ours != theirs:
            wrong += 1
            detail = detail or first_difference(live, ours, theirs, what)
    measured, allowed = {"different_prompts": float(wrong)}, {"different_prompts": 0.0}
    return named_check("prompt ids", (live.name, name), measured, allowed, n=len(pairs), detail=detail)


def first_difference(live: InTorch, ours: Sequence[int], theirs: Sequence[int], what: str) -> str:
    """A sentence on where two lists of ids part, and what is the likely cause."""
    bos = live.text.tokenizer.bos_token_id
    if list(theirs) == [bos, *ours]:
        return f"The artefact puts a begin token (id {bos}) before a {what} that training did not have: BOS is doubled or added."
    if list(ours) == [bos, *theirs]:
        return f"The artefact leaves out the begin token (id {bos}) that training put before a {what}."
    if not theirs:
        return "The artefact has no chat template, and training used one."
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [_shown(live, list(ids[place : place + 4])) for ids in (ours, theirs)]
    cause = "the chat template or the pre-tokenizer differs" if what == "prompt" else "the pre-tokenizer differs"
    return f"A {what} parts at token {place}: {shown[0]} here, {shown[1]} there. Likely cause: {cause}."


def _shown(live: InTorch, ids: list[int]) -> str:
    """The text of ids; the ids themselves where one is of no token."""
    known = range(len(live.text.tokenizer))
    return repr(decoded(live.text.tokenizer, ids)) if all(one in known for one in ids) else f"ids {ids}"


def check_logits(
    live: InTorch, artefact: Artefact, probes: Probes, spec: EvaluateSpec, count: Count = uncounted
) -> Check:
    """Logits on the same ids of whole held-out rows, and how much of the adapter's own effect the difference is."""
    base = InTorch(live.text, None, "base")
    meter, effect = ParityMeter(), ParityMeter()
    with count(f"{artefact.name}: logits of rows", len(probes.rows)) as done:
        for number, ids in enumerate(probes.rows):
            row, following = ids.tolist(), torch.from_numpy(ids[1:])
            sides = [side.logit_parts(row) for side in (live, artefact, base)]
            while tokens := _add_part(sides, following, number, (meter, effect)):
                following = following[tokens:]
            done(1)
    evaluated = effect.result(spec) if math.isfinite(artefact.allowed.parity.effect) else None
    return meter.result(spec).check(
        f"{artefact.name}: logits", artefact.allowed.parity, between=(live.name, artefact.name), base=evaluated
    )


def _add_part(
    sides: Sequence[Iterator[torch.Tensor]], following: torch.Tensor, text: int, meters: tuple[ParityMeter, ParityMeter]
) -> int:
    """Enters the next part of the logits of live, artefact and base, and returns its tokens: 0 at the end of the row.

    A part is freed before the next is computed, so that one table of each side is in memory at a time.
    """
    parts = [part for side in sides if (part := next(side, None)) is not None]
    if not parts:
        return 0
    if len(parts) < len(sides):
        raise ValueError("one side gave the logits of fewer tokens of a row than another")
    targets = following[: len(parts[0])]
    if len(targets):  # nothing follows the last token
        ours, theirs, before = (part[: len(targets)] for part in parts)
        width = min(ours.shape[1], theirs.shape[1])  # a file may pad its vocabulary
        meters[0].add(ours[:, :width], theirs[:, :width], targets=targets, texts=text)
        meters[1].add(ours, before, targets=targets, texts=text)
    return len(parts[0])


def compare_labels(
    names: tuple[str, str],
    answers: tuple[list[int], list[int]],
    rows: Sequence[Candidates],
    allowed: Allowed,
    spec: EvaluateSpec,
    *,
    undecided: Sequence[bool] = (),
) -> Check:
    """What the live adapter and another side answered (numbers of labels, -1 for none), against each other and the truth.

    Rows on which the live adapter is `undecided` between both answers do not count as different.
    """
    ours, theirs = map(np.array, answers)
    truth = np.array([-2 if row.label is None else row.label for row in rows])  # which no answer is
    close = np.array(undecided or [False] * len(truth)) & (ours != theirs)
    different = {"different_answers": float(((ours != theirs) & ~close).mean())}
    detail = f"{close.sum()} more differ where the live adapter is undecided within {allowed.gap:.2g} nats."
    detail = detail if close.any() else ""
    check = named_check("answers", names, different, {"different_answers": allowed.metric}, n=len(truth), detail=detail)
    accuracies = {"accuracy_live": share(ours == truth, spec=spec), "accuracy_there": share(theirs == truth, spec=spec)}
    return replace(check, estimates=accuracies)


def answer(side: Artefact, row: Candidates, live: InTorch) -> int:
    """The likeliest label: Σ log p over what distinguishes each label's tokens."""
    return int(scores_of_labels(side, row, live).argmax())


def scores_of_labels(side: Artefact, row: Candidates, live: InTorch) -> Floats:
    """Σ log p over the tokens that tell each label from the others (labels,)."""
    endings = distinguishing_endings(row, live.text.tokenizer)
    prompt = row.prompt.tolist()
    if all(len(ending) == 1 for ending in endings):
        shared = side.logits(prompt, 1)[-1].log_softmax(-1)
        return np.array([float(shared[int(ending[0])]) for ending in endings])
    scores = []
    for ending in endings:
        scores.append(_score(side.logits([*prompt, *ending.tolist()], len(ending) + 1)[:-1], ending))
    return np.array(scores)


def answers_of_rows(side: InTorch, rows: Sequence[Candidates]) -> list[int]:
    """What `answer` returns of each row; all are computed together."""
    requested: list[tuple[list[int], int]] = []  # ids, and how many of their last places count
    endings = [distinguishing_endings(row, side.text.tokenizer) for row in rows]
    for row, ends in zip(rows, endings, strict=True):
        prompt = row.prompt.tolist()
        short = all(len(ending) == 1 for ending in ends)
        requested += [(prompt, 1)] if short else [([*prompt, *ending.tolist()], len(ending) + 1) for ending in ends]
    tables = side.logits_of_rows([ids for ids, _ in requested], [last for _, last in requested])
    found = []
    for ends in endings:
        if all(len(ending) == 1 for ending in ends):
            shared = next(tables)[-1].log_softmax(-1)
            scores = [float(shared[int(ending[0])]) for ending in ends]
        else:
            scores = [_score(next(tables)[:-1], ending) for ending in ends]
        found.append(int(np.argmax(scores)))
    return found


def _score(logits: Tensor, ending: Ids) -> float:
    """Σ log p of the tokens of `ending`."""
    return float(logits.log_softmax(-1).gather(1, torch.from_numpy(ending)[:, None]).sum())


def check_greedy(live: InTorch, artefact: Artefact, probes: Probes, count: Count = uncounted) -> Check:
    """Greedy texts of 64 tokens: where two part, the live model must have been nearly undecided.

    `gap` is how much likelier, in nats, the live model found its own next token than the artefact's, at the first difference.
    """
    ends = end_ids(live.text)
    worst, detail, equal = 0.0, "", 0
    written = list[tuple[Ids, list[int], list[int]]]()
    with count(f"{artefact.name}: greedy texts", len(probes.prompts)) as done:
        for prompt in probes.prompts:
            ours = live.greedy(prompt.tolist(), GREEDY_TOKENS, ends)
            written.append((prompt, ours, artefact.greedy(prompt.tolist(), GREEDY_TOKENS, ends)))
            done(1)
    for prompt, ours, theirs in written:
        if ours == theirs:
            equal += 1
            continue
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        if place == min(len(ours), len(theirs)):
            gap = math.inf  # one stopped, though nothing was said that ends a text
        else:
            after = live.logits([*prompt.tolist(), *ours[:place]], 1)[-1].log_softmax(-1)
            gap = float(after[ours[place]] - after[theirs[place]])
        if gap >= worst:
            worst = gap
            tokens = [repr(decoded(live.text.tokenizer, ids[place : place + 1])) for ids in (ours, theirs)]
            detail = f"The first diverging token is number {place}: {tokens[0]} here, {tokens[1]} there, {gap:.3g} nats apart."
    detail = detail or f"{equal} of {len(probes.prompts)} texts of up to {GREEDY_TOKENS} tokens are equal."
    names, allowed = (live.name, artefact.name), {"gap": artefact.allowed.gap}
    return named_check("greedy text", names, {"gap": worst}, allowed, n=len(probes.prompts), detail=detail)


def check_stored(name: str, stored: Mapping[str, StoredTensor], allowed: Allowed) -> Check:
    """Whether every stored tensor is what it should be, and holds the whole of the adapter's change; names the worst one."""
    swallowed = [name for name, found in stored.items() if found.noise > _SWALLOWED and found.rounding <= allowed.rounding]
    errors = {tensor: 0.0 if tensor in swallowed else share_error(found) for tensor, found in stored.items()}
    roundings = {tensor: found.rounding for tensor, found in stored.items()}
    worst = max(errors, key=lambda tensor: errors[tensor], default="")
    roughest = max(roundings, key=lambda tensor: roundings[tensor], default="")
    measured = {"share": errors.get(worst, math.nan), "rounding": roundings.get(roughest, math.nan)}
    limits = {"share": allowed.share, "rounding": allowed.rounding}
    check = named_check("weights", ("base + adapter", name), measured, limits, n=len(stored))
    if check.passed and swallowed:
        kept = float(np.mean([stored[tensor].share for tensor in swallowed]))
        many = f"In {len(swallowed)} matrices rounding to {allowed.name} is larger than the adapter's change"
        return replace(check, detail=f"{many}; they hold {kept:.2g} of it on average. More bits keep more.")
    if check.passed:
        return check
    bad = worst if "share" in check.exceeded() else roughest
    return replace(check, detail=f"The worst layer is {bad}: {_of(stored[bad])}." if bad else "No tensor was compared.")


def share_error(found: StoredTensor) -> float:
    """|share − 1| beyond five times what independent rounding explains; 0 where nothing was to change."""
    if math.isinf(found.rounding):
        return math.inf
    if math.isnan(found.share):
        return 0.0
    return max(0.0, abs(found.share - 1) - _SIGMA * found.share_error)


def _of(found: StoredTensor) -> str:
    if math.isinf(found.rounding):
        return "it is missing, or of another shape"
    if math.isnan(found.share):
        return f"it differs by {found.rounding:.3g} of its size, and the adapter does not change it"
    return f"it holds {found.share:.3g} times the adapter's change and differs by {found.rounding:.3g} of its size"


Answer = TypeVar("Answer")


class RecordedArtefact:
    """An artefact's answers, as an `Artefact`: answers are cached, and the only ones left once the artefact is closed.

    So of the two sides of a check one is in memory at a time. The checks are the same, number by number.
    """

    def __init__(self, artefact: Artefact, spill: Spill) -> None:
        """Logits wait in `spill`, which the caller closes."""
        self.name, self.allowed = artefact.name, artefact.allowed
        self._artefact: Artefact | None = artefact
        self._spill = spill
        self._known: dict[Hashable, Any] = {}

    def let_go(self) -> None:
        """Forgets the artefact; what it was not asked raises KeyError from now on."""
        self._artefact = None

    def tokenise(self, text: str) -> list[int]:
        return self._once(("ids", text), lambda artefact: artefact.tokenise(text))

    def prompt(self, messages: Messages) -> list[int] | None:
        return self._once(("prompt", json.dumps(messages)), lambda artefact: artefact.prompt(messages))

    def greedy(self, prompt: Sequence[int], tokens: int, ends: frozenset[int]) -> list[int]:
        key = ("text", tuple(prompt), tokens, ends)
        return self._once(key, lambda artefact: artefact.greedy(prompt, tokens, ends))

    def logits(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        key = ("logits", tuple(ids), last)
        self._once(key, lambda artefact: self._spill.put(key, artefact.logits(ids, last)))
        return self._spill.get(key)

    def logit_parts(self, ids: Sequence[int]) -> Iterator[Tensor]:
        row = tuple(ids)
        for number in range(self._once(("parts", row), lambda artefact: self._put(row, artefact.logit_parts(ids)))):
            yield self._spill.get((row, number))

    def stored(self, source: Path, opened: Opened) -> dict[str, StoredTensor]:
        return self._once(("stored", source), lambda artefact: artefact.stored(source, opened))

    def _put(self, row: tuple[int, ...], parts: Iterator[Tensor]) -> int:
        count = 0
        while (part := next(parts, None)) is not None:
            self._spill.put((row, count), part)
            del part  # before the next one is computed
            count += 1
        return count

    def _once(self, key: Hashable, ask: Callable[[Artefact], Answer]) -> Answer:
        if key not in self._known:
            if self._artefact is None:
                raise KeyError(key)
            self._known[key] = ask(self._artefact)
        found: Answer = self._known[key]
        return found


def ask_all(
    artefact: Artefact, probes: Probes, live: InTorch, spill: Spill, count: Count = uncounted
) -> RecordedArtefact:
    """Asks `artefact` all that the checks of `probes` will ask it. Of `live` only the tokenizer is used: no block comes in."""
    found = RecordedArtefact(artefact, spill)
    for messages, _ in probes.conversations:
        found.prompt(messages)
    for text in probes.texts:
        found.tokenise(text)
    ends = end_ids(live.text)
    total = len(probes.rows) + len(probes.labelled) + len(probes.prompts)
    with count(f"{artefact.name}: its rows and texts", total) as done:
        for ids in probes.rows:
            for _ in found.logit_parts(ids.tolist()):
                pass
            done(1)
        for row in probes.labelled:
            answer(found, row, live)
            done(1)
        for prompt in probes.prompts:
            found.greedy(prompt.tolist(), GREEDY_TOKENS, ends)
            done(1)
    return found
