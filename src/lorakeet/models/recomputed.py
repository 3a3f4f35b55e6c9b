"""Blocks that keep their input alone, and are computed once more in the backward pass: less memory, a third more arithmetic.

    forward   block 0 … k−1    each keeps its input, (1, tokens, hidden)
              block k … n−1    keep what their backward pass needs
    backward  block k−1 … 0    computed again with gradients from the kept input, then differentiated

The operations are those of a block that keeps everything, with the same random numbers, so that gradients are equal to the last
bit; states of generators are kept where a block may draw some. Weights stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree  # torch offers no public name

from lorakeet.core.layers.linear import BlockReplacement
from lorakeet.models import modules
from lorakeet.models.families import Family
from lorakeet.models.streaming.model import NotStreamed, plain_output


def recompute_blocks(model: nn.Module, family: Family, *, keep: int) -> int:
    """Makes all but the last `keep` decoder blocks keep their input alone; returns how many that are.

    Raises NotStreamed for a model whose blocks do not run one after another, each once, or use what an earlier block made.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config") and int(getattr(config.get_text_config(), "num_kv_shared_layers", None) or 0):
        raise NotStreamed("Blocks of this model use keys and values of earlier ones, so none can be computed again.")
    prefix, blocks = modules.block_prefix(model, family)
    if not modules.blocks_run_once(model, family):
        raise NotStreamed("The blocks of this model do not run one after another, each once, so none can be computed again.")
    draws = modules.set_to_draw(model)
    for number in range(blocks - keep):
        path = f"{prefix}.{number}"
        block = cast(nn.Module, modules.find(model, path))
        modules.replace(model, path, RecomputedBlock(block, draws=draws).train(block.training))
    return max(0, blocks - keep)


class RecomputedBlock(BlockReplacement):
    """Wraps a decoder block that is computed again in the backward pass; without gradients it computes as it is.

    `draws`: whether it may draw random numbers though none of its modules drops some.
    """

    def __init__(self, original: nn.Module, *, draws: bool) -> None:
        super().__init__(original)
        self._draws = draws

    def forward(self, states: Tensor, *args: Any, **settings: Any) -> Any:
        trained = [parameter for parameter in self.original.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled() or not (trained or states.requires_grad):
            return self.original(states, *args, **settings)
        if any(isinstance(part, Tensor) and part.requires_grad for part in pytree.tree_leaves((args, settings))):
            raise NotStreamed("Blocks of this model get trained inputs beside the hidden states, so none can be computed again.")

        def computed(given: Tensor) -> Tensor:
            return plain_output(self.original(given, *args, **settings))

        draws = self._draws or modules.drops_numbers(self.original)  # pairs that drop may have come since
        return ComputedAgain.apply(computed, draws, states, *trained)  # type: ignore[no-untyped-call]


class ComputedAgain(torch.autograd.Function):
    """A function of states and parameters that keeps the states alone for its backward pass."""

    @staticmethod
    def forward(ctx: Any, computed: Callable[[Tensor], Tensor], draws: bool, states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.computed, ctx.random = computed, _random_state(states.device) if draws else ()
        ctx.save_for_backward(states, *parameters)
        return computed(states)  # gradients are off in here

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        given = states.detach().requires_grad_(wanted)
        with torch.enable_grad(), _drawing_from(ctx.random, states.device):
            output = ctx.computed(given)
        found = torch.autograd.grad(output, [*([given] if wanted else []), *parameters], grad, allow_unused=True)
        return None, None, *([] if wanted else [None]), *found


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators of the CPU and of a CUDA device."""
    on_device = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return torch.get_rng_state(), *on_device


@contextmanager
def _drawing_from(state: tuple[Tensor, ...], device: torch.device) -> Iterator[None]:
    """A context in which random numbers are drawn from `state`, and after which they go on as before; nothing for no state."""
    if not state:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        for on_device in state[1:]:
            torch.cuda.set_rng_state(on_device, device)
        yield
