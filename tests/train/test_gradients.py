"""Gradients that do not arrive are named; clipping equals torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.errors import VerificationFailed
from lorakeet.train.gradients import clip, gradient_norm, not_finite, require_gradients


def pair(a: Tensor | None, b: Tensor | None, extra: Tensor | None) -> dict[str, Parameter]:
    found = {"l.A": Parameter(torch.ones(2, 3)), "l.B": Parameter(torch.ones(3, 2)), "head.weight": Parameter(torch.ones(4))}
    for parameter, grad in zip(found.values(), (a, b, extra), strict=True):
        parameter.grad = grad
    return found


ZERO_A, A, B, EXTRA = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(3, 2), torch.zeros(4)


def test_a_pair_may_have_one_zero_gradient_in_the_first_step_only() -> None:
    require_gradients(pair(ZERO_A, B, EXTRA), 1)
    with pytest.raises(VerificationFailed, match=r"step 2.*only zeros: l\.A\."):
        require_gradients(pair(ZERO_A, B, EXTRA), 2)
    require_gradients(pair(A, B, EXTRA), 2)


def test_two_zero_gradients_are_refused_at_once() -> None:
    with pytest.raises(VerificationFailed, match=r"only zeros: l\.A, l\.B"):
        require_gradients(pair(ZERO_A, torch.zeros(3, 2), EXTRA), 1)


def test_a_length_of_dora_without_gradient_is_refused_at_once() -> None:
    parameters = {**pair(ZERO_A, B, EXTRA), "l.magnitude": Parameter(torch.ones(3))}
    parameters["l.magnitude"].grad = torch.ones(3)
    require_gradients(parameters, 1)
    parameters["l.magnitude"].grad = torch.zeros(3)
    with pytest.raises(VerificationFailed, match=r"step 1.*only zeros: l\.magnitude\."):
        require_gradients(parameters, 1)


def test_missing_gradients_are_all_named() -> None:
    with pytest.raises(VerificationFailed, match=r"no gradient: l\.A, head\.weight"):
        require_gradients(pair(None, B, None), 1)


def test_clipping_scales_the_whole_gradient() -> None:
    parameters = pair(A * 3, B * 4, None)
    norm = gradient_norm(parameters)
    assert norm.item() == pytest.approx((6 * 9 + 6 * 16) ** 0.5)
    clip(parameters, 0.0, norm=norm)
    assert gradient_norm(parameters).item() == pytest.approx(norm.item())
    clip(parameters, 1.0, norm=norm)
    assert gradient_norm(parameters).item() == pytest.approx(1.0, rel=1e-4)
    clip(parameters, 5.0, norm=gradient_norm(parameters))
    assert gradient_norm(parameters).item() == pytest.approx(1.0, rel=1e-4)


def test_not_finite_names_the_tensor() -> None:
    assert not_finite(pair(A, B * float("nan"), None)) == ["l.B"]
