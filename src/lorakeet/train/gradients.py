"""Checks of the gradients: all non-zero in the first two steps, and finite in every step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.errors import VerificationFailed
from lorakeet.train.task import KeptTerms

SHOWN = 12


def gradient_norm(parameters: Mapping[str, Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, as a scalar tensor."""
    grads = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def clip(parameters: Mapping[str, Parameter], limit: float, *, norm: Tensor) -> None:
    """Scales all gradients by limit / norm if the norm exceeds the limit; a limit of 0 is off."""
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), limit, norm)


def hold_terms(parameters: Mapping[str, Parameter], kept: KeptTerms) -> None:
    """Sets the gradients of the terms that stay to 0, so that AdamW without weight decay leaves their bits as they are."""
    for name, (dim, count) in kept.items():
        grad = parameters[name].grad
        if grad is not None:
            grad.narrow(dim, 0, count).zero_()


def require_gradients(parameters: Mapping[str, Parameter], step: int) -> None:
    """Raises VerificationFailed that names every trained tensor without a gradient, or with zeros only.

    If a pair starts with B = 0, the gradient of A is zero in step 1 by construction (it is u·x with u = s·g·B), and vice versa
    for A = 0: so one of the two must be non-zero in step 1, and both in step 2. DoRA's magnitudes must be non-zero in step 1.
    Extras only need a gradient: the rows of a new token have a zero gradient in a step without that token.
    """
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    silent: list[str] = []
    for name in parameters:
        path, _, kind = name.rpartition(".")
        partner = f"{path}.B"
        if kind == "magnitude" and partner in parameters and _is_zero(parameters[name]):
            silent.append(name)
        if kind != "A" or partner not in parameters:
            continue
        zero = [which for which in (name, partner) if _is_zero(parameters[which])]
        if len(zero) > (1 if step == 1 else 0):
            silent += zero
    if not missing and not silent:
        return
    found = [f"no gradient: {_listed(missing)}"] * bool(missing) + [f"only zeros: {_listed(silent)}"] * bool(silent)
    raise VerificationFailed(
        f"In step {step} the gradient did not reach every trained tensor; {'; '.join(found)}. Training would not change them. "
        f"{'If the loss jumped in step 1, lower train.learning_rate; else exclude' if step > 1 else 'Exclude'} these "
        "modules with lora.exclude_modules, or report the model."
    )


def fault(parameters: Mapping[str, Parameter], loss: float, norm: Tensor) -> str:
    """Which of a step's loss and gradients is not finite, in words; empty if all are finite."""
    if math.isfinite(loss) and bool(torch.isfinite(norm)):
        return ""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    names = not_finite(parameters)
    where = f" (first in {names[0]})" if names else ""
    return f"the loss is {loss:.4f}, but the gradient is not finite{where}"


def not_finite(parameters: Mapping[str, Parameter]) -> list[str]:
    """Names of the tensors with NaN or infinity in the gradient."""
    return [name for name, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]


def _is_zero(parameter: Parameter) -> bool:
    return parameter.grad is not None and not bool(parameter.grad.any())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
