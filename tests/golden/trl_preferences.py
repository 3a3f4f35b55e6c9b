"""Records what TRL's trainers make of made-up log-probabilities: run it where trl 1.16 is installed.

Writes trl_preferences.json beside it, which tests/kinds/preference/test_loss.py compares with.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import trl
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

TOKENS = ((5, 3), (2, 6), (4, 4))  # of the chosen and the rejected answer of each pair
LONGEST = 6


def made_up(seed: int) -> tuple[Tensor, Tensor]:
    """log p of each token, chosen rows first, (2 pairs, LONGEST + 1), and the mask of the answers' tokens."""
    generator = torch.Generator().manual_seed(seed)
    counts = [both[0] for both in TOKENS] + [both[1] for both in TOKENS]
    mask = torch.stack([torch.arange(LONGEST + 1) < count for count in counts]).float()
    return -torch.rand(len(counts), LONGEST + 1, generator=generator) * 2 * mask, mask


def accelerator() -> Any:
    found = MagicMock()
    found.device, found.gather_for_metrics = torch.device("cpu"), lambda value: value
    return found


def with_mask(mask: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(mask), 1), mask], dim=1)  # TRL drops the first column, which nothing predicts


def model_of(log_probs: Tensor) -> Any:
    outputs = MagicMock()
    outputs.log_probs = log_probs
    for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
        setattr(outputs, name, torch.zeros_like(log_probs))
    outputs.is_top1 = torch.zeros_like(log_probs, dtype=torch.bool)
    return lambda **_: outputs


def dpo(kind: str, beta: float) -> dict[str, Any]:
    (policy, mask), (fixed, _) = made_up(0), made_up(1)
    policy.requires_grad_()
    sums = fixed.sum(1).chunk(2)
    trainer = MagicMock()
    trainer.loss_types, trainer.loss_weights, trainer.beta = [kind], [1.0], beta
    trainer.accelerator, trainer.ld_alpha, trainer.precompute_ref_logps = accelerator(), None, True
    trainer.f_divergence_type, trainer.use_weighting, trainer.aux_loss_enabled = "reverse_kl", False, False
    trainer._metrics = {"train": MagicMock(), "eval": MagicMock()}
    inputs = {
        "input_ids": torch.zeros(len(mask), LONGEST + 2, dtype=torch.long), "attention_mask": torch.ones(len(mask), LONGEST + 2),
        "completion_mask": with_mask(mask).long(), "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1],
    }  # fmt: skip
    model = MagicMock(side_effect=model_of(policy))
    model.training = True
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return {"loss": loss.item(), "gradient": torch.autograd.grad(loss, policy)[0].tolist()}


def kto(beta: float, desirable: float, undesirable: float) -> dict[str, Any]:
    (policy, mask), (fixed, _), (other, _), (fixed_other, _) = (made_up(seed) for seed in range(4))
    policy.requires_grad_()
    trainer = MagicMock()
    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = beta, desirable, undesirable
    trainer.loss_type, trainer.calculate_KL, trainer.precompute_ref_logps = "kto", True, True
    trainer.accelerator, trainer.aux_loss_enabled = accelerator(), False
    trainer._compute_kl_logps = lambda model, batch: other.sum(1)
    trainer._metrics = {"train": MagicMock(), "eval": MagicMock()}
    rows = len(mask)
    inputs = {
        "input_ids": torch.zeros(rows, LONGEST + 2, dtype=torch.long), "attention_mask": torch.ones(rows, LONGEST + 2),
        "completion_mask": with_mask(mask).long(), "label": torch.tensor([True, False, True, True, False, False]),
        "ref_logps": fixed.sum(1), "ref_KL_logps": fixed_other.sum(1),
    }  # fmt: skip
    model = MagicMock(side_effect=model_of(policy))
    model.training = True
    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    kl = max(0.0, float((other.sum(1) - fixed_other.sum(1)).mean()))
    gradient = torch.autograd.grad(loss, policy)[0].tolist()
    return {"loss": loss.item(), "gradient": gradient, "kl": kl, "labels": inputs["label"].tolist()}


def without_reference() -> dict[str, Any]:
    found = {}
    for name, trainer in (("orpo", ORPOTrainer), ("simpo", CPOTrainer), ("simpo smoothed", CPOTrainer)):
        policy, mask = made_up(0)
        policy.requires_grad_()
        chosen, rejected = (policy.sum(1) / mask.sum(1)).chunk(2)
        settings = SimpleNamespace(
            beta=0.25 if name == "orpo" else 2.0, accelerator=accelerator(), alpha=0.0, loss_type="simpo", simpo_gamma=1.0,
            label_smoothing=0.1 if name == "simpo smoothed" else 0.0,
        )  # fmt: skip
        if name == "orpo":  # whose trainer subtracts the mean of what this returns from the loss of the chosen answers
            loss = -trainer.odds_ratio_loss(settings, chosen, rejected)[0].mean()
        else:
            loss = trainer.cpo_loss(settings, chosen, rejected)[0].mean()
        found[name] = {"loss": loss.item(), "gradient": torch.autograd.grad(loss, policy)[0].tolist()}
    return found


def main() -> None:
    found: dict[str, Any] = {
        "trl": trl.__version__, "tokens": TOKENS,
        "log_probs": {str(seed): made_up(seed)[0].tolist() for seed in range(4)},
        "dpo": dpo("sigmoid", 0.3), "dpo normalised": dpo("sigmoid_norm", 3.0), "ipo": dpo("ipo", 0.4),
        "kto": kto(0.3, 1.2, 0.7), **without_reference(),
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
