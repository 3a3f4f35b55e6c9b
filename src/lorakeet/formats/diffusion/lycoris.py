"""LyCORIS's LoHa and LoKr modules as dense changes (https://arxiv.org/abs/2309.14859).

    LoHa    ΔW = s·(w1_a·w1_b) ∘ (w2_a·w2_b)             s = alpha/rank, rank = rows of w1_b
    LoKr    ΔW = s·w1 ⊗ w2, either of them a product      s = alpha/rank of the product; 1 where both are whole
    with t  a convolution in Tucker form: T ×₁ a ×₂ b instead of a·b

A convolution (out, in, k, k) that is not in Tucker form is stored as a matrix (out, in·k·k).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def owns(tensor: str) -> bool:
    """True for the names of the tensors of LoHa and LoKr."""
    return tensor.removesuffix(".weight").endswith(tuple(f".{name}" for name in (*LOHA, *LOKR)))


def is_dense(slots: Mapping[str, Tensor]) -> bool:
    """True if the tensors of a module are those of LoHa or LoKr."""
    return any(name in slots for name in (*LOHA, *LOKR))


def algorithm(slots: Mapping[str, Tensor]) -> str:
    """ "LoHa" or "LoKr"."""
    return "LoHa" if any(name in slots for name in LOHA) else "LoKr"


def may_be_convolution(module: str, *, linear: bool = False) -> bool:
    """True if the module at this path may be a convolution.

    The projections around attention are convolutions in SD 1.x; in SD 2.x and SDXL they are `linear`.
    """
    component, _, path = module.partition(".")
    if component == "transformer":
        return path == "pos_embed.proj"
    last = path.rpartition(".")[2]
    return component == "unet" and (last.startswith("conv") or (last in ("proj_in", "proj_out") and not linear))


def unflattened(change: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Reshapes a convolution's change (out, in·k·k) to the `shape` of its weight; any other change is returned unchanged."""
    if shape is None or change.dim() != 2 or len(shape) != 4 or tuple(change.shape) != (shape[0], math.prod(shape[1:])):
        return change
    return change.reshape(shape)


def not_understood(slots: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a module that `lycoris_delta` does not use, sorted: magnitudes, or a pair beside the products."""
    if algorithm(slots) == "LoHa":
        used = set(LOHA)
    else:
        used = {"lokr_w1"} if "lokr_w1" in slots else {"lokr_w1_a", "lokr_w1_b"}
        used |= {"lokr_w2"} if "lokr_w2" in slots else {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    return sorted(set(slots) - used - {"alpha"})


def lycoris_delta(slots: Mapping[str, Tensor], alpha: float | None) -> Tensor | str:
    """ΔW in fp32, or what is wrong with the tensors of this module. Without alpha the scale is 1."""
    try:
        return _loha(slots, alpha) if algorithm(slots) == "LoHa" else _lokr(slots, alpha)
    except KeyError as error:
        return f"is {algorithm(slots)} with {', '.join(sorted(slots))} but without {error.args[0]}"
    except (RuntimeError, ValueError, IndexError):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(slots.items()))
        return f"is {algorithm(slots)} whose shapes do not go together: {shapes}"


def _loha(slots: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    a1, b1, a2, b2 = (slots[name].float() for name in LOHA[:4])
    rank = b1.shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    if "hada_t1" in slots or "hada_t2" in slots:
        return _tucker(slots["hada_t1"], a1, b1) * _tucker(slots["hada_t2"], a2, b2) * scale
    return (a1 @ b1) * (a2 @ b2) * scale


def _lokr(slots: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    whole = "lokr_w1" in slots and "lokr_w2" in slots
    w1 = slots["lokr_w1"].float() if "lokr_w1" in slots else slots["lokr_w1_a"].float() @ slots["lokr_w1_b"].float()
    if "lokr_w2" in slots:
        w2 = slots["lokr_w2"].float()
    elif "lokr_t2" in slots:
        w2 = _tucker(slots["lokr_t2"], slots["lokr_w2_a"].float(), slots["lokr_w2_b"].float())
    else:
        a2, b2 = slots["lokr_w2_a"].float(), slots["lokr_w2_b"].float()
        w2 = (a2 @ b2.flatten(1)).reshape(a2.shape[0], *b2.shape[1:])
    rank = (slots["lokr_w2_b"] if "lokr_w2_b" in slots else slots["lokr_w1_b"]).shape[0] if not whole else 1
    scale = 1.0 if whole or alpha is None else alpha / rank
    if w2.dim() == 4:
        w1 = w1.reshape(*w1.shape, 1, 1)
    return torch.kron(w1, w2.contiguous()) * scale


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Contracts (i, j, k, l) with (i, out) and (j, in) to (out, in, k, l)."""
    return torch.einsum("ijkl,io,jn->onkl", core.float(), a, b)
