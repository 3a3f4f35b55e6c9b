"""Each product against fp64, over parts, ranks and widths; what C cannot read is refused; counts of FLOPs and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.kernels import choose
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.operators import FLOPS, WORKSPACES
from lorakeet.kernels.cpu.trained_pairs import TRAINED_PAIRS, TRAINED_PAIRS_BACKWARD, TRAINED_PAIRS_OF_A
from tiny.native import needs_native

pytestmark = needs_native
Part = tuple[int, int, list[int]]  # its first row, the one behind its last, the ranks by layer
CASES = {
    "one pair": (37, 32, [32], [(0, 37, [8])]),
    "three layers": (101, 64, [96, 32, 64], [(0, 101, [8, 4, 16])]),
    "parts of odd ranks": (90, 96, [64, 32], [(3, 30, [7, 5]), (30, 31, [1, 33]), (50, 90, [17, 2])]),
    "a layer without pairs": (64, 64, [32, 64], [(0, 20, [0, 40]), (20, 64, [12, 0])]),
}


class Given:
    """Rows and pairs of a case, in fp64 as they are read."""

    def __init__(self, tokens: int, width: int, outputs: list[int], parts: list[Part], dtype: torch.dtype) -> None:
        torch.manual_seed(tokens)
        self.x = torch.randn(tokens, width).bfloat16()
        self.ys, self.grads = ([torch.randn(tokens, out).bfloat16() for out in outputs] for _ in range(2))
        self.factors: list[Tensor] = []
        self.places: list[int] = []
        self.scales: list[float] = []
        for start, stop, ranks in parts:
            for layer, rank in enumerate(ranks):
                if rank:
                    pair = torch.randn(rank, width) / width**0.5, torch.randn(outputs[layer], rank) / rank**0.5
                    self.factors += [factor.to(dtype) for factor in pair]
                    self.places += [start, stop, layer]
                    self.scales.append(0.5 + layer)

    def pairs(self) -> list[tuple[slice, int, float, Tensor, Tensor]]:
        exact = [factor.double() for factor in self.factors]
        triples = [self.places[at : at + 3] for at in range(0, len(self.places), 3)]
        return [
            (slice(start, stop), layer, scale, A, B)
            for (start, stop, layer), scale, A, B in zip(triples, self.scales, exact[::2], exact[1::2], strict=True)
        ]


def near(found: Tensor, expected: Tensor) -> None:
    """A and B, h and u, and the result are rounded to 8 bits once each."""
    gap = (found.double() - expected).norm() / expected.norm()
    assert gap < 0.006


def cut(numbers: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [part.view_as(each) for part, each in zip(numbers.split([each.numel() for each in like]), like, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_product_is_that_of_its_formula(case: Any, dtype: torch.dtype) -> None:
    given = Given(*case, dtype)
    ys, grad_x = [y.double() for y in given.ys], torch.randn_like(given.x.float()).bfloat16()
    of_x, x = grad_x.double(), given.x.double()
    h = TRAINED_PAIRS(given.ys, given.x, given.factors, given.places, given.scales)
    u, of_b = TRAINED_PAIRS_BACKWARD(grad_x, given.grads, h, given.factors, given.places, given.scales)
    of_a = cut(TRAINED_PAIRS_OF_A(u, given.x, given.factors, given.places), given.factors[::2])
    for (rows, layer, scale, A, B), found_a, found_b in zip(given.pairs(), of_a, cut(of_b, given.factors[1::2]), strict=True):
        grad = given.grads[layer][rows].double()
        ys[layer][rows] += scale * x[rows] @ A.t() @ B.t()
        of_x[rows] += scale * grad @ B @ A
        near(found_b, scale * grad.t() @ (x[rows] @ A.t()))
        near(found_a, (scale * grad @ B).t() @ x[rows])
    for found, expected in zip([*given.ys, grad_x], [*ys, of_x], strict=True):
        near(found, expected)


def test_bits_depend_neither_on_threads_nor_on_other_parts() -> None:
    found = []
    for threads in (1, 2):
        given, before = Given(*CASES["parts of odd ranks"], torch.float32), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            h = TRAINED_PAIRS(given.ys, given.x, given.factors, given.places, given.scales)
            back = TRAINED_PAIRS_BACKWARD(None, given.grads, h, given.factors, given.places, given.scales)
            found.append([*given.ys, h, *back, TRAINED_PAIRS_OF_A(back[0], given.x, given.factors, given.places)])
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
    alone = Given(*CASES["parts of odd ranks"], torch.float32)
    TRAINED_PAIRS(alone.ys, alone.x, alone.factors[8:], alone.places[12:], alone.scales[4:])
    assert torch.equal(alone.ys[0][50:], found[0][0][50:])


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.places.__setitem__(1, 91),
        lambda g: g.places.__setitem__(2, 2),
        lambda g: g.places.__setitem__(slice(None), [0, 30, 0, 0, 30, 1, 30, 31, 0, 30, 31, 1, 0, 30, 0, 0, 30, 1]),
        lambda g: g.places.__setitem__(slice(0, 6), [30, 30, 0, 30, 30, 1]),
        lambda g: g.scales.pop(),
        lambda g: g.factors.__setitem__(0, g.factors[0][:, :64].contiguous()),
        lambda g: g.factors.__setitem__(0, g.factors[0].t().contiguous().t()),
        lambda g: g.factors.__setitem__(1, g.factors[1].half()),
        lambda g: g.ys.__setitem__(0, g.ys[0][:80]),
        lambda g: g.ys.__setitem__(0, g.ys[0].float()),
        lambda g: setattr(g, "x", g.x[:, :64].contiguous()),
    ],
)
def test_what_does_not_fit_is_refused(change: Any) -> None:
    given = Given(*CASES["parts of odd ranks"], torch.float32)
    change(given)
    with pytest.raises(ValueError, match=r"fit|contiguous|scales|must have rows|numbers"):
        TRAINED_PAIRS(given.ys, given.x, given.factors, given.places, given.scales)


def test_h_and_u_of_other_pairs_are_refused() -> None:
    given = Given(*CASES["one pair"], torch.float32)
    h = given.x.new_empty(5)
    with pytest.raises(ValueError, match="5 numbers"):
        TRAINED_PAIRS_BACKWARD(None, given.grads, h, given.factors, given.places, given.scales)
    with pytest.raises(ValueError, match="5 numbers"):
        TRAINED_PAIRS_OF_A(h, given.x, given.factors, given.places)


def test_which_pairs_c_multiplies() -> None:
    given = Given(*CASES["parts of odd ranks"], torch.float32)

    def supported(**other: Any) -> bool:
        pairs = {"factors": given.factors, "places": given.places}
        wanted = {"products": torch.bfloat16, "states": [given.x, *given.ys], **pairs, **other}
        return choose.low_rank_products(**wanted) is not None

    assert supported()
    assert not supported(products=torch.float32)
    assert not supported(states=[given.x.float()])
    assert not supported(states=[given.x, given.ys[0][:, :31]])
    assert not supported(factors=[])
    assert not supported(states=[given.x, torch.zeros(90, 48).bfloat16()])
    assert not supported(places=[0, 40, 0, 0, 40, 1, *given.places[6:12], 39, 90, 0, 39, 90, 1])  # two for one token
    assert not supported(places=[0, 40, 0, 40, 90, 1, 40, 90, 0, 40, 90, 1, 0, 40, 0, 0, 40, 1])  # the same rows, apart
    assert not supported(places=[0, 0, 0, 0, 0, 1, *given.places[6:]])
    assert not supported(factors=[given.factors[0][:0], given.factors[1][:, :0], *given.factors[2:]])
    with operators.torch_only():
        assert not supported()


def test_flops_and_bytes_are_those_of_the_products() -> None:
    given = Given(*CASES["three layers"], torch.float32)
    ranks, outputs = [8, 4, 16], [96, 32, 64]
    with_b = sum(2 * 101 * rank * out for rank, out in zip(ranks, outputs, strict=True))
    with_a = 2 * 101 * sum(ranks) * 64
    known = given.factors, given.places
    assert FLOPS[torch.ops.lorakeet.trained_pairs_](given.ys, given.x, *known, given.scales) == with_a + with_b
    backward = FLOPS[torch.ops.lorakeet.trained_pairs_backward_]
    assert backward(given.x, given.grads, given.x, *known, given.scales) == with_a + 2 * with_b
    assert backward(None, given.grads, given.x, *known, given.scales) == 2 * with_b
    assert FLOPS[torch.ops.lorakeet.trained_pairs_of_a](given.x, given.x, *known) == with_a
    laid = sum(rank * out for rank, out in zip(ranks, outputs, strict=True))
    assert WORKSPACES[TRAINED_PAIRS](given.ys, given.x, *known, given.scales) == 2 * (64 * 32 + laid)  # 28 columns, 32 laid out
    assert WORKSPACES[TRAINED_PAIRS_OF_A](given.x, given.x, *known) == 2 * 102 * 28
    back = 16 * sum(outputs) + 64 * 28 + 102 * 28
    assert WORKSPACES[TRAINED_PAIRS_BACKWARD](given.x, given.grads, given.x, *known, given.scales) == 2 * back
