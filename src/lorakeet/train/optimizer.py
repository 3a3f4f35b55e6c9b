"""AdamW over the trained fp32 parameters, with LoRA+'s learning rate for B; its state is a flat mapping of tensors.

Moments of 8 bits are quantised by block on a dynamic grid (Dettmers et al., https://arxiv.org/abs/2110.02861). A moment is stored
in blocks of 256 numbers: the largest magnitude, and for each number the nearest of 256 values between −1 and 1 (dynamic tree
quantisation: seven decades, finer near the top). The second moment is stored as its square root on a grid from 0 to 1: that
covers twice as many decades, and is the divisor of a step. Positive values stay positive. A step dequantises the moments to fp32,
a piece at a time, applies AdamW, and quantises again. Deterministic: the same numbers give the same bytes on every run. Tensors
below 4,096 numbers keep fp32 moments, as in bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.errors import ConfigError
from lorakeet.train.spec import TrainSpec

BLOCK = 256
SMALLEST = 4096  # numbers of the smallest tensor with quantised moments
_PIECE = 1 << 18  # numbers of a moment in fp32 at once
_DECADES = 7


def is_b(name: str) -> bool:
    """True for the B of a pair: its name ends in `.B`."""
    return name.rpartition(".")[2] == "B"


class Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) with two groups: B, and everything else."""

    def __init__(self, parameters: Mapping[str, Parameter], spec: TrainSpec) -> None:
        wrong = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
        if wrong or not parameters:
            what = f"not in fp32: {', '.join(wrong[:8])}" if wrong else "none"
            raise ConfigError(f"The trained parameters are {what}; expected one or more, in fp32. Check lora.target_modules.")
        self.parameters = dict(parameters)
        self.ratio = spec.b_learning_rate_ratio
        others = [parameter for name, parameter in parameters.items() if not is_b(name)]
        bs = [parameter for name, parameter in parameters.items() if is_b(name)]
        groups = [{"params": group, "factor": factor} for group, factor in ((others, 1.0), (bs, self.ratio)) if group]
        owner: Any = AdamW8bit if spec.moments == "8bit" else partial(torch.optim.AdamW, fused=True)
        self.counts_on_cpu = owner is AdamW8bit  # its step counts are numbers of the host, on every device
        self.adamw: torch.optim.Optimizer = owner(
            groups, lr=0.0, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, weight_decay=spec.weight_decay
        )

    def step(self, learning_rate: float) -> None:
        """Takes one step at `learning_rate` (times the ratio for B), then drops the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.adamw.step()
        torch.autograd.graph.increment_version(list(self.parameters.values()))  # which torch's fused AdamW leaves as it was
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The moments and step counts, not copied, by `parameter|moment`; empty before the first step."""
        return {
            f"{name}|{key}": value.detach().cpu()
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def keep(self, name: str, shape: torch.Size, dim: int, indices: Tensor) -> None:
        """Keeps only `indices` of dimension `dim` in the moments of a parameter that had `shape`."""
        state = self.adamw.state.get(self.parameters[name])
        if state:
            state.update(select_moments(state, shape, dim, indices.to(self.parameters[name].device)))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores the result of `state`, bit for bit."""
        self.adamw.state.clear()
        for name, tensor in state.items():
            parameter_name, _, key = name.rpartition("|")
            parameter = self.parameters[parameter_name]
            device = torch.device("cpu") if key == "step" and self.counts_on_cpu else parameter.device
            self.adamw.state[parameter][key] = tensor.clone().to(device)


class AdamW8bit(torch.optim.Optimizer):
    """torch's AdamW with its moments stored in 8 bits."""

    def __init__(self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step over every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        settings = _Settings(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        if not state:
            state |= _first_state(parameter)
        state["step"] += 1
        if "exp_avg" in state:
            first, second = state["exp_avg"], state["exp_avg_sq"]
            _advance(parameter, cast(Tensor, parameter.grad), first, second, state["step"], settings)
            return
        moments = [state[name] for name in ("first_codes", "first_scales", "second_codes", "second_scales")]
        gradient = cast(Tensor, parameter.grad).reshape(-1)
        _advance_in_pieces(parameter.view(-1), gradient, moments, state["step"], settings)


def _first_state(parameter: Tensor) -> dict[str, Tensor]:
    count, device = parameter.numel(), parameter.device
    state = {"step": torch.zeros((), dtype=torch.float32)}
    if count < SMALLEST:
        return state | {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    for name, code in (("first", _values(True).index(0.0)), ("second", 0)):
        state[f"{name}_codes"] = torch.full((count,), code, dtype=torch.uint8, device=device)
        state[f"{name}_scales"] = torch.zeros(-(-count // BLOCK), device=device)
    return state


class _Settings(NamedTuple):
    """The numbers of a group."""

    rate: float
    betas: tuple[float, float]
    epsilon: float
    decay: float


def _advance_in_pieces(flat: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: Tensor, settings: _Settings) -> None:
    """The step of `_advance` on all numbers (n,) of a parameter, a piece at a time.

    `moments` of 8 bits: codes (n,) and scales of the first, and of the second.
    """
    first_codes, first_scales, second_codes, second_scales = moments
    for at in range(0, flat.numel(), _PIECE):
        piece = slice(at, at + _PIECE)
        blocks = slice(at // BLOCK, -(-min(at + _PIECE, flat.numel()) // BLOCK))
        first = dequantise_moments(first_codes[piece], first_scales[blocks], signed=True)
        second = dequantise_moments(second_codes[piece], second_scales[blocks], signed=False).square_()
        _advance(flat[piece], gradient[piece], first, second, step, settings)
        first_codes[piece], first_scales[blocks] = quantise_moments(first, signed=True)
        second_codes[piece], second_scales[blocks] = quantise_moments(second.sqrt_(), signed=False)


def _advance(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: Tensor, settings: _Settings
) -> None:
    """AdamW's step (https://arxiv.org/abs/1711.05101) in place, on tensors of one shape: m and v, then the parameter.

    `step` is a number on the CPU, which operations on a device take as it is.
    """
    rate, (beta1, beta2), epsilon, decay = settings
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.mul_(1 - rate * decay)
    below = second.sqrt().div_((1 - beta2**step).sqrt()).add_(epsilon)
    parameter.sub_(first / below * (rate / (1 - beta1**step)))


@cache
def _values(signed: bool) -> tuple[float, ...]:
    """The 256 values of the dynamic grid, ascending: decade −k has 2^(6−k) values of each sign (unsigned: twice as many)."""
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        count = 2 ** (decade + (0 if signed else 1))
        middles = [(0.1 + 0.9 * (index + 0.5) / count) * 10.0 ** (decade + 1 - _DECADES) for index in range(count)]
        found += [*middles, *(-value for value in middles if signed)]
    return tuple(sorted(found))


def select_moments(state: dict[str, Tensor], shape: torch.Size, dim: int, indices: Tensor) -> dict[str, Tensor]:
    """Selects `indices` of dimension `dim` from the moments of a parameter of `shape`; empties `state`.

    8-bit moments are dequantised and quantised again, since block borders move. A tensor keeps its precision, however small
    it gets.
    """
    found = {"step": state.pop("step")}
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            found[name] = state.pop(name).index_select(dim, indices)
    for name, signed in (("first", True), ("second", False)):
        if f"{name}_codes" in state:
            whole = dequantise_moments(state.pop(f"{name}_codes"), state.pop(f"{name}_scales"), signed=signed)
            kept = whole.view(shape).index_select(dim, indices).view(-1)
            found[f"{name}_codes"], found[f"{name}_scales"] = quantise_moments(kept, signed=signed)
    return found


def grid(*, signed: bool) -> Tensor:
    """The grid (256,) in fp32."""
    return torch.tensor(_values(signed))


def _grid_for(like: Tensor, *, signed: bool) -> Tensor:
    """The grid on the device of `like`; what it was copied to is kept, but for a fake tensor (of a step on shapes)."""
    if like.device.type == "cpu" or hasattr(like, "fake_mode"):
        return grid(signed=signed).to(like.device)
    found = _GRIDS.get((signed, like.device))
    if found is None:
        found = _GRIDS[signed, like.device] = grid(signed=signed).to(like.device)
    return found


_GRIDS: dict[tuple[bool, torch.device], Tensor] = {}


def quantise_moments(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of the grid values nearest to `values` (n,), and scales (n/256,). Unsigned, positives stay positive."""
    count = values.numel()
    short = -count % BLOCK
    blocks = torch.nn.functional.pad(values, (0, short)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    steps = _grid_for(values, signed=signed)
    codes = torch.bucketize(shares, (steps[1:] + steps[:-1]) / 2, out_int32=True)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8).view(-1)[:count], scales


def dequantise_moments(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Dequantises codes and scales to (n,) fp32."""
    shares = _grid_for(codes, signed=signed)[codes.int()]
    return shares * scales.repeat_interleave(BLOCK)[: codes.numel()]
