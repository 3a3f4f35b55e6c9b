"""Which modules' pairs are active in a served model: parts are left out of the live model, and the server's numbers are compared.

    rows         those on which modules count most, by one backward pass a row: PROBE_TOKENS, or the beginnings of PROBE_ROWS
    groups       all modules, each block, each kind of module: one forward pass over these rows for each
    looks        further rows, or places of a server that answers one at a time, until the lack of each group would be seen
    modules      one by one, if their passes fit into the minutes that are left; else their effect in first order is said
    verdict      evaluate/served/module_activity
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.evaluate.certificate import Check, ServedModules
from lorakeet.evaluate.intervals import Floats
from lorakeet.evaluate.served.module_activity import (
    FALSE_ACTIVE,
    FALSE_MISSING,
    FEWEST_PLACES,
    FEWEST_ROWS,
    ActivityFound,
    EffectValues,
    LeftOut,
    Modules,
    find_activity,
)
from lorakeet.evaluate.served.rounding_noise import Replica, scale_bound
from lorakeet.exporting.llama_cpp import PASS
from lorakeet.models.inject import activate
from lorakeet.models.modules import adapted_layers
from lorakeet.verification.artefact import InTorch
from lorakeet.verification.checks import named_check
from lorakeet.verification.diagnose import changed_pairs, numbered_part
from lorakeet.verification.left_out import KeptOutputs, Outputs, left_out
from lorakeet.verification.rounding import Reported
from lorakeet.verification.server_apis import TOP

PROBE_TOKENS = 512  # of all probed rows, what all begin with and prompts of written texts not counted
PROBE_ROWS = 12  # at least, where there are so many: rounding is measured between rows
QUESTIONS = 64  # places for each round that a server is queried for, beyond what it has reported
LOOKS = 4  # at the groups, each with more of the server's numbers
MINUTES = 1.5  # of one processor
_SCALE_STEP = 0.05  # of the scale, for its effect in first order
_SHOWN = 3
_BY_GROUP = 0.1  # of the false alarms: by blocks, and as much by kinds

Ask = Callable[[list[int], Sequence[int]], Mapping[int, Mapping[int, float]]]
EVERYTHING = "all modules"


@dataclass(frozen=True)
class Further:
    """How more is learned of a server: it is queried `ask` at places of a row, which it answers `one_by_one` or all together."""

    ask: Ask | None = None
    one_by_one: bool = True
    rows: Sequence[list[int]] = ()  # held-out ones, beside those of which it has reported
    minutes: float = MINUTES


def check_modules(
    live: InTorch,
    reported: Sequence[Reported],
    further: Further,
    names: tuple[str, str],
    scale: float,
    computed: Sequence[Replica] = (),
) -> tuple[list[Check], ServedModules] | str:
    """The checks of all adapted modules of the second of `names`, and what was shown of them; else why they were not made.

    `reported` are the log-probabilities that the server has reported. A `scale` that is so much of itself off is what the
    server's number format may do at most; less, where the adapter `computed` in that format shows less.
    """
    if live.text.streamed is not None:
        return "the live model's weights are streamed, and each module would take a pass over all of them"
    layers = [path for path, layer in adapted_layers(live.text.model) if (live.adapter or "") in layer.adapters]
    rows = [one for one in reported if one.places or further.ask is not None]
    if not layers or not rows:
        return "the server does not report log-probabilities" if layers else "the adapter has no pairs"
    kept = KeptOutputs(live)
    with kept.in_place():
        return _compared(_Evidence(kept, layers, computed, further), rows, names, scale)


def _compared(
    evidence: _Evidence, rows: Sequence[Reported], names: tuple[str, str], scale: float
) -> tuple[list[Check], ServedModules] | str:
    """The same, of a model whose blocks keep what they return."""
    evidence.add(choose_rows(evidence.live, rows, PROBE_TOKENS))
    values = evidence.compared()
    if (count := len(np.unique(values.places))) < FEWEST_PLACES:
        return f"the server reports log-probabilities at {count} places of the probed rows; {FEWEST_PLACES} are needed"
    if values.count < FEWEST_ROWS:
        why = f"{FEWEST_ROWS} are needed, since rounding differs by row"
        return f"the server reports log-probabilities of {values.count} rows; {why}"
    found = evidence.found()
    served = found.served(names[1], evidence)
    return _checks_of(evidence, found, served, names, scale), served


def _scale_of_rounding(compared: EffectValues, effect: Floats, computed: Sequence[Floats]) -> float:
    """How far from 1 the scale of a right server may seem, by what it seems in `computed` differences (values,), NaN where
    unknown; infinite where too little is known."""
    scales = []
    for apart in computed:
        here = np.isfinite(apart)
        if len(np.unique(compared.places[here])) >= FEWEST_PLACES:
            known = replace(compared, apart=np.where(here, apart, 0.0))
            scales.append(1 - known.share(np.where(here, effect, 0.0)).value)
    return scale_bound(scales)


def _checks_of(
    evidence: _Evidence, found: _Found, served: ServedModules, names: tuple[str, str], scale: float
) -> list[Check]:
    """Of the modules that are shown, and of the scale."""
    values = evidence.compared()
    computations = len(values.computed)
    bound = _scale_of_rounding(values, evidence.scale(), values.computed)
    scale, computations = (bound, computations) if bound < scale else (scale, 0)  # 0: it is fixed
    parts = [f"Modules: {served.counts}."]
    if served.missing:
        parts.append(f"Missing: {_listed(served.missing)}.")
    for sets in found.either:
        parts.append(f"Missing is one of: {'; or '.join(_listed(sorted(modules)) for modules in sets[:_SHOWN])}.")
    reasons: dict[str, list[str]] = {}
    for name, why in {**served.unseen, **served.unclear}.items():
        reasons.setdefault(why, []).append(name)
    parts += [f"Not distinguished: {_listed(modules)}, since {why}." for why, modules in list(reasons.items())[:_SHOWN]]
    parts.append(f"It took {evidence.cost} of the live model.")
    measured, allowed = {"missing_modules": float(found.faults)}, {"missing_modules": 0.0}
    shown = len(served.active) + len(served.missing) + len(served.seen)  # parts whose lack is seen, or would be
    modules = named_check("modules", names, measured, allowed, n=shown, detail=" ".join(parts))
    whole = found.by_modules or found.by_groups[0]
    limit, said = whole.scale_limit(scale), []
    if abs(whole.scale - 1) > limit:
        said.append(f"The server's scale is {whole.scale:.3g} times what it should be.")
    by = f"measured in {computations} computations" if computations else "a fixed limit"
    said.append(f"A scale that is {2 * limit - scale:.2g} of itself off would be seen; the format may do {scale:.2g}, {by}.")
    measured, allowed = {"scale_error": abs(whole.scale - 1)}, {"scale_error": limit}
    places = len(np.unique(values.places))
    return [modules, named_check("scale", names, measured, allowed, n=places, detail=" ".join(said))]


def _listed(modules: Sequence[str]) -> str:
    """A few names, and how many there are; a whole block or kind by one name."""
    if len(modules) <= _SHOWN:
        return ", ".join(modules)
    return f"{', '.join(modules[:_SHOWN])}, … ({len(modules)} in all)"


def choose_rows(live: InTorch, rows: Sequence[Reported], most: int, weak: Sequence[int] = ()) -> list[Reported]:
    """Rows of at most `most` tokens in all, or PROBE_ROWS of them, on which modules count most, the weak ones as the strong.

    With `weak`, the numbers of some modules, on which those do.

    Where all have more tokens, each ends `most` / PROBE_ROWS tokens after what all begin with, or after its first reported place.
    A module counts on a row by the square of what `_derivatives` gives: one backward pass a row.
    """
    if sum(len(one.ids) for one in rows) <= most:
        return list(rows)
    every = list(zip(*(one.ids for one in rows), strict=False))
    alike = next((place for place, tokens in enumerate(every) if len(set(tokens)) > 1), len(every)) if len(rows) > 1 else 0
    rows = [_beginning(one, max(alike, min(one.places, default=0)) + max(most // PROBE_ROWS, 2)) for one in rows]
    if len(rows) <= PROBE_ROWS:
        return rows
    table = np.stack([_derivatives(live, one, number) for number, one in enumerate(rows)]) ** 2
    table = table[:, list(weak)] if weak else table
    counts = (table / np.maximum(table.sum(0), 1e-30)).sum(1) / [len(one.ids) for one in rows]
    chosen: list[int] = []
    for number in np.argsort(-counts, kind="stable").tolist():
        if len(chosen) < PROBE_ROWS or sum(len(rows[other].ids) for other in [*chosen, number]) <= most:
            chosen.append(number)
    return [rows[number] for number in sorted(chosen)]


def _beginning(row: Reported, tokens: int) -> Reported:
    """Its first `tokens` tokens, and what is reported of the places among them that have a next token."""
    ids = row.ids[:tokens]
    return Reported(ids, {place: known for place, known in row.places.items() if place < len(ids) - 1})


def _derivatives(live: InTorch, row: Reported, seed: int) -> Floats:
    """By module, the derivative along its scale of the row's likeliest log-probabilities, each with a random sign and times the
    root of its probability: half its square is on average the KL, in first order, of leaving the module out."""
    name = live.adapter or ""
    pairs = [layer.adapters[name] for _, layer in adapted_layers(live.text.model) if name in layer.adapters]
    factors = [list(pair.parameters()) for pair in pairs]
    kept = [parameter.requires_grad for group in factors for parameter in group]
    flat = [parameter for group in factors for parameter in group]
    for parameter in flat:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            activate(live.text.model, live.adapter)
            hidden = live.text.hidden(pack_examples([_example(row.ids, range(len(row.ids) - 1))]))
            tops = live.text.head(hidden).float().log_softmax(-1).topk(TOP, -1).values
            signs = torch.randint(0, 2, tops.shape, generator=torch.Generator().manual_seed(seed)).to(tops) * 2 - 1
            found = torch.autograd.grad((tops * signs * (tops.detach() / 2).exp()).sum(), flat, allow_unused=True)
    finally:
        for parameter, before in zip(flat, kept, strict=True):
            parameter.requires_grad_(before)
    by_parameter = {id(parameter): gradient for parameter, gradient in zip(flat, found, strict=True)}
    return np.array([_along(group, by_parameter) for group in factors])


def _along(group: Sequence[Tensor], gradients: Mapping[int, Tensor | None]) -> float:
    """The derivative along growth of the pair's last factor: A comes first, and the change is linear in each."""
    last = group[1] if len(group) > 1 else group[0]
    gradient = gradients[id(last)]
    return 0.0 if gradient is None else float((gradient.float() * last.detach().float()).sum())


