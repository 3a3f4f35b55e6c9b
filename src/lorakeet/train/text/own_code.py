"""Compares one pass, forward and backward, with transformers' own code on the first rows of a run.

Fused blocks, packed rows, shared prefixes and the head in chunks must give the loss and the gradients of the untouched modules,
one row at a time with eager attention. Probes of single modules (models/fuse) cannot show how blocks are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.errors import EnvironmentProblem, is_of_the_device
from lorakeet.models import modules
from lorakeet.models.files.validate import first_line
from lorakeet.models.text.adapters import own_modules
from lorakeet.models.text.model import TextModel
from lorakeet.quant.int8 import exact_products
from lorakeet.train.text.loss import head_losses

ROWS, TOKENS = 2, 32  # how many rows are compared, and the last tokens of each
TARGETS = 12  # of them are predicted: few, so that the last block computes few tokens, as in training
SMALLEST = 1e-3  # gradients below this share of the largest one are compared with that
SURE = 0.01  # nats; below this, a gradient is little more than rounding
SCALE = 2.0**10  # of losses in float16, where small gradients would become 0; both sides have it
NOISE = 3  # times what rounding does to the model's own gradients: some random models amplify it without bound
EXACT, ROUNDED = 1e-2, 0.5  # largest relative difference, all in fp32, or in fewer bits; a wrong block gives 0.8


@dataclass(frozen=True)
class OwnCodeDifference:
    """How far the losses and gradients are from those of the model's own code."""

    rows: int
    tokens: int
    loss: float  # largest difference of a target's loss, in nats
    gradient: float  # norm of the difference of a trained tensor's gradients, relative to its norm: the largest, or the median
    median: bool  # whether `gradient` is the median
    worst: str  # the tensor with the largest
    exact: bool  # all is computed in fp32
    sure: bool = False  # the base predicts every target, so that there is no gradient to compare
    noise: float = 0.0  # `gradient` between two passes of the model's own code, one of embeddings that are rounded otherwise

    @property
    def allowed(self) -> float:
        """What rounding explains of `gradient`, and in fp32 of `loss` too."""
        return EXACT if self.exact else max(ROUNDED, NOISE * self.noise)

    @property
    def passed(self) -> bool:
        """True if rounding explains the differences."""
        same_loss = self.loss <= self.allowed or not self.exact
        return same_loss and (self.sure or self.gradient <= self.allowed)


def compare_with_own_code(text: TextModel, parameters: Mapping[str, Parameter], rows: Sequence[Example]) -> OwnCodeDifference:
    """Compares the loss and the gradients of `parameters` on the last tokens of the first rows. Leaves no gradient behind.

    With fewer bits than fp32 the median tensor of a mixture of experts counts, as rounding sends tokens to other experts there.
    ValueError if no row has two tokens; EnvironmentProblem if the model's code fails.
    """
    examples = [_last_tokens(row) for row in islice((row for row in rows if len(row.ids) > 1), ROWS)]
    batch = pack_examples(examples).to(text.device)
    training = text.model.training
    text.model.eval()
    try:
        with exact_products(text.model):  # int8 rounds activations, which differ in their last bits
            ours = head_losses(text, text.hidden(batch), batch.target_ids)
            scale = SCALE if text.dtype == torch.float16 else 1.0
            our_gradients = _gradients(scale * ours, parameters)
            with own_modules(text):
                own = torch.cat([_own_losses(text, example) for example in examples])
                own_gradients = _gradients(scale * own, parameters)
                off, exact = _relative(our_gradients, own_gradients), {text.products, text.dtype} == {torch.float32}
                noise: dict[str, float] = {}
                if not exact and max(off.values()) > ROUNDED:
                    with _rounded_otherwise(text):
                        again = torch.cat([_own_losses(text, example) for example in examples])
                        noise = _relative(_gradients(scale * again, parameters), own_gradients)
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:  # of the model's own code
        if is_of_the_device(error):
            raise
        raise EnvironmentProblem(
            f"'{text.model.config.model_type}' models cannot be trained in {text.dtype}: their code fails with pairs "
            f"({first_line(error)}). Nothing was trained. Try another model.dtype."
        ) from error
    finally:
        text.model.train(training)
    worst = max(off, key=lambda name: off[name])
    routed = not exact and any(modules.expert_stacks(module) for module in text.model.modules())
    return OwnCodeDifference(
        rows=len(examples),
        tokens=len(batch.ids),
        loss=float((ours - own).detach().abs().max()),
        gradient=median(off.values()) if routed else off[worst],
        median=routed,
        worst=worst,
        exact=exact,
        sure=float(own.detach().max()) < SURE,
        noise=max(noise.values(), default=0.0),
    )


def _relative(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of the difference of each tensor's gradients, relative to its own norm."""
    largest = max((float(gradient.norm()) for gradient in own.values()), default=0.0)
    return {
        name: float((found[name] - gradient).norm()) / max(float(gradient.norm()), SMALLEST * largest, 1e-30)
        for name, gradient in own.items()
    }


@contextmanager
def _rounded_otherwise(text: TextModel) -> Iterator[None]:
    """A context in which each number of the input embeddings is off by about half of bfloat16's rounding."""
    generator = torch.Generator().manual_seed(0)

    def off(module: nn.Module, given: object, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device, torch.float32)
        return (output.float() * (1 + torch.finfo(torch.bfloat16).eps / 2 * noise)).to(output.dtype)

    hook = text.model.get_input_embeddings().register_forward_hook(off)
    try:
        yield
    finally:
        hook.remove()


def require_own_code(text: TextModel, parameters: Mapping[str, Parameter], rows: Sequence[Example]) -> OwnCodeDifference:
    """The same; raises EnvironmentProblem where rounding does not explain the difference."""
    found = compare_with_own_code(text, parameters, rows)
    if found.passed:
        return found
    raise EnvironmentProblem(
        f"'{text.model.config.model_type}' models cannot be trained: on {found.tokens} tokens, gradients are "
        f"{found.gradient:.2g} of their size away from those of the model's own code, and losses {found.loss:.2g} nats; rounding "
        f"explains {found.allowed:g} (worst: {found.worst}). Nothing was trained. Please report this model."
    )


def _last_tokens(row: Example) -> Example:
    """The row's last tokens, of which the last ones are targets, whatever the run trains: a base is rarely sure of all."""
    ids = row.ids[-TOKENS:]
    supervised = np.arange(len(ids)) >= max(len(ids) - TARGETS, (len(ids) + 1) // 2, 1)
    return Example(ids, supervised, row.key, row.label, row.truncated)


def _own_losses(text: TextModel, example: Example) -> Tensor:
    """−log p of each target (targets,), by the model's own forward pass over this row alone."""
    ids = torch.from_numpy(example.ids).to(text.device, torch.int64)
    logits = text.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    at = torch.from_numpy(example.supervised[1:]).to(text.device)
    return nn.functional.cross_entropy(logits[at], ids[1:][at], reduction="none")


def _gradients(losses: Tensor, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(parameter) if gradient is None else gradient for (name, parameter), gradient in pairs}
