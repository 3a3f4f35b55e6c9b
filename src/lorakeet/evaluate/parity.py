"""Compares the logits of two models on the same tokens, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from lorakeet.errors import DataError
from lorakeet.evaluate.certificate import Check, tolerance_check
from lorakeet.evaluate.intervals import Estimate, Floats, mean, share
from lorakeet.evaluate.spec import EvaluateSpec

CELLS = 1_000_000  # logits compared at once in float64: 8 MB a copy, about ten copies
_REST = 1e-9  # probabilities below this are rounding errors
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Tolerance:
    """How far two models that should be equal may differ by rounding.

    `logit` is relative: the largest |left - right| over all logits, divided by max(1, largest |logit|). `effect` is
    relative to what the adapter does: mean KL(left ‖ right) / mean KL(left ‖ base), checked if the base was measured too.

    Folding s·B·A into W replaces two roundings by one in each of L adapted layers on a path; such independent errors grow with
    sqrt(L) and with the unit roundoff u of the stored weight (fp32 6e-8, fp16 5e-4, bf16 4e-3), and KL with their square.
    Measured on SmolLM2-135M, a random rank-4 adapter on all 210 linear layers, 2,049 tokens of 24 texts, live against folded:
    fp32 logit 2e-5, KL 1e-11, loss 2e-7; fp16 0.012, 3e-5, 4e-4; bf16 0.05 (0.17 against the fp32 adapter), 2e-3, 3e-3, top-1
    agreement 0.963. The tolerances are 3 to 15 times that, as a margin for larger models; fp32's loss 40 times, its KL 700 times.

    What they catch: in fp32 a scale that is 10 % off measured KL 7e-6 and one missed layer of the 210 measured 3e-6, both far
    outside. In bf16 the same missed layer is lost in rounding (KL 2.0e-3 with and without it). So certify in fp32; a bf16
    check only measures rounding, and `effect` its size relative to the adapter.
    """

    logit: float = field(metadata={"help": "Largest logit difference, as a share of the largest logit (at least 1)."})
    mean_kl: float = field(metadata={"help": "Mean KL divergence in nats a token."})
    top1_agreement: float = field(metadata={"help": "Smallest share of tokens on which the most likely next token is the same."})
    loss: float = field(metadata={"help": "Largest absolute difference of the mean loss in nats a token."})
    effect: float = field(metadata={"help": "Largest mean KL as a share of the adapter's own distance from its base."})


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(logit=1e-4, mean_kl=1e-8, top1_agreement=0.999, loss=1e-5, effect=1e-3),
    "fp16": Tolerance(logit=0.05, mean_kl=5e-4, top1_agreement=0.99, loss=2e-3, effect=0.1),
    "bf16": Tolerance(logit=0.5, mean_kl=1e-2, top1_agreement=0.95, loss=1e-2, effect=0.1),
}


@dataclass(frozen=True)
class Parity:
    """The difference of `right` from `left` on the same tokens; means have intervals over texts."""

    tokens: int
    texts: int
    max_logit_difference: float
    largest_logit: float
    max_kl: float
    mean_kl: Estimate
    top1_agreement: Estimate
    loss_difference: Estimate | None
    non_finite: int

    def check(
        self, name: str, tolerance: Tolerance, *, between: tuple[str, str], base: Parity | None = None, detail: str = ""
    ) -> Check:
        """The certificate's check of this measurement; non-finite logits always fail it.

        `base`, the same left model against its base without adapter, adds a check relative to the adapter's effect.
        """
        measured = {
            "logit": self.max_logit_difference / max(1.0, self.largest_logit),
            "mean_kl": self.mean_kl.value,
            "top1_agreement": self.top1_agreement.value,
            "non_finite": float(self.non_finite),
        }
        allowed = {name: getattr(tolerance, name) for name in ("logit", "mean_kl", "top1_agreement")} | {"non_finite": 0.0}
        estimates = {"mean_kl": self.mean_kl, "top1_agreement": self.top1_agreement}
        if self.loss_difference is not None:
            measured["loss"], allowed["loss"] = abs(self.loss_difference.value), tolerance.loss
            estimates["loss"] = self.loss_difference
        if base is not None and base.mean_kl.value > 0:
            measured["effect"], allowed["effect"] = self.mean_kl.value / base.mean_kl.value, tolerance.effect
        floors = ("top1_agreement",)
        check = tolerance_check(name, measured, tolerance=allowed, between=between, floors=floors, n=self.tokens, detail=detail)
        return replace(check, estimates=estimates)


class Differences(NamedTuple):
    """The result of `differences`: scalars over all logits, and kl, agrees and loss of each token (tokens,)."""

    non_finite: torch.Tensor
    largest_difference: torch.Tensor
    largest: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor
    loss: torch.Tensor | None


def differences(left: torch.Tensor, right: torch.Tensor, targets: torch.Tensor | None) -> Differences:
    """KL(left ‖ right), agreement of the top token and loss(right) − loss(left), of logits (tokens, vocabulary) in fp64.

    Non-finite logits on either side are counted, and compared as 0.
    """
    bad = torch.isnan(left) | torch.isnan(right) | ((left != right) & (torch.isinf(left) | torch.isinf(right)))
    if bool(bad.any()):
        left, right = left.masked_fill(bad, 0.0), right.masked_fill(bad, 0.0)
    difference = torch.where(left == right, torch.zeros_like(left), left - right).abs()
    largest = left.masked_fill(torch.isinf(left), 0.0).abs().max()
    p, q = left.log_softmax(1), right.log_softmax(1)
    kl = torch.where(torch.isinf(p), torch.zeros_like(p), p.exp() * (p - q)).sum(1).clamp_min(0)
    agrees = (left.argmax(1) == right.argmax(1)).double()
    loss = None
    if targets is not None:
        at = targets.to(left.device).long().unsqueeze(1)
        loss = (p.gather(1, at) - q.gather(1, at)).squeeze(1)
    return Differences(bad.sum(), difference.max(), largest, kl, agrees, loss)


def kl_lower_bound(ours: torch.Tensor, given: Mapping[int, float]) -> float:
    """A lower bound of KL(ours ‖ theirs) in nats, if only some log-probabilities of theirs are `given`, by token id.

    Σ p·log(p/q) over these tokens and over all others taken as one (log-sum inequality). `ours` (vocabulary,) are all
    log-probabilities at one position.
    """
    ids = list(given)
    p, q = ours[ids].double(), torch.tensor([given[token] for token in ids], dtype=torch.float64, device=ours.device)
    inside = float((p.exp() * (p - q)).sum())
    rest_p, rest_q = (max(0.0, 1.0 - float(part.exp().sum())) for part in (p, q))
    outside = 0.0 if rest_p < _REST else rest_p * math.log(rest_p / max(rest_q, _REST))
    return max(0.0, inside + outside)


class ParityMeter:
    """Accumulates the comparison of two sources of logits chunk by chunk; stores a few numbers per token."""

    def __init__(self) -> None:
        self._kl: list[Floats] = []
        self._agrees: list[Floats] = []
        self._loss: list[Floats] = []
        self._texts: list[Hashable] = []
        self._max_difference = 0.0
        self._largest = 0.0
        self._non_finite = 0

    def add(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        *,
        targets: torch.Tensor | None = None,
        texts: Hashable | Sequence[Hashable] = None,
    ) -> None:
        """Compares left and right (tokens, vocabulary).

        `targets` (tokens,) are the true next tokens, for the loss; give them always or never. `texts` is the id of the text, or
        a list of one id per token; without it every call is a text of its own.
        """
        if left.shape != right.shape or left.ndim != 2 or not left.numel():
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            raise DataError(f"Logits have the shapes {shapes}; expected two equal ones, (tokens, vocabulary).")
        if self._kl and (targets is None) != (not self._loss):
            raise DataError("Targets were given for some chunks and not for others; give them for all or for none.")
        count = len(left)
        ids = list(texts) if isinstance(texts, list) else [("call", len(self._kl)) if texts is None else texts] * count
        if len(ids) != count:
            raise DataError(f"There are {len(ids)} text ids for {count} tokens; expected one for each token.")
        step = max(1, CELLS // left.shape[1])
        for start in range(0, count, step):
            part = slice(start, start + step)
            goals = None if targets is None else targets[part]
            self._add_slice(left[part].detach().double(), right[part].detach().double(), goals)
        self._texts += ids

    def _add_slice(self, left: torch.Tensor, right: torch.Tensor, targets: torch.Tensor | None) -> None:
        found = differences(left, right.to(left.device), targets)
        self._non_finite += int(found.non_finite)
        self._max_difference = max(self._max_difference, float(found.largest_difference))
        self._largest = max(self._largest, float(found.largest))
        self._kl.append(found.kl.cpu().numpy())
        self._agrees.append(found.agrees.cpu().numpy())
        if found.loss is not None:
            self._loss.append(found.loss.cpu().numpy())

    def result(self, spec: EvaluateSpec) -> Parity:
        """The result so far: mean of KL(left ‖ right), top-1 agreement, loss(right) - loss(left), and the maxima."""
        if not self._kl:
            raise DataError("No tokens were compared; expected at least one chunk of logits.")
        groups = self._texts if len(set(self._texts)) > 1 else None
        kl = np.concatenate(self._kl)
        agrees = np.concatenate(self._agrees)
        return Parity(
            tokens=len(kl),
            texts=len(set(self._texts)),
            max_logit_difference=self._max_difference,
            largest_logit=self._largest,
            max_kl=float(kl.max()),
            mean_kl=mean(kl, spec=spec, groups=groups),
            top1_agreement=share(agrees > 0, spec=spec, groups=groups),
            loss_difference=mean(np.concatenate(self._loss), spec=spec, groups=groups) if self._loss else None,
            non_finite=self._non_finite,
        )
