"""A few log-probabilities that tell one function from another: recorded when an adapter comes in, compared ever after.

The same prompt goes through the model twice, with the adapter alone and the way a mixed batch serves it; both must agree. What
they give is compared with the record that came with the adapter, so that a forgotten scale or a missed layer cannot go unseen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.core.selection import Selection
from lorakeet.errors import DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, judge, read_certificate
from lorakeet.models.kv_cache import KeyValues, Row, step
from lorakeet.models.text import TextModel

FACT = "probe"  # the fact of a certificate that holds the record
CERTIFICATE = "certificate.json"
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.03}  # of a log-probability
_PROMPT = "A short text, written to see what the model makes of it: one, two, three."
_PLACES, _TOKENS = 4, 16


@dataclass(frozen=True)
class Probe:
    """Log-probabilities of some tokens after some beginnings of the probe prompt, and what they were computed with."""

    base: str
    precision: str
    logprobs: tuple[float, ...]
    effect: float = 0.0  # the largest difference from the bare base

    def difference(self, other: Probe) -> float | None:
        """The largest difference, or None where the two were computed with another base or precision."""
        if (self.base, self.precision, len(self.logprobs)) != (other.base, other.precision, len(other.logprobs)):
            return None
        return max(abs(ours - theirs) for ours, theirs in zip(self.logprobs, other.logprobs, strict=True))

    def to_text(self) -> str:
        """The record as one line of JSON."""
        numbers = [round(number, 6) for number in self.logprobs]
        return json.dumps({"base": self.base, "precision": self.precision, "logprobs": numbers, "effect": round(self.effect, 6)})

    @staticmethod
    def from_text(text: str, where: str) -> Probe:
        """The record that `to_text` made; DataError names `where` it was read."""
        try:
            data = json.loads(text)
            numbers = tuple(float(number) for number in data["logprobs"])
            return Probe(str(data["base"]), str(data["precision"]), numbers, float(data["effect"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"The probe in {where} is broken ({type(error).__name__}: {error}); verify the run again.") from error


class Prober:
    """Probes the adapters of one model. Its methods run the model: call them in the engine's thread."""

    def __init__(self, text: TextModel, selection: Selection) -> None:
        self.text, self.selection = text, selection
        ids = tuple(text.tokenizer.encode(_PROMPT, add_special_tokens=False))
        every = max(1, len(ids) // _PLACES)
        self._beginnings = [ids[: every * (place + 1)] for place in range(_PLACES) if every * (place + 1) <= len(ids)]
        self._cache = KeyValues(slots=len(self._beginnings), capacity=len(ids))
        self.base = text.source.name if not text.name else Path(text.name.rpartition(":")[2]).name
        self.precision = str(text.products).removeprefix("torch.")
        self.tolerance = TOLERANCE[self.precision]
        self._bare: Tensor | None = None

    def probe(self, name: str) -> Probe:
        """The record of the adapter `name`, which is on the model. VerificationFailed where serving it differs from using it."""
        if self._bare is None:
            self._bare = self._served({})
        served = self._served({name: 1.0})
        self.selection.use(name)
        alone = self._read(step(self.text, self._cache, [Row(slot, 0, ids, {}) for slot, ids in enumerate(self._beginnings)]))
        self.selection.use(None)
        apart = float((served - alone).abs().max())
        if not apart <= self.tolerance:  # NaN is apart
            raise VerificationFailed(
                f"'{name}' gives other log-probabilities in a batch than by itself: {apart:.3g} apart (allowed "
                f"{self.tolerance:g}). It is not served. Please report this."
            )
        effect = float((served - self._bare).abs().max())
        return Probe(self.base, self.precision, tuple(float(number) for number in served.flatten()), effect)

    def _served(self, adapters: dict[str, float]) -> Tensor:
        rows = [Row(slot, 0, ids, adapters) for slot, ids in enumerate(self._beginnings)]
        found = self._read(step(self.text, self._cache, rows, self.selection))
        self.selection.use(None)
        return found

    def _read(self, logits: Tensor) -> Tensor:
        """Log-probabilities (places, tokens) of tokens spread over the vocabulary."""
        width = logits.shape[1]
        places = torch.arange(0, width, max(1, width // _TOKENS), device=logits.device)[:_TOKENS]
        return logits.log_softmax(-1)[:, places].cpu()


def compare_record(name: str, found: Probe, record: Probe, tolerance: float, where: str) -> bool:
    """Whether `record` could be compared with `found`; VerificationFailed with the difference where they are apart."""
    difference = found.difference(record)
    if difference is None:
        return False
    if not difference <= tolerance:
        raise VerificationFailed(
            f"'{name}' does not compute what {where} says: its log-probabilities differ by {difference:.3g} (allowed "
            f"{tolerance:g}). It is not served. The adapter or the base was changed after it was verified; verify it again."
        )
    return True


def find_certificate(folder: Path) -> Path | None:
    """The certificate that came with an adapter: in its folder, or in the run folder around it."""
    places = [folder / CERTIFICATE, folder.parent / CERTIFICATE] if folder.is_dir() else [folder.with_name(CERTIFICATE)]
    return next((place for place in places if place.is_file()), None)


def read_record(certificate: Path) -> Probe | None:
    """The probe in a certificate, if there is one. DataError where the certificate is broken or did not pass."""
    found = read_certificate(certificate)
    if not found.passed:
        raise DataError(f"{certificate} says that its checks failed, so its adapter is not served. Train or verify it again.")
    return Probe.from_text(found.facts[FACT], str(certificate)) if FACT in found.facts else None


def extend_certificate(path: Path, name: str, probe: Probe, tolerance: float) -> Certificate:
    """Adds to a certificate that the adapter is served as it was verified, with the record for every later load."""
    old = read_certificate(path)
    record = read_record(path) or probe
    difference = probe.difference(record)
    check = judge(
        "served",
        {"logprob_difference": 0.0 if difference is None else difference},
        tolerance={"logprob_difference": tolerance},
        between=("base + adapter, in a mixed batch", "the record of the probe prompt"),
        n=len(probe.logprobs),
        detail=f"served as '{name}'",
    )
    kept = tuple(before for before in old.checks if before.name != check.name)
    new = Certificate(old.subject, (*kept, check), {**old.facts, FACT: record.to_text()})
    new.write(path)
    return new
