"""Copies of pairs hold what they were made of, and what is added with them is the formula's, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.kernels import choose
from lorakeet.kernels.cpu import inference_pairs
from lorakeet.kernels.cpu.inference_pairs import LayerRows, PairLayout, Shares, as_readable
from lorakeet.kernels.cpu.operators import torch_only
from tiny.native import needs_native

WIDTH, OUTS = 96, (64, 16)
Pairs = list[tuple[int, Tensor, Tensor, float]]  # layer, A, B, scale


def pairs_of(*ranks: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Pairs:
    """For each layer pairs of these ranks."""
    generator = torch.Generator().manual_seed(sum(map(sum, ranks)))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        (layer, numbers(rank, WIDTH), numbers(out, rank), 0.3)
        for layer, (out, own) in enumerate(zip(OUTS, ranks, strict=True))
        for rank in own
    ]


def copied(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The copy, and where its layers are."""
    kinds = [(layer, len(A), A.dtype, B.dtype) for layer, A, B, _ in pairs]
    layout = PairLayout(kinds, [(out, WIDTH) for out in OUTS])
    memory = torch.full((layout.bytes,), 255, dtype=torch.uint8)  # NaN
    layout.copy([(A, B, scale) for _, A, B, scale in pairs], memory)
    return memory, layout.at(memory)


def added(x: Tensor, pairs: Pairs) -> list[Tensor]:
    """By the formula: A, s·B and x·Aᵀ rounded to bf16, sums exact."""
    found = [torch.zeros(len(x), out, dtype=torch.float64) for out in OUTS]
    for layer, A, B, scale in pairs:
        shrunk = (x.double() @ A.bfloat16().double().T).bfloat16().double()
        found[layer] += shrunk @ (B.float() * scale).bfloat16().double().T
    return found


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_holds_a_and_b_rounded_once(dtype: torch.dtype) -> None:
    pairs = pairs_of((3, 18), (1,), dtype=dtype)
    memory, at = copied(pairs)
    assert at[:, 1].tolist() == [4 + 18, 2] and at[0, 0] == memory.data_ptr()
    numbers = memory.view(torch.bfloat16)
    first, size = 0, 22 * (WIDTH + 64)
    A = numbers[: 22 * WIDTH].view(WIDTH // 32, 22, 32).transpose(0, 1).reshape(22, WIDTH)
    B = numbers[22 * WIDTH : size].view(64 // 16, 11, 16, 2).permute(1, 3, 0, 2).reshape(22, 64)
    for (_, a, b, scale), rank in zip(pairs[:2], (3, 18), strict=True):
        assert torch.equal(A[first : first + rank], a.bfloat16())
        assert torch.equal(B[first : first + rank], (b.float().t() * scale).bfloat16())
        first += rank + rank % 2
    assert not A[3].any() and not B[3].any(), "an odd rank is filled up with zeros"
    assert at[1, 0] == memory.data_ptr() + 2 * size and len(numbers) == size + 2 * (WIDTH + 16)


@needs_native
def test_each_token_gets_its_own_sums() -> None:
    mixes = [pairs_of((8,), (8,)), pairs_of((5, 2), ()), pairs_of((), (14,)), pairs_of((21,), (6, 8))]
    owners = [[3], [0, 9], [2, 4, 5], [1, 6, 7, 8, 10, 11, 12]]  # 13 has none
    copies = [copied(pairs) for pairs in mixes]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(14, WIDTH + 32, generator=generator).bfloat16()[:, :WIDTH]  # rows that lie apart
    wide = torch.randn(14, sum(OUTS), generator=generator).bfloat16()  # y's side by side
    before, ys = wide.double(), wide.split(OUTS, dim=1)
    rows = LayerRows([(out, WIDTH) for out in OUTS], [0, 1])
    rows.add(ys, x, Shares([(own, at) for own, (_, at) in zip(owners, copies, strict=True)]))
    expected = before.clone()
    for own, pairs in zip(owners, mixes, strict=True):
        expected[own] += torch.cat(added(x[own], pairs), dim=1)
    torch.testing.assert_close(wide.double(), expected, rtol=1 / 256, atol=0.02)  # the shrunk may be rounded the other way
    assert torch.equal(wide[13].double(), before[13])
    for token, place in ((3, 0), (9, 1), (5, 2), (6, 3), (12, 3)):  # by itself, in one thread
        alone = before[token : token + 1].bfloat16()
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            rows.add(alone.split(OUTS, dim=1), x[token : token + 1], Shares([([0], copies[place][1])]))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(alone[0], wide[token]), "to the last bit, whoever is beside it"


@needs_native
def test_layers_have_the_numbers_that_copies_know_them_by() -> None:
    pairs = pairs_of((4,), (4,))
    memory, at = copied(pairs)
    x, y = torch.ones(1, WIDTH, dtype=torch.bfloat16), torch.zeros(1, 16, dtype=torch.bfloat16)
    LayerRows([(16, WIDTH)], [1]).add([y], x, Shares([([0], at)]))
    torch.testing.assert_close(y.double(), added(x, pairs)[1], rtol=1 / 128, atol=0.02)
    assert memory.nbytes == 2 * 4 * (2 * WIDTH + sum(OUTS))


@needs_native
def test_rows_that_c_cannot_read_are_refused() -> None:
    at = copied(pairs_of((4,), (4,)))[1]
    rows, shares = LayerRows([(16, WIDTH)], [1]), Shares([([0], at)])
    x, y = torch.ones(1, WIDTH, dtype=torch.bfloat16), torch.zeros(1, 16, dtype=torch.bfloat16)
    for bad_x, bad_y in ((x.float(), y), (x[:, :64], y), (x, y.float()), (x, torch.zeros(16, 2, dtype=x.dtype).t()[:1])):
        with pytest.raises(ValueError, match=r"expected rows of .* given"):
            rows.add([bad_y], bad_x, shares)


@needs_native
def test_which_layers_it_is_for() -> None:
    cpu, shapes = torch.device("cpu"), [(16, 32), (48, 32)]
    assert choose.inference_pairs(torch.bfloat16, cpu, shapes) is inference_pairs
    for dtype, device in ((torch.float32, cpu), (torch.bfloat16, torch.device("cuda"))):
        assert choose.inference_pairs(dtype, device, shapes) is None
    assert choose.inference_pairs(torch.bfloat16, cpu, [(8, 32)]) is None
    assert choose.inference_pairs(torch.bfloat16, cpu, [(16, 48)]) is None
    with torch_only():
        assert choose.inference_pairs(torch.bfloat16, cpu, shapes) is None


def test_what_can_be_copied_from_is_not_copied_first() -> None:
    x = torch.ones(4, 6, dtype=torch.float16)
    assert as_readable(x) is x
    assert torch.equal(as_readable(x.t()), x.t().float()) and as_readable(x.t()).is_contiguous()
    assert as_readable(x.double()).dtype == torch.float32
