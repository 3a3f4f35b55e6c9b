"""PEFT's layout of pairs on the 3-D parameters of a mixture-of-experts block (`target_parameters`).

PEFT wraps a module once per targeted parameter, in the order in which the module registers its parameters. So a tensor's name has
its nesting depth, and not the name of its parameter:

    mlp.experts.base_layer.lora_A.weight    gate_up_proj, registered first, innermost
    mlp.experts.lora_A.weight               down_proj, wrapped around it

    on disk                           here
    lora_A  (E·rank, in)              A (E, rank, in)     the expert is the slow axis of A's rows …
    lora_B  (out, rank·E)             B (E, out, rank)    … and the fast axis of B's columns
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lorakeet.formats.peft.peft_config import PeftConfig

NESTED = ".base_layer"
_REGISTERED = ("gate_up_proj", "down_proj")  # the order in which the blocks of transformers 5 register them


def parameters_at(config: PeftConfig, path: str) -> list[str]:
    """The parameters of the module at `path` that target_parameters names."""
    found = {target.rpartition(".")[2] for target in config.target_parameters if _names(target, path)}
    return sorted(found, key=_registration)


def _names(target: str, path: str) -> bool:
    whole = f"{path}.{target.rpartition('.')[2]}"
    return whole == target or whole.endswith(f".{target}")


def _registration(name: str) -> tuple[int, str]:
    return (_REGISTERED.index(name) if name in _REGISTERED else len(_REGISTERED), name)


def assign(config: PeftConfig, path: str, depths: Iterable[int]) -> dict[int, str] | str:
    """The parameter of each nesting depth of the pairs at `path`, or what is wrong. Depth 0 is the outermost."""
    names = parameters_at(config, path)
    levels = sorted(depths, reverse=True)  # innermost, registered first, comes first
    if len(names) != len(levels) or levels != list(range(len(levels)))[::-1]:
        return (
            f"{path} has {len(levels)} pairs on its parameters, and target_parameters names {len(names)} "
            f"({', '.join(names) or 'none'}), so it is unclear which pair belongs to which."
        )
    if len(names) > 1 and not set(names) <= set(_REGISTERED):
        return f"{path} has pairs on {', '.join(names)}; the order of nesting is known for {' and '.join(_REGISTERED)} only."
    return dict(zip(levels, names, strict=True))


def order_on_disk(parameters: Iterable[str]) -> dict[str, int]:
    """The nesting depth of each of the parameters of a module, as PEFT wraps them."""
    names = sorted(parameters, key=_registration)
    return {name: len(names) - 1 - index for index, name in enumerate(names)}


def unpack_experts(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor] | str:
    """Reshapes (E·rank, in) and (out, rank·E) to A (E, rank, in) and B (E, out, rank); or returns what is wrong."""
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] % rank or A.shape[0] != B.shape[1]:
        return f"has A {tuple(A.shape)} and B {tuple(B.shape)}; expected (experts·{rank}, in) and (out, {rank}·experts)"
    experts = A.shape[0] // rank
    return (A.reshape(experts, rank, A.shape[1]).contiguous(), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1).contiguous())


def pack_experts(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Reshapes A (E, rank, in) and B (E, out, rank) to (E·rank, in) and (out, rank·E); the inverse of `unpack_experts`."""
    experts, rank, width = A.shape
    return A.reshape(experts * rank, width), B.permute(1, 2, 0).reshape(B.shape[1], rank * experts)
