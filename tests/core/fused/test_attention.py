"""The fused inner half of an attention layer against its parts run one after the other; where it leaves the work to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.fused.attention import INPUTS, RotaryAttention
from lorakeet.core.fused.mlp_and_norm import FrozenRmsNorm
from lorakeet.core.fused.packed_attention import causal_rows
from lorakeet.core.layers.linear import LoraLinear, dense_base_of, new_pair
from lorakeet.core.plan import PlanEntry

HIDDEN, HEAD, HEADS, KV = 12, 6, 4, 2
ROWS, PREFIX = (5, 3, 4), 2
TOKENS = PREFIX + sum(ROWS) + 2


class OfHeads(nn.Module):
    """RMSNorm over the heads, as transformers writes it."""

    variance_epsilon = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HEAD) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


class Attention(nn.Module):
    """An attention as transformers writes it, by separate modules."""

    head_dim, scaling = HEAD, 0.4

    def __init__(self, biased: bool, normed: bool = False) -> None:
        super().__init__()
        widths = {"q_proj": (HIDDEN, HEADS * HEAD), "k_proj": (HIDDEN, KV * HEAD), "v_proj": (HIDDEN, KV * HEAD)}
        for name, shape in {**widths, "o_proj": (HEADS * HEAD, HIDDEN)}.items():
            setattr(self, name, nn.Linear(*shape, bias=biased and name != "o_proj"))
        if normed:
            self.q_norm, self.k_norm = FrozenRmsNorm(OfHeads()), FrozenRmsNorm(OfHeads())
        self.calls = 0

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **settings: Any
    ) -> tuple[Tensor, None]:
        self.calls += 1
        q, k, v = (getattr(self, name)(hidden_states).view(1, TOKENS, -1, HEAD).transpose(1, 2) for name in INPUTS)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm.original(q), self.k_norm.original(k)
        cos, sin = (part[:, None] for part in position_embeddings)
        q, k = (states * cos + torch.cat([-states[..., HEAD // 2 :], states[..., : HEAD // 2]], -1) * sin for states in (q, k))
        rows, products = settings["row_lengths"], settings.get("row_products") or torch.float32
        out = causal_rows(q, k, v, rows, self.scaling, products, settings.get("row_prefix", 0))
        return self.o_proj(out.reshape(1, TOKENS, -1)), None


def adapted(
    dtype: torch.dtype, names: tuple[str, ...], *, biased: bool = False, normed: bool = False, dropout: float = 0.0
) -> Attention:
    torch.manual_seed(0)
    attention = Attention(biased, normed).to(dtype).requires_grad_(False)
    for name in names:
        child = getattr(attention, name)
        layer = LoraLinear(child, dense_base_of(child, "linear"))
        entry = PlanEntry(name, "linear", tuple(child.weight.shape), 4, 12.0, dropout=dropout)
        pair = new_pair(entry, weight=lambda child=child: child.weight, seed=0)
        nn.init.normal_(pair.B, std=0.3)
        layer.attach("a", pair)
        layer.active = "a"
        setattr(attention, name, layer)
    return attention


def given(dtype: torch.dtype) -> dict[str, Any]:
    angles = torch.rand(1, TOKENS, HEAD // 2, generator=torch.Generator().manual_seed(1)).mul(6).repeat(1, 1, 2)
    turn = angles.cos().to(dtype), angles.sin().to(dtype)
    return {"position_embeddings": turn, "row_lengths": ROWS, "row_prefix": PREFIX, "row_products": dtype}


def results(
    module: nn.Module, attention: Attention, dtype: torch.dtype, norm: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    for parameter in attention.parameters():
        parameter.grad = None
    out = module(x if norm is None else norm(x), **given(dtype))[0]
    out.float().square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in attention.parameters() if p.requires_grad)]  # type: ignore[list-item]


def test_heads_that_are_normed_before_they_are_turned() -> None:
    """As Qwen 3 has them: outputs and gradients are those of autograd through the norms written out."""
    attention = adapted(torch.float32, INPUTS, biased=True, normed=True)
    expected = results(attention, attention, torch.float32)
    calls = attention.calls
    found = results(RotaryAttention(attention), attention, torch.float32)
    assert attention.calls == calls and len(found) == len(expected) == 8
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [INPUTS, ("q_proj", "v_proj"), ("k_proj",), (*INPUTS, "o_proj")])
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_and_gradients_are_those_of_the_parts(names: tuple[str, ...], biased: bool) -> None:
    attention = adapted(torch.float32, names, biased=biased)
    expected = results(attention, attention, torch.float32)
    attention.calls = 0
    found = results(RotaryAttention(attention), attention, torch.float32)
    assert attention.calls == 0  # the function did it
    assert len(found) == 2 + 2 * len(names)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_is_as_close_to_fp32_as_the_parts_are() -> None:
    exact = adapted(torch.float32, INPUTS)
    narrow = adapted(torch.bfloat16, INPUTS)
    truth = results(exact, exact, torch.float32)
    parts = results(narrow, narrow, torch.bfloat16)
    fused = results(RotaryAttention(narrow), narrow, torch.bfloat16)
    for right, other, ours in zip(truth, parts, fused, strict=True):
        scale = right.abs().max()
        assert (ours.float() - right).abs().max() <= 1.5 * (other.float() - right).abs().max() + 0.02 * scale


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5, requires_grad=False)
        self.variance_epsilon = 1e-5


def test_a_normed_input_is_made_again_and_not_kept() -> None:
    attention = adapted(torch.float32, INPUTS)
    norm = FrozenRmsNorm(Norm())
    expected = results(attention, attention, torch.float32, norm)
    found = results(RotaryAttention(attention), attention, torch.float32, norm)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        RotaryAttention(attention)(norm(torch.randn(1, TOKENS, HIDDEN, requires_grad=True)), **given(torch.float32))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    hidden = {x.data_ptr() for x in kept if x.shape[-1] == HIDDEN and x.numel() == TOKENS * HIDDEN}
    assert len(hidden) == 1  # the norm's input, kept by both, and nothing of its size besides


def test_a_normed_input_that_was_changed_since_is_kept_as_it_is() -> None:
    attention = adapted(torch.float32, INPUTS)
    norm = FrozenRmsNorm(Norm())
    doubled = lambda x: norm(x).mul_(2)  # noqa: E731
    found, expected = (results(module, attention, torch.float32, doubled) for module in (RotaryAttention(attention), attention))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "changed",
    [
        {"row_lengths": None},
        {"row_cache": object()},
        {"attention_mask": torch.zeros(1)},
        {"past_key_values": object()},
    ],
)
def test_what_the_function_does_not_compute_is_left_to_the_original(changed: dict[str, Any]) -> None:
    attention = adapted(torch.float32, INPUTS)
    stand_in = RotaryAttention(attention)
    usual = attention.forward
    called: list[dict[str, Any]] = []
    attention.forward = lambda *a, **k: called.append(k) or usual(*a, **{**k, **given(torch.float32)})  # type: ignore[method-assign, func-returns-value]
    stand_in(torch.randn(1, TOKENS, HIDDEN), **{**given(torch.float32), **changed})
    assert len(called) == 1


@pytest.mark.parametrize("how", ["bare", "dropout", "window", "dora"])
def test_pairs_and_layers_of_other_kinds_are_left_to_the_original(how: str) -> None:
    attention = adapted(torch.float32, INPUTS, dropout=0.1 if how == "dropout" else 0.0)
    if how == "bare":
        attention.q_proj.selection.use(None)
        attention.k_proj.selection.use(None)
        attention.v_proj.selection.use(None)
    if how == "window":
        attention.sliding_window = 4
    if how == "dora":
        entry = PlanEntry("q_proj", "linear", (HEADS * HEAD, HIDDEN), 4, 12.0, variant="dora")
        pair = new_pair(entry, weight=attention.q_proj.base.dense, seed=0)
        attention.q_proj.attach("a", pair)
    RotaryAttention(attention).train()(torch.randn(1, TOKENS, HIDDEN), **given(torch.float32))
    assert attention.calls == 1
