"""The losses of preference tuning, as functions of the answers' log-probabilities: one formula each.

For a pair, c and r are the summed log-probabilities of the chosen and the rejected answer (log p(answer | prompt)), c₀ and r₀
those of the reference, n_c and n_r the answers' tokens. σ is the logistic function. With

    h = (c − c₀) − (r − r₀)        how much more the model prefers the chosen answer than the reference does

    dpo     −log σ(βh)                                           arXiv 2305.18290, equation 7
    cdpo    −(1−ε)·log σ(βh) − ε·log σ(−βh)                      Mitchell 2023, "A note on DPO with noisy preferences"
    ipo     (h' − 1/(2β))²,  h' with each answer divided by its tokens        arXiv 2310.12036, equation 17, β there τ
    simpo   −(1−ε)·log σ(βm − γ) − ε·log σ(γ − βm),  m = c/n_c − r/n_r        arXiv 2405.14734, equation 6
    orpo    −λ·log σ(log odds(c/n_c) − log odds(r/n_r)),  log odds(x) = x − log(1 − eˣ)     arXiv 2403.07691, equation 7
    kto     w₊·(1 − σ(β((a − a₀) − z)))  for an answer that is wanted,
            w₋·(1 − σ(β(z − (a − a₀))))  for one that is not, z an estimate of KL(model ‖ reference) ≥ 0  arXiv 2402.01306, eq. 8

and `sft_weight` · (−c/n_c) added, where it is above 0. With `length_normalised`, c, r, c₀ and r₀ of dpo and cdpo are divided by
the answers' tokens. The reference and z have no gradient. At the start, where the model is the reference, h = 0: dpo is ln 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lorakeet.kinds.preference.spec import PreferenceSpec


@dataclass(frozen=True, eq=False)
class PairScores:
    """Summed log-probabilities (n,) of the chosen and rejected answers of n pairs, fp64, and the answers' tokens (n,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def means(self) -> tuple[Tensor, Tensor]:
        """Both divided by the answers' tokens."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def preference_losses(objective: str, spec: PreferenceSpec, policy: PairScores, reference: PairScores | None) -> Tensor:
    """The loss of each pair (n,), with the gradient of `policy`; `spec` is resolved, `reference` None for orpo and simpo."""
    beta, smoothing = spec.beta or 0.0, spec.label_smoothing or 0.0
    if objective == "orpo":
        chosen, rejected = policy.means()
        losses = -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    elif objective == "simpo":
        chosen, rejected = policy.means()
        losses = _smoothed(beta * (chosen - rejected) - (spec.margin or 0.0), smoothing)
    else:
        gap = log_ratio_gap(policy, reference, normalised=bool(spec.length_normalised))
        losses = (gap - 1 / (2 * beta)).square() if objective == "ipo" else _smoothed(beta * gap, smoothing)
    if spec.sft_weight:
        losses = losses - spec.sft_weight * policy.means()[0]
    return losses


def log_ratio_gap(policy: PairScores, reference: PairScores | None, *, normalised: bool) -> Tensor:
    """h of each pair (n,): the log-ratio of the chosen answer less that of the rejected one."""
    if reference is None:
        raise ValueError("this objective compares with a reference, and none was given")
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    if normalised:
        chosen, rejected = chosen / policy.chosen_tokens, rejected / policy.rejected_tokens
    return chosen - rejected


def kto_losses(spec: PreferenceSpec, policy: Tensor, reference: Tensor, desirable: Tensor, kl: float) -> Tensor:
    """The loss of each answer (n,): log-probabilities (n,) of model and reference, whether it is wanted (n,), and z."""
    ratio = policy - reference
    wanted = spec.desirable_weight * torch.sigmoid(-(spec.beta or 0.0) * (ratio - kl))
    unwanted = spec.undesirable_weight * torch.sigmoid(-(spec.beta or 0.0) * (kl - ratio))
    return torch.where(desirable, wanted, unwanted)


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    losses = -(1 - smoothing) * logsigmoid(margin)
    return losses - smoothing * logsigmoid(-margin) if smoothing else losses


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = exp(mean): near p = 1, 1 − p is −expm1(mean), so that no digit is lost."""
    mean = mean.clamp(max=-1e-9)  # of an answer that the model is sure of: the odds stay finite
    return mean - torch.log(-torch.expm1(mean))
