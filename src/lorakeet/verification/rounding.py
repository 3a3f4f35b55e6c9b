"""What rounding may do: the live adapter computed again in a server's number format, with products summed in other orders.

    as trained    Lorakeet's own fused modules, pairs beside the frozen products
    own modules   transformers' modules and eager attention, pairs beside the frozen products
    split         the same, with every product cut into 2, 3 or 5 parts that are rounded before they are added, as GPUs do
    merged        pairs folded into the weights, which are rounded once; whole and split
    step by step  all rows in one batch, a token at a time over a cache of keys and values, as servers write; both ways
    few bits      folded weights rounded between the ends of groups of 32, counted from other starts; and what goes into each
                  product, in 8 bits
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # torch offers no public name

from lorakeet.core.layers.linear import LoraLinear
from lorakeet.core.lowrank import LoraPair
from lorakeet.data.chat import Candidates
from lorakeet.errors import ConfigError
from lorakeet.evaluate.parity import kl_lower_bound
from lorakeet.evaluate.served.rounding_noise import Replica
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.inject import activate
from lorakeet.models.modules import adapted_layers
from lorakeet.models.text.adapters import own_modules
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.serving import ServingModel
from lorakeet.verification.artefact import InTorch
from lorakeet.verification.checks import answers_of_rows

LIKELY = -4.6  # log-probabilities of tokens below 1 % are not compared one by one
_GROUP = 32  # weights that are rounded together, as in q4_k
_LEAST_SPLIT = 16  # numbers of a sum that is cut

_aten = torch.ops.aten


@dataclass(frozen=True)
class Reported:
    """What a server tells of the tokens after some places of a text: by place, log-probabilities by id."""

    ids: list[int]
    places: dict[int, dict[int, float]]  # place p is the token after ids[: p + 1]

    @property
    def complete(self) -> bool:
        """Whether it tells of every place that has a next token."""
        return len(self.places) >= len(self.ids) - 1


@dataclass(frozen=True)
class Place:
    """What the live model says in fp32 of one place: log-probabilities of the compared tokens, and the likeliest of all."""

    before: tuple[int, ...]  # the ids up to it
    ours: dict[int, float]
    top: int
    held_out: bool = True  # whether it counts for KL and agreement; the difference of one log-probability is of all places

    def tops(self, after: Tensor) -> bool:
        """True if no token is likelier than `top` in `after` (vocabulary,): in 16 bits, several are often equally likely."""
        return float(after[self.top]) >= float(after.max())

    def against(self, theirs: Mapping[int, float]) -> tuple[float, list[float]]:
        """KL (a lower bound) of `theirs`, and |Δ log p| of each likely token."""
        known = {number: theirs[token] for number, token in enumerate(self.ours)}
        pairs = [(value, theirs[token]) for token, value in self.ours.items()]
        differences = [abs(left - right) for left, right in pairs if max(left, right) >= LIKELY]
        return kl_lower_bound(torch.tensor(list(self.ours.values())), known), differences


# A place, with another side's log-probabilities, and whether the live model's likeliest token is its likeliest too.
View: TypeAlias = "tuple[Place, dict[int, float], bool]"


@dataclass(frozen=True)
class Reading:
    """A row, and by place what the live model says of the token after ids[: place + 1]."""

    ids: list[int]
    places: dict[int, Place]

    @classmethod
    def of(cls, live: InTorch, ids: list[int], tokens: Mapping[int, Collection[int]], *, held_out: bool = True) -> Reading:
        """The live model's view of a row, of some `tokens` at some places."""
        table = live.logits(ids).log_softmax(-1)
        places = {}
        for place, wanted in tokens.items():
            numbers = list(wanted)
            known = dict(zip(numbers, table[place][numbers].tolist(), strict=True))
            places[place] = Place(tuple(ids[: place + 1]), known, int(table[place].argmax()), held_out)
        return cls(ids, places)


def seen_by(side: InTorch, readings: Sequence[Reading]) -> Iterator[View]:
    """Each place, with the same log-probabilities as another side has them, and its likeliest token; rows go together."""
    for reading, logits in zip(readings, side.logits_of_rows([one.ids for one in readings]), strict=True):
        table = logits.log_softmax(-1)
        for number, place in reading.places.items():
            after = table[number]
            known = after[list(place.ours)].tolist()
            yield place, dict(zip(place.ours, known, strict=True)), place.tops(after)


