"""AdamW over the trained fp32 parameters, with LoRA+'s learning rate for B; its state is a flat mapping of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.errors import ConfigError
from lorakeet.train.adamw_8bit import AdamW8bit, select_moments
from lorakeet.train.spec import TrainSpec


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
        self.adamw: torch.optim.Optimizer = owner(
            groups, lr=0.0, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, weight_decay=spec.weight_decay
        )

    def step(self, learning_rate: float) -> None:
        """Takes one step at `learning_rate` (times the ratio for B), then drops the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.adamw.step()
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
            self.adamw.state[parameter][key] = tensor.clone().to(parameter.device)
