"""How much an exported model may differ from the live one, by the storage type of its matrices, and why.

Measured with llama.cpp on SmolLM2-135M against fp32 in torch: with a random rank-4 adapter on all 210 linear layers, 67 tokens,
and with the quickstart's own adapter of rank 8, 4,236 tokens of 32 held-out rows:

              random              the quickstart's
    type      KL       top-1      KL       top-1    logit    loss
    F32       < 1e-8   1.0                                           largest difference of a log-probability 8e-5
    F16       8e-6     0.985      5e-6     0.998    0.004    8e-4    llama.cpp rounds the activations to F16 too
    Q8_0      0.013    0.90       0.0054   0.957    0.08     0.007   activations in 8 bits as well
    Q4_K_M    0.10     0.76       0.087    0.843    0.35     0.27

A model of 135 M parameters suffers most from few bits, so larger ones differ less. The tolerances are 6 to 60 times what was
measured in F16, 6 to 18 times in Q8_0; in Q4_K_M 6 times for KL and twice for the loss, which 4 bits alone change. `effect` in
F16 is KL over the adapter's own: rounding is 1e-6 of the quickstart's (4.4 nats), and 0.1 tests one down to 1e-4 nats.
llama.cpp's server over the same adapter (32 positions of 4 rows) has KL 3e-6 in F16, 0.0034 in
Q8_0;
the largest difference of a log-probability above 1 % is 0.02 (`gap` allows 0.1) and 0.53 (1), so that `gap` is the nearest limit.
With 8 bits or fewer the logits alone could hide a wrong scale; there `share` detects it: how much of the adapter's change the
stored weights hold (`exporting/merged_tensors`), which rounding hardly moves. In fp32 ten per cent of the scale or one missing
layer is 100 times outside (`evaluate/parity`). Gemma's logits differ by 2e-4 of the largest even in F32, because ggml looks its
GELU up in a table of half-precision numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorakeet.evaluate.parity import Tolerance
from lorakeet.evaluate.served.rounding_noise import RoundingLimits


@dataclass(frozen=True)
class Allowed:
    """The tolerances of one storage type.

    parity: of the logits. rounding: ‖stored − wanted‖ / ‖wanted‖ of a matrix. share: |share − 1| of a matrix beyond what rounding
    explains. gap: nats between the live model's two likeliest tokens at which greedy texts may diverge. difference: nats of one
    log-probability, where that is not `gap`.
    """

    name: str
    parity: Tolerance
    rounding: float
    share: float
    gap: float
    metric: float  # share of rows with another answer
    difference: float | None = None

    @property
    def logprob(self) -> float:
        """The largest difference of one log-probability in nats."""
        return self.gap if self.difference is None else self.difference


_LOOSE = math.inf  # a few bits may change more than the adapter does, so the effect is not compared
F32 = Allowed("F32", Tolerance(logit=1e-3, mean_kl=1e-6, top1_agreement=0.995, loss=1e-4, effect=1e-2), 1e-5, 1e-3, 1e-2, 0.01)
F16 = Allowed("F16", Tolerance(logit=0.05, mean_kl=5e-4, top1_agreement=0.95, loss=5e-3, effect=0.1), 1e-3, 0.01, 0.1, 0.03)
BF16 = Allowed("BF16", Tolerance(logit=0.5, mean_kl=1e-2, top1_agreement=0.9, loss=2e-2, effect=0.2), 5e-3, 0.03, 0.5, 0.05)
Q8 = Allowed("8 bits", Tolerance(logit=0.5, mean_kl=0.1, top1_agreement=0.75, loss=0.1, effect=_LOOSE), 0.02, 0.05, 1.0, 0.1)
Q6 = Allowed("6 bits", Tolerance(logit=0.75, mean_kl=0.2, top1_agreement=0.7, loss=0.2, effect=_LOOSE), 0.06, 0.1, 1.5, 0.15)
Q5 = Allowed("5 bits", Tolerance(logit=1.0, mean_kl=0.35, top1_agreement=0.6, loss=0.3, effect=_LOOSE), 0.12, 0.15, 2.0, 0.2)
Q4 = Allowed("4 bits", Tolerance(logit=1.0, mean_kl=0.6, top1_agreement=0.5, loss=0.5, effect=_LOOSE), 0.2, 0.2, 3.0, 0.25)
Q3 = Allowed("3 bits", Tolerance(logit=1.5, mean_kl=1.5, top1_agreement=0.3, loss=1.0, effect=_LOOSE), 0.4, 0.3, 5.0, 0.4)
Q2 = Allowed("2 bits", Tolerance(logit=2.0, mean_kl=3.0, top1_agreement=0.1, loss=2.0, effect=_LOOSE), 0.7, 0.4, 8.0, 0.6)
BY_TYPE: dict[str, Allowed] = {"F32": F32, "F16": F16, "BF16": BF16, "Q8_0": Q8, "Q6_K": Q6}
BY_BITS: dict[str, Allowed] = {"Q5": Q5, "Q4": Q4, "IQ4": Q4, "Q3": Q3, "IQ3": Q3, "Q2": Q2, "IQ2": Q2, "IQ1": Q2}
_NOTABLE = 0.05  # a type that holds less than this share of the numbers does not set the tolerance
PRECISIONS: dict[str, Allowed] = {
    "float32": F32, "float16": F16, "bfloat16": BF16,
    "8-bit": Q8, "6-bit": Q6, "5-bit": Q5, "4-bit": Q4, "3-bit": Q3, "2-bit": Q2,
}  # fmt: skip


FEW_BITS = {name: int(name[0]) for name in PRECISIONS if name.endswith("bit")}
_SAID = {"f32": "float32", "f16": "float16", "half": "float16", "bf16": "bfloat16", "iq1": "2-bit", "mxfp4": "4-bit"}


def precision_said(said: str) -> str:
    """The name in PRECISIONS of a number format as servers say it: F16, bfloat16, "Q4_K - Medium"; "" for another."""
    word = next(iter(said.lower().removeprefix("all ").split()), "")
    if word in PRECISIONS:
        return word
    kind = word.partition("_")[0]
    bits = kind.removeprefix("i").removeprefix("q")
    few = f"{bits}-bit" if kind.startswith(("q", "iq")) and f"{bits}-bit" in PRECISIONS else ""
    return _SAID.get(kind, few)


def allowed_by_rounding(fixed: Allowed, limits: RoundingLimits) -> Allowed:
    """The tolerances of a server in the number format of `fixed`, where what rounding does was measured.

    No limit is below that of fp32, which other programs' tables and kernels need. Two tokens may each be off by the largest
    difference, so greedy texts may diverge at twice that.
    """
    exact = PRECISIONS["float32"]
    parity = replace(
        fixed.parity,
        mean_kl=max(limits.mean_kl, exact.parity.mean_kl),
        top1_agreement=min(limits.top1_agreement, exact.parity.top1_agreement),
        effect=_LOOSE,  # the limit of mean KL says it
    )
    difference = max(limits.difference, exact.gap)
    metric = max(limits.different_answers, exact.metric)
    return replace(fixed, parity=parity, gap=2 * difference, difference=difference, metric=metric)


def allowed_for(types: Mapping[str, int]) -> Allowed:
    """The tolerances of a file with so many numbers of each type in its matrices: those of the coarsest notable type."""
    total = sum(types.values()) or 1
    rows = [row_of(name) for name, count in types.items() if count / total >= _NOTABLE]
    return max(rows or [F32], key=lambda row: row.rounding)


def row_of(name: str) -> Allowed:
    """The tolerances of a GGUF type; unknown types count as 4 bits."""
    bits = name.partition("_")[0]
    return BY_TYPE.get(name) or BY_BITS.get(bits, Q4)