def replicas(
    load: Callable[[], InTorch],
    readings: Sequence[Reading],
    labelled: Sequence[Candidates],
    answers: Sequence[int],
    least: float = 0.0,
) -> list[Replica]:
    """How far the live adapter in a number format, which `load` loads, is from fp32, in each of several orders of computing.

    `answers` are the labels of `labelled` in fp32. Pairs are folded, and texts computed step by step, where that is possible.
    It ends after the first order, if its mean KL is below `least`: the format cannot explain that much.
    """

    def measured(side: InTorch, parts: int = 1) -> Replica:
        with SplitSums(parts) if parts > 1 or _in_halves(side) else nullcontext():
            changed = sum(mine != known for mine, known in zip(answers_of_rows(side, labelled), answers, strict=True))
            return _replica(list(seen_by(side, readings)), changed, folded=side.adapter is None)

    def stepped(side: InTorch) -> list[Replica]:
        with SplitSums(1) if _in_halves(side) else nullcontext():
            seen = list(step_by_step(side.text, readings, side.adapter))
        return [_replica(seen, None, folded=side.adapter is None)] if seen else []

    side = load()
    found = [measured(side)]
    if found[0].kl.mean() < least:
        return found
    with own_modules(side.text):
        found += [measured(side, parts) for parts in (1, 2, 3, 5)]
    if _fold(side):
        side = replace(side, adapter=None)
        with own_modules(side.text):
            found += [measured(side, parts) for parts in (1, 2, 3)]
        found += stepped(side)
    del side  # before another one is loaded
    return found + stepped(load())


def replicas_of_few_bits(
    load: Callable[[], InTorch], bits: int, readings: Sequence[Reading], labelled: Sequence[Candidates], answers: Sequence[int]
) -> list[Replica]:
    """The same where weights have `bits` bits, in each of several ways of rounding them; none where pairs cannot be folded.

    `load` loads the live adapter in fp32.
    """
    side = load()
    if not _fold(side):
        return []
    side = replace(side, adapter=None)
    weights = [module.weight for module in side.text.model.modules() if isinstance(module, nn.Linear)]
    exact, found = [weight.detach().clone() for weight in weights], list[Replica]()
    for start in range(0, _GROUP, _GROUP // 8):
        with torch.no_grad():
            for weight, value in zip(weights, exact, strict=True):
                weight.copy_(in_groups(value, bits, start))
        with own_modules(side.text), EightBitInputs():
            changed = sum(mine != known for mine, known in zip(answers_of_rows(side, labelled), answers, strict=True))
            found.append(_replica(list(seen_by(side, readings)), changed))
    return found


def in_groups(values: Tensor, bits: int, start: int = 0) -> Tensor:
    """`values` (…, n), rounded to 2^bits levels between the least and the largest of each group of the last dimension.

    In 8 bits the levels are multiples of the largest size / 127, as in q8_0: between least and largest they would contain all
    levels of a base of 4 bits, and a small change of it would be rounded away, which no such file does. Groups are counted from
    `start` on and around; the last one may be shorter.
    """
    width = values.shape[-1]
    turned = values.roll(-start, -1)
    padded = nn.functional.pad(turned, (0, -width % _GROUP))
    parts = padded.reshape(*padded.shape[:-1], -1, _GROUP)
    if bits == 8:
        least, largest, steps = torch.zeros_like(parts[..., :1]), parts.abs().amax(-1, keepdim=True), 127
    else:
        least, largest, steps = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True), 2**bits - 1
    step = ((largest - least) / steps).clamp_min(1e-12)
    rounded: Tensor = ((parts - least) / step).round() * step + least
    return rounded.flatten(-2)[..., :width].roll(start, -1)


class EightBitInputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which what goes into a product with a weight has 8 bits, in groups of 32, as in llama.cpp."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (_aten.mm.default, _aten.addmm.default):
            first = _PRODUCTS[function]
            args = (*args[:first], in_groups(args[first], 8), *args[first + 1 :])
        return function(*args, **(kwargs or {}))


