"""A probe of an adapter: a few log-probabilities that identify what it computes, recorded in training and compared when served.

Training writes the `record` to the certificate: log-probabilities of a fixed prompt with the adapter. A server computes the same
prompt twice, as in training and as in a mixed batch. Both must agree with each other and with the record, which detects a wrong
scale, a missing layer or another base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.core.selection import Selection
from lorakeet.data.pack import Batch
from lorakeet.data.template import encoded
from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate, tolerance_check
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.inject import selection_of
from lorakeet.models.text.model import TextModel
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.stack import PackedStack

FACT = "probe"  # the fact of a certificate that holds the record
CERTIFICATE = "certificate.json"
# Of a log-probability. Logits of 16 to 32 are rounded to eighths in bf16, so two computations of one function sometimes differ by
# two steps (0.252 measured on SmolLM2 with random adapters). Four are allowed, or a tenth of a stronger adapter's effect.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.06}
_OF_EFFECT = 0.1
_PROMPT = "A short text, written to see what the model makes of it: one, two, three."
_PLACES, _TOKENS = 4, 16


@dataclass(frozen=True)
class Probe:
    """Log-probabilities of some tokens after prefixes of the probe prompt, with the base and precision."""

    base: str
    precision: str  # of the products, and of the weights if it differs
    logprobs: tuple[float, ...]
    effect: float = 0.0  # the largest difference from the bare base
    apart: float = 0.0  # the largest difference between a mixed batch and the adapter alone; 0 if nothing was served

    def difference(self, other: Probe) -> float | None:
        """The largest difference, NaN if a number is NaN; None if the base or the precision differs."""
        if (self.base, self.precision, len(self.logprobs)) != (other.base, other.precision, len(other.logprobs)):
            return None
        apart = [abs(ours - theirs) for ours, theirs in zip(self.logprobs, other.logprobs, strict=True)]
        return math.nan if any(map(math.isnan, apart)) else max(apart)

    def to_text(self) -> str:
        """The record as one line of JSON."""
        numbers = [round(number, 6) for number in self.logprobs]
        sizes = {"effect": round(self.effect, 6), "apart": round(self.apart, 6)}
        return json.dumps({"base": self.base, "precision": self.precision, "logprobs": numbers, **sizes})

    @staticmethod
    def from_text(text: str, where: str) -> Probe:
        """The record that `to_text` made; DataError names `where` it was read."""
        try:
            data = json.loads(text)
            numbers = tuple(float(number) for number in data["logprobs"])
            sizes = float(data["effect"]), float(data.get("apart", 0.0))
            return Probe(str(data["base"]), str(data["precision"]), numbers, *sizes)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"The probe in {where} is broken ({type(error).__name__}: {error}); verify the run again.") from error


def record(text: TextModel, name: str) -> Probe:
    """Probes the adapter `name` on the model of its training. It is the active one afterwards."""
    selection, prefixes = selection_of(text.model), _prefixes(text)
    bare, found = (_alone(text, selection, prefixes, active) for active in (None, name))
    return Probe(_base(text), _precision(text), _numbers(found), float((found - bare).abs().max()))


class Prober:
    """Probes adapters of a model. Its methods run the model: call them in the engine's thread."""

    def __init__(self, text: TextModel, selection: Selection) -> None:
        self.text, self.selection = text, selection
        self._prefixes = _prefixes(text)
        self._cache = KeyValues(slots=len(self._prefixes), capacity=len(self._prefixes[-1]))
        self.base, self.precision = _base(text), _precision(text)
        self.tolerance = max(TOLERANCE[_word(dtype)] for dtype in (text.products, text.dtype))
        self._bare: Tensor | None = None

    def probe(self, name: str) -> Probe:
        """Probes the attached adapter `name`. VerificationFailed if it computes other numbers in a mixed batch than alone."""
        try:
            if self._bare is None:
                self._bare = self._served({})
            served = self._served({name: 1.0})
            alone = _alone(self.text, self.selection, self._prefixes, name)
        finally:  # even if the model fails, the adapter must not stay active
            self.selection.use(None)
        apart, effect = float((served - alone).abs().max()), float((served - self._bare).abs().max())
        allowed = self.allowed(effect)
        if not apart <= allowed:  # NaN is apart
            raise VerificationFailed(
                f"'{name}' gives other log-probabilities in a batch than alone: {apart:.3g} apart (allowed {allowed:.3g}). "
                "It is not served. Please report this."
            )
        return Probe(self.base, self.precision, _numbers(served), effect, apart)

    def allowed(self, effect: float) -> float:
        """The allowed difference of two computations, for an adapter that changes log-probabilities by `effect`."""
        return self.tolerance if self.tolerance == TOLERANCE["float32"] else max(self.tolerance, _OF_EFFECT * effect)

    def _served(self, adapters: dict[str, float]) -> Tensor:
        rows = [CacheRow(slot, 0, ids, adapters) for slot, ids in enumerate(self._prefixes)]
        return _spread(step(self.text, self._cache, rows, self.selection))


