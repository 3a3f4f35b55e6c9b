"""Which modules' pairs are active in a served model: each is left out of the live model, and the server's numbers are compared.

    rows         those on which modules count most, by one backward pass a row: PROBE_TOKENS, or the beginnings of PROBE_ROWS
    effects      one forward pass over these rows for each module; sets of modules only if one is not shown active
    questions    of a server that answers one place at a time: the places where modules tell most, for the weakest ones too
    verdict      evaluate/served/module_activity
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakeet.core.lowrank import LoraPair
from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.evaluate.certificate import Check, ServedModules
from lorakeet.evaluate.intervals import Floats
from lorakeet.evaluate.served.module_activity import (
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
from lorakeet.workflows.verification.artefact import InTorch
from lorakeet.workflows.verification.checks import named_check
from lorakeet.workflows.verification.diagnose import changed_pairs, numbered_part
from lorakeet.workflows.verification.rounding import Reported
from lorakeet.workflows.verification.server_apis import TOP

PROBE_TOKENS = 512  # of all probed rows, what all begin with and prompts of written texts not counted
PROBE_ROWS = 12  # at least, where there are so many: rounding is measured between rows
QUESTIONS = 64  # places that a server is queried for, beyond what it has reported
_SCALE_STEP = 0.05  # of the scale, for its effect in first order
_SHOWN = 3

Ask = Callable[[list[int], Sequence[int]], Mapping[int, Mapping[int, float]]]


def check_modules(
    live: InTorch,
    reported: Sequence[Reported],
    ask: Ask | None,
    names: tuple[str, str],
    scale: float,
    computed: Sequence[Replica] = (),
) -> tuple[Check, ServedModules] | str:
    """The check of all adapted modules of the second of `names`, and what was shown of each; else why it was not made.

    `reported` are the log-probabilities that the server has reported; `ask` reports them of further places of a row. A `scale`
    that is so much of itself off is what the server's number format may do at most; less, where the adapter `computed` in that
    format shows less.
    """
    if live.text.streamed is not None:
        return "the live model's weights are streamed, and each module would take a pass over all of them"
    layers = [path for path, layer in adapted_layers(live.text.model) if (live.adapter or "") in layer.adapters]
    rows = [one for one in reported if one.places or ask is not None]
    if not layers or not rows:
        return "the server does not report log-probabilities" if layers else "the adapter has no pairs"
    rows = choose_rows(live, rows, PROBE_TOKENS)
    values = ProbedValues.of(live, rows, everywhere=ask is not None)
    probe = _Probe(live, values, layers)
    if ask is not None and any(not one.complete for one in rows):
        values.ask(ask, rows, np.stack([probe.singles[path] for path in layers]))
    here = values.known
    places = values.numbers[here]
    if (count := len(np.unique(places))) < FEWEST_PLACES:
        return f"the server reports log-probabilities at {count} places of the probed rows; {FEWEST_PLACES} are needed"
    known = probe.known(here)
    if (count := len(np.unique(values.rows_of[here]))) < FEWEST_ROWS:
        return f"the server reports log-probabilities of {count} rows; {FEWEST_ROWS} are needed, since rounding differs by row"
    apart = values.theirs[here] - values.ours[here]
    differences = [(values.as_computed(replica, rows) - values.ours)[here] for replica in computed]
    compared = replace(EffectValues.of(apart, places, values.rows_of[here], known.table()), computed=tuple(differences))
    found = find_activity(compared, known)
    bound = _scale_of_rounding(compared, known.scale, differences)
    served = ServedModules(names[1], found.active, found.missing, found.unclear)
    cost = f"{probe.passes} passes over {values.tokens} tokens of {len(rows)} rows"
    return _check_of(found, served, names, cost, (min(scale, bound), len(differences) if bound < scale else 0)), served


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


def _check_of(
    found: ActivityFound, served: ServedModules, names: tuple[str, str], cost: str, format_may: tuple[float, int]
) -> Check:
    """`format_may`: by how much of itself the number format may change the scale, and by how many computations; 0 if fixed."""
    scale, computations = format_may
    total = len(served.active) + len(served.missing) + len(served.unclear)
    parts = [f"Active in {len(served.active)} of {total} modules."]
    if served.missing:
        parts.append(f"Missing: {_listed(served.missing)}.")
    for sets in found.either:
        parts.append(f"Missing is one of: {'; or '.join(_listed(sorted(modules)) for modules in sets[:_SHOWN])}.")
    reasons: dict[str, list[str]] = {}
    for name, why in served.unclear.items():
        reasons.setdefault(why, []).append(name)
    parts += [f"Not distinguished: {_listed(modules)}, since {why}." for why, modules in list(reasons.items())[:_SHOWN]]
    limit = found.scale_limit(scale)
    if abs(found.scale - 1) > limit:
        parts.append(f"The server's scale is {found.scale:.3g} times what it should be.")
    by = f"measured in {computations} computations" if computations else "a fixed limit"
    parts.append(f"A scale that is {2 * limit - scale:.2g} of itself off would be seen; the format may do {scale:.2g}, {by}.")
    parts.append(f"It took {cost} of the live model.")
    measured = {"missing_modules": float(found.faults), "scale_error": abs(found.scale - 1)}
    allowed = {"missing_modules": 0.0, "scale_error": limit}
    return named_check("modules", names, measured, allowed, n=total, detail=" ".join(parts))


def _listed(modules: Sequence[str]) -> str:
    """A few names, and how many there are; a whole block or kind by one name."""
    if len(modules) <= _SHOWN:
        return ", ".join(modules)
    return f"{', '.join(modules[:_SHOWN])}, … ({len(modules)} in all)"


def choose_rows(live: InTorch, rows: Sequence[Reported], most: int) -> list[Reported]:
    """Rows of at most `most` tokens in all, or PROBE_ROWS of them, on which modules count most, the weak ones as the strong.

    Where all have more tokens, each ends `most` / PROBE_ROWS tokens after what all begin with, or after its first reported place.
    A module counts on a row by the squared derivative of its log-probabilities, added with random signs, along the module's
    scale: one backward pass a row.
    """
    if sum(len(one.ids) for one in rows) <= most:
        return list(rows)
    every = list(zip(*(one.ids for one in rows), strict=False))
    alike = next((place for place, tokens in enumerate(every) if len(set(tokens)) > 1), len(every)) if len(rows) > 1 else 0
    rows = [_beginning(one, max(alike, min(one.places, default=0)) + max(most // PROBE_ROWS, 2)) for one in rows]
    if len(rows) <= PROBE_ROWS:
        return rows
    table = np.stack([_derivatives(live, one, number) for number, one in enumerate(rows)]) ** 2
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
    """By module, the derivative of the row's likeliest log-probabilities, added with random signs, along the module's scale."""
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
            found = torch.autograd.grad((tops * signs).sum(), flat, allow_unused=True)
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
        tops = torch.cat([table.topk(TOP, -1).indices for table in _tables(live, examples)]).tolist()
        heads, tokens, theirs = list[int](), list[int](), list[float]()
        for at, ((number, place), likeliest) in enumerate(zip(place_of, tops, strict=True)):
            given = rows[number].places.get(place, {})
            for token in dict.fromkeys([*given, *([] if given else likeliest)]):
                heads.append(at)
                tokens.append(token)
                theirs.append(given.get(token, np.nan))
        row_of = np.array([number for number, _ in place_of])
        numbers = np.array(heads)
        found = cls(
            examples, torch.tensor(heads), torch.tensor(tokens), row_of[numbers], numbers, np.empty(0), np.array(theirs),
            place_of, sum(len(example.ids) - 1 for example in examples),
        )  # fmt: skip
        found.ours = found.seen_by(live)
        return found

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
        """Queries up to QUESTIONS further places, where modules are distinguished best by their effects (modules, values)."""
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


class _Probe:
    """The effects of what is left out of the live model, on all probed values."""

    def __init__(self, live: InTorch, values: ProbedValues, layers: Sequence[str]) -> None:
        self.live, self.values, self.layers, self.passes = live, values, list(layers), 1
        self.singles = {path: self._effect(frozenset([path])) for path in self.layers}

    def _effect(self, modules: Modules) -> Floats:
        self.passes += 1
        with left_out(self.live, modules):
            return self.values.seen_by(self.live) - self.values.ours

    def known(self, here: Any) -> LeftOut:
        """As the verdict needs it, of the values `here`."""
        with changed_pairs(self.live, lambda _, pair: pair.B.mul_(1 - _SCALE_STEP)):
            scale = (self.values.seen_by(self.live) - self.values.ours)[here] / _SCALE_STEP
        self.passes += 1
        return LeftOut(
            {path: effect[here] for path, effect in self.singles.items()},
            scale,
            sets_of(self.layers),
            lambda modules: self._effect(modules)[here],
        )


def sets_of(layers: Sequence[str]) -> list[Modules]:
    """Sets of modules that are likely to be lost together: blocks, kinds, attentions, MLPs, all."""
    kinds: list[Callable[[str], str]] = [
        numbered_part,
        lambda path: path.rpartition(".")[2],
        lambda path: path.rpartition(".")[0].rpartition(".")[2],
        lambda _: "all",
    ]
    found: dict[Modules, None] = {}
    for key in kinds:
        groups: dict[str, list[str]] = {}
        for path in layers:
            groups.setdefault(key(path), []).append(path)
        found |= dict.fromkeys(frozenset(paths) for paths in groups.values() if len(paths) > 1)
    return list(found)


@contextmanager
def left_out(live: InTorch, modules: Modules) -> Iterator[None]:
    """A context in which the live adapter has no pair on these modules; as it was afterwards."""
    name = live.adapter or ""
    layers = [layer for path, layer in adapted_layers(live.text.model) if path in modules and name in layer.adapters]
    zeroed: list[tuple[Tensor, Tensor]] = []
    taken: list[tuple[Any, torch.nn.Module]] = []
    with torch.no_grad():
        try:
            for layer in layers:
                pair = layer.adapters[name]
                if isinstance(pair, LoraPair) and pair.plain and pair.anchor_A is None:
                    zeroed.append((pair.B, pair.B.detach().clone()))
                    pair.B.zero_()
                else:
                    taken.append((layer, pair))
                    layer.detach(name)
            yield
        finally:
            for parameter, before in zeroed:
                parameter.copy_(before)
            for layer, pair in taken:
                layer.attach(name, pair)