def _in_halves(side: InTorch) -> bool:
    """Whether its products are of float16 numbers on a CPU, whose own such products are ten times as slow as fp32's."""
    weight: Tensor = next(side.text.model.parameters())
    return weight.dtype == torch.float16 and weight.device.type == "cpu"


def _replica(seen: Sequence[View], changed: int | None, *, folded: bool = False) -> Replica:
    kl, differences, other, by_place = list[float](), list[float](), 0, dict[tuple[int, ...], dict[int, float]]()
    for place, theirs, same in seen:
        divergence, apart = place.against(theirs)
        differences += apart
        by_place[place.before] = theirs
        if place.held_out:
            kl.append(divergence)
            other += not same
    return Replica(np.array(kl), np.array(differences), other, changed, by_place, folded)


def step_by_step(text: TextModel, readings: Sequence[Reading], adapter: str | None) -> Iterator[View]:
    """Each place as a server writes: all rows in one batch, a token at a time over a cache of keys and values.

    Nothing where the model cannot be served so. Layers are prepared for serving: the model is not the same afterwards.
    """
    rows = [reading.ids for reading in readings]
    adapters = {} if adapter is None else {adapter: 1.0}
    try:
        live = ServingModel(text)
        cache = KeyValues(slots=len(rows), capacity=max(map(len, rows)))
        for number in range(cache.capacity):
            now = [place for place, ids in enumerate(rows) if number < len(ids)]
            batch = [CacheRow(place, number, (rows[place][number],), adapters) for place in now]
            table = step(text, cache, batch, live.selection if adapters else None).cpu()
            for place, logits in zip(now, table, strict=True):
                if (known := readings[place].places.get(number)) is not None:
                    after = logits.log_softmax(-1)
                    yield known, dict(zip(known.ours, after[list(known.ours)].tolist(), strict=True)), known.tops(after)
    except ConfigError:
        return


@torch.no_grad()
def _fold(side: InTorch) -> bool:
    """Adds every pair to its weight, rounded once; False where a weight is not a plain one, and nothing is changed then."""
    name = side.adapter or ""
    layers = [layer for _, layer in adapted_layers(side.text.model) if name in layer.adapters]
    pairs = [layer.adapters[name] for layer in layers]
    plain = all(isinstance(layer, LoraLinear) and type(layer.original) is nn.Linear for layer in layers)
    if not layers or not plain or not all(isinstance(pair, LoraPair) and pair.plain for pair in pairs):
        return False
    activate(side.text.model, None)
    for layer, pair in zip(layers, pairs, strict=True):
        weight = cast(Tensor, layer.original.weight)
        weight.copy_((weight.float() + cast(LoraPair, pair).value().delta().to(weight.device)).to(weight.dtype))
    return True


class SplitSums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which products sum over their inner numbers in `parts`, each rounded before they are added."""

    def __init__(self, parts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PRODUCTS and args[_PRODUCTS[function]].shape[-1] >= _LEAST_SPLIT:
            return self._split(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def _split(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        first = _PRODUCTS[function]
        left, right = args[first], args[first + 1]
        total: Tensor | None = None
        for ours, theirs in zip(left.chunk(self.parts, -1), right.chunk(self.parts, -2), strict=True):
            part = _product(ours, theirs)
            total = part if total is None else total + part
        assert total is not None
        if first:  # addmm, baddbmm: beta·bias + alpha·product
            return cast(Tensor, args[0] * kwargs.get("beta", 1) + total * kwargs.get("alpha", 1))
        return total


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left·right, (…, n, m); of float16 numbers summed in fp32 and rounded once, as processors with such products do."""
    multiply = _aten.bmm if left.dim() == 3 else _aten.mm
    if left.dtype == torch.float16 and left.device.type == "cpu":
        return cast(Tensor, multiply(left.float(), right.float()).half())
    return cast(Tensor, multiply(left, right))


_PRODUCTS: dict[Callable[..., Any], int] = {
    _aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1,
}  # fmt: skip  # the place of the left factor among the arguments
