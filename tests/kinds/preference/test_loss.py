"""Each objective's formula: TRL's values and gradients on the same numbers, and what each formula says at its edges."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.kinds.preference.loss import PairScores, kto_losses, log_ratio_gap, preference_losses
from lorakeet.kinds.preference.spec import PreferenceSpec
from structure.tree import ROOT

TRL: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "trl_preferences.json").read_text())
CASES = {
    "dpo": ("dpo", {"beta": 0.3}),
    "dpo normalised": ("dpo", {"beta": 3.0, "length_normalised": True}),
    "ipo": ("ipo", {"beta": 0.4}),
    "orpo": ("orpo", {"beta": 0.25, "sft_weight": 0.0}),  # TRL adds the loss of prompt and answer, Lorakeet that of the answer
    "simpo": ("simpo", {"beta": 2.0, "margin": 1.0}),
    "simpo smoothed": ("simpo", {"beta": 2.0, "margin": 1.0, "label_smoothing": 0.1}),
}


def recorded(seed: int) -> Tensor:
    return torch.tensor(TRL["log_probs"][str(seed)], dtype=torch.float32)


def scores(log_probs: Tensor) -> PairScores:
    """Chosen rows first, as TRL has them."""
    chosen, rejected = log_probs.double().sum(1).chunk(2)
    counts = torch.tensor(TRL["tokens"], dtype=torch.float64)
    return PairScores(chosen, rejected, counts[:, 0], counts[:, 1])


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_trls(case: str) -> None:
    objective, settings = CASES[case]
    spec, policy = PreferenceSpec(**settings).resolved(objective), recorded(0).requires_grad_()
    loss = preference_losses(objective, spec, scores(policy), scores(recorded(1))).mean()
    assert loss.item() == pytest.approx(TRL[case]["loss"], rel=1e-5)
    gradient = torch.autograd.grad(loss, policy)[0]
    theirs = torch.tensor(TRL[case]["gradient"])
    answers = policy != 0  # TRL gives padding a gradient too, which no token has
    torch.testing.assert_close(gradient[answers], theirs[answers], rtol=1e-5, atol=1e-6)


def test_kto_is_trls() -> None:
    spec = PreferenceSpec(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7).resolved("kto")
    policy, recorded_kto = recorded(0).requires_grad_(), TRL["kto"]
    wanted = torch.tensor(recorded_kto["labels"])
    losses = kto_losses(spec, policy.double().sum(1), recorded(1).double().sum(1), wanted, recorded_kto["kl"])
    assert losses.mean().item() == pytest.approx(recorded_kto["loss"], rel=1e-5)
    gradient = torch.autograd.grad(losses.mean(), policy)[0]
    torch.testing.assert_close(gradient[policy != 0], torch.tensor(recorded_kto["gradient"])[policy != 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "cdpo"])
def test_a_model_that_is_its_reference_loses_ln_2(objective: str) -> None:
    same = scores(recorded(0))
    losses = preference_losses(objective, PreferenceSpec().resolved(objective), same, same)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-15)


def test_smoothing_takes_a_share_of_the_pairs_as_swapped() -> None:
    spec = PreferenceSpec(label_smoothing=0.2).resolved("cdpo")
    policy, reference = scores(recorded(0)), scores(recorded(1))
    swapped = (PairScores(each.rejected, each.chosen, each.rejected_tokens, each.chosen_tokens) for each in (policy, reference))
    plain = replace(spec, label_smoothing=0.0)
    mixed = 0.8 * preference_losses("dpo", plain, policy, reference) + 0.2 * preference_losses("dpo", plain, *swapped)
    torch.testing.assert_close(preference_losses("cdpo", spec, policy, reference), mixed)


def test_the_sft_weight_adds_the_chosen_answers_loss_in_nats_a_token() -> None:
    spec = PreferenceSpec().resolved("dpo")
    policy, reference = scores(recorded(0)), scores(recorded(1))
    added = preference_losses("dpo", replace(spec, sft_weight=0.5), policy, reference)
    plain = preference_losses("dpo", spec, policy, reference)
    torch.testing.assert_close(added - plain, -0.5 * policy.chosen / policy.chosen_tokens)


def test_an_answer_that_the_model_is_sure_of_has_finite_odds() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.ones(1, dtype=torch.float64)
    losses = preference_losses("orpo", PreferenceSpec().resolved("orpo"), PairScores(zero, -one, one, one), None)
    assert math.isfinite(losses.item())


def test_a_reference_must_be_there() -> None:
    with pytest.raises(ValueError, match="reference"):
        log_ratio_gap(scores(recorded(0)), None, normalised=False)
