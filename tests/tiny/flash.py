"""torch's flash kernel for a card, written out for the CPU by its definition: the stand-in that tests compute with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.device import standing_for

CARD = torch.device("cuda")

Part = tuple[list[Tensor], Tensor, Tensor, Tensor]


class Flash:
    """The kernel by its definition; `aligned` False: queries are counted from a sequence's begin, as they are not; `exact` False:
    the longest sequence may be shorter than is said; `unit` ln 2: log-sums are of base 2, as they are not."""

    def __init__(self) -> None:
        self.aligned, self.refuses, self.exact, self.calls = True, False, True, 0
        self.efficient_calls, self.unit = 0, 1.0

    def scores_seen(self, queries: int, keys: int, causal: bool, left: int, right: int) -> Tensor:
        own = torch.arange(queries)[:, None] + (keys - queries if self.aligned else 0)
        key = torch.arange(keys)
        right = 0 if causal else right
        seen = (key <= own + right) if right >= 0 else torch.ones(queries, keys, dtype=torch.bool)
        return seen & (key >= own - left) if left >= 0 else seen

    def parts(self, states: tuple[Tensor, ...], given: tuple[Any, ...], window: dict[str, int]) -> Iterator[Part]:
        """The sequences: q and what lies as it does (heads, queries, d), k and v of every head, and which scores count."""
        starts_q, starts_k, most_q, most_k, dropout, causal = given[:6]
        q, k, v, *like_q = states
        assert starts_q.dtype == starts_k.dtype == torch.int32 and dropout == 0
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        queries, keys = starts_q.diff().tolist(), starts_k.diff().tolist()
        rooms = most_q - max(queries), most_k - max(keys)
        assert rooms == (0, 0) if self.exact else min(rooms) >= 0
        assert (starts_q[-1], starts_k[-1]) == (len(q), len(k))  # every token is some sequence's: the kernel writes no other
        groups = q.shape[1] // k.shape[1]
        cut = [torch.split(each, queries) for each in (q, *like_q)]
        for number, (own_k, own_v) in enumerate(zip(torch.split(k, keys), torch.split(v, keys), strict=True)):
            sides = window["window_size_left"], window["window_size_right"]
            seen = self.scores_seen(queries[number], keys[number], causal, *sides)
            of_q = [each[number].float().transpose(0, 1) for each in cut]
            yield of_q, *(each.float().repeat_interleave(groups, 1).transpose(0, 1) for each in (own_k, own_v)), seen

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *given: Any, scale: float, **window: Any) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.refuses:
            raise RuntimeError("no kernel image is available for execution on the device")
        outs, logs = [], []
        for (own_q,), keys, values, seen in self.parts((q, k, v), given, window):
            scores = (own_q @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
            outs.append((scores.softmax(-1) @ values).transpose(0, 1))
            logs.append(scores.logsumexp(-1) / self.unit)
        nothing = torch.empty(0)
        return torch.cat(outs).to(q.dtype), torch.cat(logs, 1), torch.zeros(2, dtype=torch.uint64), nothing, nothing

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any, **more: Any) -> Any:
        """∂V = Pᵀ·∂O, ∂P = ∂O·Vᵀ, ∂S = P ∘ (∂P − rowsum(O ∘ ∂O)), ∂Q = s·∂S·K, ∂K = s·∂Sᵀ·Q, with P = exp(S − log-sums)."""
        assert grad.stride(-1) == 1
        scale, groups, found = more["scale"], q.shape[1] // k.shape[1], ([], [], [])
        sums = logs.t().unsqueeze(-1)
        for (own_q, own_grad, own_out, own_sums), keys, values, seen in self.parts((q, k, v, grad, out, sums), given, more):
            weights = (own_q @ keys.transpose(1, 2) * scale - own_sums).exp().masked_fill(~seen, 0.0)
            of_scores = weights * (own_grad @ values.transpose(1, 2) - (own_out * own_grad).sum(-1, keepdim=True))
            each = of_scores @ keys * scale, of_scores.transpose(1, 2) @ own_q * scale, weights.transpose(1, 2) @ own_grad
            for parts, one in zip(found, each, strict=True):
                parts.append(one.transpose(0, 1))
        of_q, *of_others = (torch.cat(parts) for parts in found)
        of_k, of_v = (each.unflatten(1, (-1, groups)).sum(2).to(k.dtype) for each in of_others)
        return of_q.to(q.dtype), of_k, of_v


    def efficient_forward(self, q: Tensor, k: Tensor, v: Tensor, bias: None, *given: Any, **more: Any) -> tuple[Any, ...]:
        """The memory-efficient kernel: a batch of one, as many heads of keys as of queries, log-sums by sequence."""
        starts_q, starts_k, most_q, most_k, dropout, mask, logged = given
        assert bias is None and dropout == 0 and mask == 2 and logged and q.shape[0] == 1 and q.shape[2] == k.shape[2]
        self.efficient_calls += 1
        laid = starts_q, starts_k, most_q, most_k, 0.0, True
        places = {"window_size_left": (more.get("window_size") or 0) - 1, "window_size_right": 0}
        before = self.calls
        out, logs, *_ = self.forward(q[0], k[0], v[0], *laid, scale=more["scale"], **places)
        self.calls = before
        lengths = starts_q.diff().tolist()
        padded = torch.full((len(lengths), q.shape[2], -(-most_q // 32) * 32), float("inf"))
        for number, own in enumerate(logs.split(lengths, dim=1)):
            padded[number, :, : own.shape[1]] = own
        seed = torch.zeros((), dtype=torch.int64)
        return out[None], padded, seed, seed, most_q, most_k

    def efficient_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, *given: Any, **more: Any
    ) -> tuple[Any, ...]:
        starts_q, starts_k, most_q, most_k, padded, dropout, _, _, mask, bias_too = given
        assert bias is None and dropout == 0 and mask == 2 and not bias_too
        lengths = starts_q.diff().tolist()
        logs = torch.cat([padded[number, :, :length] for number, length in enumerate(lengths)], dim=1)
        places = {"window_size_left": (more.get("window_size") or 0) - 1, "window_size_right": 0}
        laid = starts_q, starts_k, most_q, most_k, 0.0, True
        found = self.backward(grad[0], q[0], k[0], v[0], out[0], logs, *laid, scale=more["scale"], **places)
        return *(each[None] for each in found), torch.empty(0)


@contextmanager
def on_a_card() -> Iterator[Flash]:
    """A context in which tensors on the CPU go the way of a card's, and torch's flash kernel is this one."""
    kernel = Flash()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", kernel.forward, "CPU")
        library.impl("_flash_attention_backward", kernel.backward, "CPU")
        library.impl("_efficient_attention_forward", kernel.efficient_forward, "CPU")
        library.impl("_efficient_attention_backward", kernel.efficient_backward, "CPU")
        with standing_for(CARD):
            yield kernel