def _example(ids: Sequence[int], places: Sequence[int]) -> Example:
    """A row whose states after ids[: place + 1] are computed; the first token follows the last."""
    supervised = np.zeros(len(ids) + 1, bool)
    supervised[np.array(places) + 1] = True
    return Example(np.array([*ids, ids[0]], np.int64), supervised, "row", None, False)


@dataclass
class ProbedValues:
    """Log-probabilities of tokens at places of rows, as arrays (values,): the live model's, and the server's or NaN."""

    examples: list[Example]
    heads: Tensor  # (values,) which of the computed places
    tokens_of: Tensor  # (values,) token ids
    rows_of: Any
    numbers: Any  # of the places, over all rows
    ours: Floats
    theirs: Floats
    place_of: list[tuple[int, int]] = field(default_factory=list)  # (row, place) by number
    tokens: int = 0

    @classmethod
    def of(cls, live: InTorch, rows: Sequence[Reported], *, everywhere: bool) -> ProbedValues:
        """What the server has reported of `rows`; with `everywhere` also the likeliest tokens at all other places."""
        wanted = [[place for place in range(len(one.ids) - 1) if everywhere or place in one.places] for one in rows]
        kept = [number for number, places in enumerate(wanted) if places]
        examples = [_example(rows[number].ids, wanted[number]) for number in kept]
        place_of = [(number, place) for number in kept for place in wanted[number]]
        heads, tokens, theirs, ours = list[int](), list[int](), list[float](), list[Tensor]()
        start = 0
        for table in _tables(live, examples):
            first = len(heads)
            for at, likeliest in enumerate(table.topk(TOP, -1).indices.tolist(), start):
                number, place = place_of[at]
                given = rows[number].places.get(place, {})
                for token in dict.fromkeys([*given, *([] if given else likeliest)]):
                    heads.append(at)
                    tokens.append(token)
                    theirs.append(given.get(token, np.nan))
            ours.append(table[torch.tensor(heads[first:]) - start, torch.tensor(tokens[first:])])
            start += len(table)
        row_of = np.array([number for number, _ in place_of])
        numbers = np.array(heads)
        return cls(
            examples, torch.tensor(heads), torch.tensor(tokens), row_of[numbers], numbers, torch.cat(ours).double().numpy(),
            np.array(theirs), place_of, sum(len(example.ids) - 1 for example in examples),
        )  # fmt: skip

    def as_computed(self, computed: Replica, rows: Sequence[Reported]) -> Floats:
        """(values,) as another computation of these rows has them; NaN for what it does not have."""
        known = [computed.by_place.get(tuple(rows[number].ids[: place + 1]), {}) for number, place in self.place_of]
        places, tokens = self.numbers.tolist(), self.tokens_of.tolist()
        return np.array([known[place].get(token, np.nan) for place, token in zip(places, tokens, strict=True)])

    @property
    def known(self) -> Any:
        """Which values the server has reported, (values,) of bool."""
        return np.isfinite(self.theirs)

    def seen_by(self, live: InTorch) -> Floats:
        """(values,) as the live model has them now."""
        parts, start = [], 0
        for table in _tables(live, self.examples):
            here = (self.heads >= start) & (self.heads < start + len(table))
            parts.append(table[self.heads[here] - start, self.tokens_of[here]])
            start += len(table)
        return torch.cat(parts).double().numpy()

    def ask(self, ask: Ask, rows: Sequence[Reported], effects: Floats) -> None:
        """Queries up to QUESTIONS further places, where parts are distinguished best by their effects (parts, values)."""
        count = len(self.place_of)
        square = effects**2 / (np.mean(effects**2, axis=0) + 0.05 * np.mean(effects**2) + 1e-30)
        by_place = np.stack([np.bincount(self.numbers, one, count) for one in square])  # (modules, places)
        seen = np.zeros(count, bool)
        seen[np.unique(self.numbers[self.known])] = True
        have = by_place[:, seen].sum(1) + 1e-6 * by_place.sum(1) + 1e-30
        chosen: list[int] = []
        for _ in range(min(QUESTIONS, int((~seen).sum()))):
            gain = (by_place / have[:, None]).clip(0, 1e6).sum(0)
            gain[seen] = -1.0
            best = int(gain.argmax())
            chosen.append(best)
            seen[best] = True
            have += by_place[:, best]
        found: dict[int, Mapping[int, float]] = {}
        for row in sorted({self.place_of[number][0] for number in chosen}):
            of_row = {self.place_of[number][1]: number for number in chosen if self.place_of[number][0] == row}
            answers = ask(rows[row].ids, sorted(of_row))
            found |= {of_row[place]: known for place, known in answers.items() if place in of_row}
        for at, (number, token) in enumerate(zip(self.numbers.tolist(), self.tokens_of.tolist(), strict=True)):
            if number in found and token in found[number]:
                self.theirs[at] = found[number][token]


