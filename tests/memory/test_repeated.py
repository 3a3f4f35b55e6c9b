"""A repeated call enters what it took, to the byte, without being run; a call that depends on more is run every time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.memory.forecast import extrapolate_peaks
from lorakeet.memory.ledger import Ledger
from lorakeet.memory.repeated import as_before, repeats_known
from lorakeet.memory.usage import Usage, UsageSegment

SIZE = 64


class Calls:
    """A call that counts how often it is run."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.count = call, 0

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self.call(*arguments)


def product(x: Tensor, w: Tensor, also: object) -> Tensor:
    wide = torch.mm(x, w).double()
    return (wide * wide).float()


def both(x: Tensor, w: Tensor, also: object) -> tuple[Tensor, Tensor]:
    logits = torch.mm(x, w.t())
    return logits, logits.sum(0).to(torch.bfloat16)


def in_place(x: Tensor, w: Tensor, also: object) -> None:
    x.add_(torch.mm(x, w).mul_(2))


def recorded(call: Calls, known: bool, watched: bool) -> tuple[Any, ...]:
    """All that a ledger records of chunks of a loop, with what is alive at the end."""
    with repeats_known() if known else nullcontext(), Ledger(SIZE) as ledger, torch.no_grad():
        if watched:
            ledger.watch_blocks([nn.Identity()])
        x, w, kept = torch.zeros(8 * SIZE, SIZE), torch.zeros(SIZE, SIZE), []
        with ledger.phase("loop"):
            for start in range(0, 8 * SIZE, SIZE):
                found = as_before(call, x[start : start + SIZE], w)
                kept += [found] if start % 128 else []
        with ledger.phase("after"):
            torch.zeros(3)
        told = [(one.phase, one.event, one.moments[:1], highest(one.moments), one.moments[-1:]) for one in ledger.segments]
        shapes = [(one.shape, one.stride(), one.dtype, one.untyped_storage().nbytes())
                  for each in kept for one in (each if isinstance(each, tuple) else (each,)) if one is not None]  # fmt: skip
        return ledger.bytes, dict(ledger.in_use), ledger.heap, dict(ledger.peaks), dict(ledger.work), told, shapes


def highest(moments: list[Usage]) -> Usage:
    return max(moments, key=lambda moment: moment.bytes, default=Usage())


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("call", [product, both, in_place])
def test_a_repeated_call_takes_what_it_took(call: Callable[..., Any], watched: bool) -> None:
    plain, repeated = Calls(call), Calls(call)
    expected = recorded(plain, known=False, watched=watched)
    assert recorded(repeated, known=True, watched=watched) == expected
    assert plain.count == 8 and repeated.count == 1


class Block(nn.Module):
    """Keeps its product for the backward pass, and computes in repeated calls before that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for start in range(0, len(x), SIZE):
                as_before(both, x[start : start + SIZE], self.weight)
        return (x @ self.weight).sigmoid()


def peaks_of(blocks: int) -> tuple[list[UsageSegment], Usage]:
    """Of a step whose loss, and one number for each block, are computed in equal calls too."""
    with Ledger(SIZE) as ledger:
        model = nn.Sequential(*[Block() for _ in range(blocks)])
        ledger.name("base", model.parameters())
        ledger.watch_blocks(list(model))
        with ledger.phase("step"):
            states = model(torch.zeros(4 * SIZE, SIZE, requires_grad=True))
            with torch.no_grad():
                for block in model:
                    as_before(in_place, torch.zeros(SIZE, SIZE), block.weight)
            states.sum().backward()
        return ledger.segments, ledger.peaks["step"]


@pytest.mark.parametrize("blocks", [5, 12, 80])
def test_the_peak_of_many_blocks_follows_from_the_moments_that_are_left(blocks: int) -> None:
    """Two runs, of which the second knows the calls of the first, as in one process; alone each of them records its own."""
    _, expected = peaks_of(blocks)
    with repeats_known():
        more, fewer = peaks_of(4)[0], peaks_of(3)[0]
    assert extrapolate_peaks(fewer, more, 3, wanted=blocks)["step"] == expected
    alone = []
    for count in (3, 4):
        with repeats_known():
            alone.append(peaks_of(count)[0])
    assert extrapolate_peaks(alone[0], alone[1], 3, wanted=blocks)["step"] == expected
    assert sum(len(segment.moments) for segment in more) < 0.8 * sum(len(segment.moments) for segment in peaks_of(4)[0])


def test_results_die_as_others_do() -> None:
    with repeats_known(), Ledger() as ledger, torch.no_grad():
        x, w = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
        before = ledger.bytes
        for _ in range(3):
            found = as_before(product, x, w)
            assert ledger.bytes == before + found.nbytes
            del found
            assert ledger.bytes == before


KEPT: list[Tensor] = []
OTHERS: dict[str, Callable[[Tensor, Tensor], Callable[..., Any]]] = {
    "uses another tensor": lambda x, w: lambda y, also: y + w,
    "keeps a tensor": lambda x, w: lambda y, also: KEPT.append(y + 1),
    "results in a view of an argument": lambda x, w: lambda y, also: y[1:],
    "results in its argument": lambda x, w: lambda y, also: y,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_what_depends_on_more_or_keeps_more_is_run_every_time(make: Callable[..., Callable[..., Any]]) -> None:
    with repeats_known(), Ledger(), torch.no_grad():
        x, w = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
        call = Calls(make(x, w))
        for _ in range(3):
            as_before(call, x)
        assert call.count == 3
    KEPT.clear()


def test_another_shape_dtype_number_or_setting_is_another_call() -> None:
    call = Calls(lambda x, number, also: x * number)
    with repeats_known(), Ledger(), torch.no_grad():
        x = torch.zeros(SIZE, SIZE)
        for other, number, also in ((x, 2, None), (x.t(), 2, None), (x.double(), 2, None), (x, 2.0, None), (x, 2, "kernel")):
            for _ in range(2):
                assert as_before(call, other, number, also=also).dtype == (other * number).dtype
    assert call.count == 5


def test_gradients_and_real_numbers_are_computed() -> None:
    call = Calls(lambda x, also: x * 2)
    with repeats_known():
        for _ in range(2):
            assert torch.equal(as_before(call, torch.ones(2)), torch.full((2,), 2.0))
        with Ledger():
            x = torch.zeros(2, requires_grad=True)
            for _ in range(2):
                assert as_before(call, x).requires_grad
    assert call.count == 4


def test_calls_are_known_within_the_outermost_context_only() -> None:
    call = Calls(lambda x, also: x * 2)

    def once() -> None:
        with repeats_known(), Ledger(), torch.no_grad():
            as_before(call, torch.zeros(2))

    once()
    once()
    assert call.count == 2
    with repeats_known():
        once()
        once()
    assert call.count == 3