def _prefixes(text: TextModel) -> list[tuple[int, ...]]:
    """A few prefixes of the probe prompt."""
    ids = tuple(encoded(text.tokenizer, _PROMPT, add_special_tokens=False))
    every = max(1, len(ids) // _PLACES)
    return [ids[: every * (place + 1)] for place in range(_PLACES) if every * (place + 1) <= len(ids)]


def _alone(text: TextModel, selection: Selection, prefixes: Sequence[tuple[int, ...]], name: str | None) -> Tensor:
    """Log-probabilities (positions, tokens) with one adapter, or none, on all tokens, as in training and evaluation."""
    lengths = tuple(len(ids) for ids in prefixes)
    ids = torch.tensor([number for prefix in prefixes for number in prefix])
    last = torch.tensor(lengths).cumsum(0).sub(1)
    batch = Batch(ids, lengths, last, ids[last], tuple(map(str, range(len(lengths)))))
    selection.use(name)
    text.model.eval()
    with torch.no_grad():
        return _spread(text.head(text.hidden(batch)).float())


def _spread(logits: Tensor) -> Tensor:
    """Log-probabilities (positions, tokens) of tokens spread over the vocabulary."""
    width = logits.shape[1]
    places = torch.arange(0, width, max(1, width // _TOKENS), device=logits.device)[:_TOKENS]
    return logits.log_softmax(-1)[:, places].cpu()


def _numbers(found: Tensor) -> tuple[float, ...]:
    return tuple(float(number) for number in found.flatten())


def _base(text: TextModel) -> str:
    """The base's name, and how its weights are quantised, which changes what it computes."""
    name = text.source.name if not text.name else Path(text.name.rpartition(":")[2]).name
    kinds = {
        " ".join(f"{value}" if key == "method" else f"{key}={value}" for key, value in module.settings.items() if key != "shape")
        for module in text.model.modules()
        if isinstance(module, (PackedBase, PackedStack))
    }
    return ", ".join([name, *sorted(kinds)])


def _precision(text: TextModel) -> str:
    products, weights = _word(text.products), _word(text.dtype)
    return products if products == weights else f"{products} over {weights}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare_record(name: str, found: Probe, record: Probe, tolerance: float, where: str) -> bool:
    """Compares `found` with `record`; VerificationFailed if they differ, False if they are not comparable."""
    difference = found.difference(record)
    if difference is None:
        return False
    if not difference <= tolerance:
        raise VerificationFailed(
            f"'{name}' does not compute what {where} says: its log-probabilities differ by {difference:.3g} (allowed "
            f"{tolerance:g}). It is not served. The adapter or the base was changed after it was verified; verify it again."
        )
    return True


def read_record(certificate: Path) -> Probe | None:
    """The probe in a certificate, if there is one. DataError if it is broken, empty, or a check of the adapter itself failed.

    Checks of merged or exported forms do not count: they are not served here.
    """
    found = read_certificate(certificate)
    failed = [check.name for check in found.own if not check.passed]
    if failed or not found.own:
        what = f"its checks failed ({', '.join(failed)})" if failed else "nothing was checked"
        raise DataError(f"{certificate} says that {what}, so its adapter is not served. Train or verify it again.")
    return Probe.from_text(found.facts[FACT], str(certificate)) if FACT in found.facts else None


def extend_certificate(path: Path, name: str, probe: Probe, tolerance: float) -> Certificate:
    """Adds to a certificate the check that the adapter is served as verified, and the record for later loads.

    Without a record, the check compares a mixed batch with the adapter alone, and this probe becomes the record. ConfigError if
    the record was made with another base or precision, which cannot be compared.
    """
    old, known = read_certificate(path), read_record(path)
    difference = probe.apart if known is None else probe.difference(known)
    if known is not None and difference is None:
        raise ConfigError(
            f"{path} was written for {known.base} in {known.precision}; this server runs {probe.base} in {probe.precision}, so "
            "that nothing can be compared. Start it with the --model, --dtype and --quantize of the training."
        )
    check = tolerance_check(
        "served",
        {"logprob_difference": float(difference or 0.0)},
        tolerance={"logprob_difference": tolerance},
        between=("in a mixed batch", "by itself" if known is None else "the record of the training"),
        n=len(probe.logprobs),
        detail=f"served as '{name}'",
    )
    kept = tuple(before for before in old.checks if before.name != check.name)
    new = replace(old, checks=(*kept, check), facts={**old.facts, FACT: (known or probe).to_text()})
    new.write(path)
    return new