@torch.no_grad()
def _tables(live: InTorch, examples: Sequence[Example]) -> Iterator[Tensor]:
    """Log-probabilities (places, vocabulary) at the places of all examples, PASS of them at a time."""
    activate(live.text.model, live.adapter)
    live.text.model.eval()
    for part in torch.split(live.text.hidden(pack_examples(examples)), PASS):
        yield live.text.head(part).float().cpu().log_softmax(-1)


@dataclass
class _Found:
    """What was found in groups (by blocks, by kinds) and, if they were left out one by one, of modules."""

    seen: tuple[str, ...]
    unseen: dict[str, str]
    by_groups: tuple[ActivityFound, ActivityFound]
    missing: tuple[str, ...]  # modules of groups
    faults: int  # modules that are missing at least
    by_modules: ActivityFound | None = None

    @property
    def either(self) -> tuple[tuple[Modules, ...], ...]:
        return (self.by_modules or max(self.by_groups, key=lambda one: one.faults)).either

    def served(self, name: str, evidence: _Evidence) -> ServedModules:
        """The same for the certificate."""
        one = self.by_modules
        if one is None:
            why = "single modules were not left out one by one"
            active, missing = tuple[str, ...](), self.missing
            unclear = {path: why for path in evidence.layers if path not in missing}
        else:
            active, missing, unclear = one.active, one.missing, one.unclear
        nats = {group: evidence.nats(evidence.members[group]) for group in self.unseen}
        nats |= evidence.nats_of_modules(tuple(unclear))
        power = 1 - evidence.looks * FALSE_ACTIVE
        return ServedModules(name, active, missing, unclear, self.seen, self.unseen, nats, power)


class _Evidence:
    """The server's numbers beside the live model's, and the effects of what is left out of it; more of both with each look."""

    def __init__(self, kept: KeptOutputs, layers: Sequence[str], computed: Sequence[Replica], further: Further) -> None:
        self.kept, self.live, self.layers, self.computed, self.further = kept, kept.live, list(layers), computed, further
        self.started, self.looks, self.passes, self.tokens = process_time(), 0, 0, 0
        self.batches: list[ProbedValues] = []
        self.outputs: list[Outputs] = []  # of blocks, by batch
        self.rows: list[list[Reported]] = []
        self.effects: list[dict[Modules | str, Floats]] = []
        self.left = list(further.rows)
        blocks, kinds = (grouped(self.layers, key) for key in (_block, _kind))
        self.parts = [blocks, kinds]
        self.members: dict[str, Modules] = {EVERYTHING: frozenset(layers), **blocks, **kinds}

    def add(self, rows: Sequence[Reported]) -> None:
        """More rows; of those of which nothing is reported, the server is queried."""
        ask = self.further.ask
        if ask is not None and not self.further.one_by_one:
            rows = [one if one.places else Reported(one.ids, _plain(ask(one.ids, range(len(one.ids) - 1)))) for one in rows]
        with self.kept.recording() as outputs:
            self.batches.append(ProbedValues.of(self.live, rows, everywhere=ask is not None))
        self.outputs.append(outputs)
        self.rows.append(list(rows))
        self.effects.append({})
        self.tokens += self.batches[-1].tokens
        self.kept.require_same(outputs, self.batches[-1].ours, partial(self.batches[-1].seen_by, self.live))
        if ask is not None and any(not one.complete for one in rows):
            self.query(list(self.members))

    def query(self, groups: Sequence[str]) -> None:
        """Requests places of the last rows at which these groups have most effect."""
        assert self.further.ask is not None
        effects = np.stack([self._whole(len(self.batches) - 1, self.members[group]) for group in groups])
        self.batches[-1].ask(self.further.ask, self.rows[-1], effects)

    def more(self, unseen: Sequence[str]) -> bool:
        """Learns more of groups that are not seen yet; False where there is nothing more, or no time."""
        spent = process_time() - self.started
        if self.further.ask is None or spent * (1 + 1 / self.looks) > 60 * self.further.minutes:
            return False
        last = self.batches[-1]
        if self.further.one_by_one and len(last.place_of) - len(np.unique(last.numbers[last.known])) >= QUESTIONS:
            self.query(unseen)
            return True
        pool, self.left = self.left[: 2 * PROBE_ROWS], self.left[2 * PROBE_ROWS :]
        if not pool:
            return False
        weak = [number for number, path in enumerate(self.layers) if any(path in self.members[group] for group in unseen)]
        self.add(choose_rows(self.live, [Reported(ids, {}) for ids in pool], PROBE_TOKENS, weak))
        return True

    def found(self) -> _Found:
        """What is found of the groups after so many looks as it takes, and of modules if there is time."""
        found = self._groups()
        while found.unseen and not found.missing and self.looks < LOOKS and self.more(list(found.unseen)):
            found = self._groups()
        pass_takes = (process_time() - self.started) / max(self.passes, 1)
        if process_time() - self.started + len(self.layers) * pass_takes <= 60 * self.further.minutes:
            parts = {path: frozenset([path]) for path in self.layers}
            one = self._activity(self.compared(), parts, sets_of(self.layers))
            found.by_modules, found.faults = one, max(one.faults, 0 if one.missing else found.faults)
        return found

    def _groups(self) -> _Found:
        self.looks += 1
        values = self.compared()
        whole, within = values.share(self.effect(self.members[EVERYTHING])), values.quantile(FALSE_ACTIVE)
        seen, unseen = list[str](), dict[str, str]()
        if whole.value < 0.5 and 1 - whole.value > within * whole.spread:
            seen.append(EVERYTHING)
        else:
            unseen[EVERYTHING] = f"the server shows {1 - whole.value:.2g} of their effect, ± {whole.spread:.2g}"
        missing, faults = set[str](), 0
        found = [self._activity(values, part, [frozenset(part)] if len(part) > 1 else []) for part in self.parts]
        for part, one in zip(self.parts, found, strict=True):
            seen, unseen = [*seen, *one.active], unseen | one.unclear
            lacks = {path for group in one.missing for path in part[group]}
            smallest = [min(sum(len(part[group]) for group in groups) for groups in sets) for sets in one.either]
            missing, faults = missing | lacks, max(faults, len(lacks) + sum(smallest))
        listed = tuple(path for path in self.layers if path in missing)
        return _Found(tuple(seen), unseen, (found[0], found[1]), listed, faults)

    def _activity(self, values: EffectValues, part: Mapping[str, Modules], sets: Sequence[Modules]) -> ActivityFound:
        """Of the parts by name, each of some modules."""

        def together(names: Modules) -> Floats:
            return self.effect(frozenset().union(*(part[name] for name in names)))

        singles = {name: self.effect(modules) for name, modules in part.items()}
        share = _BY_GROUP if part in self.parts else 1 - 2 * _BY_GROUP
        return find_activity(values, LeftOut(singles, self.scale(), sets, together), share * FALSE_MISSING)

    def compared(self) -> EffectValues:
        """The server's numbers less the live model's, with the places and rows of each."""
        known = [one.known for one in self.batches]
        apart = [(one.theirs - one.ours)[here] for one, here in zip(self.batches, known, strict=True)]
        places, rows, before = list[Any](), list[Any](), (0, 0)
        for one, here, given in zip(self.batches, known, self.rows, strict=True):
            places.append(one.numbers[here] + before[0])
            rows.append(one.rows_of[here] + before[1])
            before = before[0] + len(one.place_of), before[1] + len(given)
        table = np.stack([self.effect(modules) for part in self.parts for modules in part.values()])
        values = EffectValues.of(np.concatenate(apart), np.concatenate(places), np.concatenate(rows), table)
        batches = list(zip(self.batches, known, self.rows, strict=True))
        computed = [
            np.concatenate([(one.as_computed(replica, given) - one.ours)[here] for one, here, given in batches])
            for replica in self.computed
        ]
        return replace(values, computed=tuple(computed))

    def effect(self, modules: Modules) -> Floats:
        """What leaving these out changes of the numbers that the server has reported."""
        return np.concatenate([self._whole(at, modules)[one.known] for at, one in enumerate(self.batches)])

    def _whole(self, batch: int, modules: Modules) -> Floats:
        values, kept = self.batches[batch], self.effects[batch]
        if modules not in kept:
            self.passes += 1
            with left_out(self.live, modules), self.kept.beginning(self.outputs[batch], modules):
                kept[modules] = values.seen_by(self.live) - values.ours
        return kept[modules]

    def scale(self) -> Floats:
        """The effect of a scale of 0, in first order."""
        parts = []
        for values, kept in zip(self.batches, self.effects, strict=True):
            if "scale" not in kept:
                self.passes += 1
                with changed_pairs(self.live, lambda _, pair: pair.B.mul_(1 - _SCALE_STEP)):
                    kept["scale"] = (values.seen_by(self.live) - values.ours) / _SCALE_STEP
            parts.append(kept["scale"][values.known])
        return np.concatenate(parts)

    def nats(self, modules: Modules) -> float:
        """KL a token of leaving these out, to second order in what changes of the likeliest tokens."""
        known = [one.known for one in self.batches]
        ours = np.concatenate([one.ours[here] for one, here in zip(self.batches, known, strict=True)])
        places = sum(len(np.unique(one.numbers[here])) for one, here in zip(self.batches, known, strict=True))
        return float((np.exp(ours) * self.effect(modules) ** 2).sum() / 2 / max(places, 1))

    def nats_of_modules(self, names: Sequence[str]) -> dict[str, float]:
        """The same of single modules; where they were not left out, in first order, by one backward pass a row."""
        if not names:
            return {}
        if all(frozenset([name]) in kept for name in names for kept in self.effects):
            return {name: self.nats(frozenset([name])) for name in names}
        rows = self.rows[0][:PROBE_ROWS]
        squares = np.mean([_derivatives(self.live, one, at) ** 2 / (len(one.ids) - 1) for at, one in enumerate(rows)], 0) / 2
        return {name: float(value) for name, value in zip(self.layers, squares, strict=True) if name in names}

    @property
    def cost(self) -> str:
        rows = sum(map(len, self.rows))
        return f"{self.passes} passes over rows of {self.tokens} tokens ({rows} rows, {self.looks} looks)"


def _plain(reported: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
    return {place: dict(known) for place, known in reported.items()}


def _block(path: str) -> str:
    return numbered_part(path) or "outside of blocks"


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def grouped(layers: Sequence[str], key: Callable[[str], str]) -> dict[str, Modules]:
    """The modules by what `key` says of their paths."""
    found: dict[str, list[str]] = {}
    for path in layers:
        found.setdefault(key(path), []).append(path)
    return {name: frozenset(paths) for name, paths in found.items()}


def sets_of(layers: Sequence[str]) -> list[Modules]:
    """Sets of modules that are likely to be lost together: blocks, kinds, attentions, MLPs, all."""
    keys: list[Callable[[str], str]] = [_block, _kind, lambda path: path.rpartition(".")[0].rpartition(".")[2], lambda _: "all"]
    groups = (modules for key in keys for modules in grouped(layers, key).values())
    return list(dict.fromkeys(modules for modules in groups if len(modules) > 1))
