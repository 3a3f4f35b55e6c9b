"""The simulated card: it computes what the CPU computes, refuses what a card refuses, and counts what a card waits for."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakeet.kernels.cpu import operators
from tiny.simulated_card import CUDA, Card

SEEN = ContextVar("seen", default="nothing")


def test_gradients_are_those_of_the_cpu(card: Card) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    layer(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    tied = layer.weight
    layer.zero_grad()
    layer.to("cuda:0")
    assert layer.weight is tied and layer.weight.device == torch.device("cuda", 0) and layer.weight.is_cuda
    layer(x.to("cuda")).square().sum().backward()
    assert all(torch.equal(parameter.grad.cpu(), one) for parameter, one in zip(layer.parameters(), expected, strict=True))


def test_several_devices_raise(card: Card) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="device type tensor to numpy"):
        x.numpy()
    assert (x + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0], "a number alone may be on the CPU"


WAITS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x.sum().item(), "a number is read"),
    "truth": (lambda x: bool(x[0] > 0), "a number is read"),
    "tolist": (lambda x: x.tolist(), "numbers are read"),
    "cpu": (lambda x: x.cpu(), "a copy to the host"),
    "mask": (lambda x: x[x > 0], "places are counted"),
    "nonzero": (lambda x: x.nonzero(), "places are counted"),
    "unique": (torch.unique, "values are counted"),
    "repeats": (lambda x: torch.repeat_interleave(x.long()), "lengths are summed"),
    "pageable": (lambda x: torch.ones(3).to("cuda", non_blocking=True), "a copy from the host"),
    "list": (lambda x: torch.tensor([1, 2], device="cuda"), "a copy from the host"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "the host waits for all"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted_with_its_place(name: str, card: Card) -> None:
    x = torch.ones(3, device="cuda")
    work, kind = WAITS[name]
    card.reset()
    work(x)
    assert [wait.kind for wait in card.waits] == [kind]
    assert Path(card.waits[0].place.partition(":")[0]).name == Path(__file__).name


def test_what_does_not_wait(card: Card) -> None:
    numbers = torch.arange(4).pin_memory()
    card.reset()
    x = numbers[1:].to("cuda", non_blocking=True)
    y = torch.zeros(3, device="cuda", dtype=torch.int64) + x.index_select(0, x % 2)
    y[0] = 7
    torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(y, non_blocking=True)
    torch.repeat_interleave(x, output_size=6)
    assert card.waits == [] and card.copies == {"to the card": 24, "to the host": 24}
    assert card.launches["copy_"] == 1 and card.launches["add"] == 1 and card.launches["index_select"] == 1


def test_a_backward_pass_sees_no_context_variable(card: Card) -> None:
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            found.append((SEEN.get(), torch.zeros(1, device=grad.device).is_cuda))
            return grad

    found: list[tuple[str, bool]] = []
    x = torch.ones(2, device="cuda", requires_grad=True)
    token = SEEN.set("something")
    Looks.apply(x).sum().backward()
    torch.autograd.grad(Looks.apply(x).sum(), [x])
    SEEN.reset(token)
    assert found == [("nothing", True)] * 2


def test_a_kernel_for_cpus_is_refused(card: Card) -> None:
    from lorakeet.kernels.cpu import elementwise

    with pytest.raises(NotImplementedError, match="'CUDA' backend"):
        elementwise.gated(torch.ones(2, 16, device="cuda"), torch.ones(2, 16, device="cuda"))


def on_card(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="cuda")


def stepped_with_another_layout() -> None:
    parameter = torch.nn.Parameter(on_card(2, 3))
    parameter.grad = on_card(3, 2).t()
    torch.optim.AdamW([parameter], fused=True).step()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a generator of the host": (
        lambda: on_card(3).normal_(generator=torch.Generator()), "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "made with a generator of the host": (
        lambda: torch.randn(3, generator=torch.Generator(), device="cuda"), "found 'cpu'",
    ),
    "a generator of the card": (lambda: torch.randn(3, generator=torch.Generator("cuda")), "found 'cuda'"),
    "a number written on the host": (lambda: torch.zeros(()).add_(on_card(3).sum()), "two devices"),
    "numbers side by side": (lambda: torch.stack([on_card(1)[0], torch.tensor(1.0)]), "two devices"),
    "a list and a number": (lambda: torch._foreach_mul_([on_card(3)], torch.tensor(2.0)), "two devices"),
    "a search for a number": (lambda: torch.searchsorted(on_card(3), torch.tensor(2.0)), "two devices"),
    "whole numbers multiplied": (lambda: on_card(2, 2, dtype=torch.int64) @ on_card(2, 2, dtype=torch.int64), "addmm_cuda"),
    "few rows in int8": (
        lambda: torch._int_mm(on_card(8, 8, dtype=torch.int8), on_card(8, 8, dtype=torch.int8).t()), "more than 16 rows",
    ),
    "another layout": (stepped_with_another_layout, "same dtype, device, and layout"),
    "pinned": (lambda: on_card(3).pin_memory(), "only dense CPU tensors can be pinned"),
    "an address for C": (lambda: operators.pointers(on_card(3, dtype=torch.bfloat16)), "cannot read the memory of a card"),
    "a limit that is no share": (lambda: torch.cuda.set_per_process_memory_fraction(1, CUDA), "must be `float`"),
    "a limit of no card": (lambda: torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda")), "specified index"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_of_a_card_alone(name: str, card: Card) -> None:
    work, said = REFUSED[name]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=said):
        work()


def test_what_it_takes_of_the_host(card: Card) -> None:
    """Numbers that are only read, and generators of its own."""
    x = on_card(3).mul_(torch.tensor(2.0)).masked_fill_(on_card(3) > 2, torch.tensor(1.0))
    drawn = torch.empty_like(x).bernoulli_(0.5, generator=torch.Generator("cuda").manual_seed(3))
    torch.randn(3, generator=torch.Generator().manual_seed(3))
    assert x.tolist() == [2.0, 2.0, 2.0] and drawn.is_cuda


def test_places_in_a_list(card: Card) -> None:
    """torch makes a tensor of them where the card is, without numbers if that is not there."""
    x = torch.arange(6).to("cuda").view(2, 3)
    assert x[0][[2, 0]].tolist() == [2, 0] and x[[1], [1]].tolist() == [4]
    card.reset()
    x[0, [1, 2]] = 7
    assert [wait.kind for wait in card.waits] == ["a copy of indices from the host"] and x[0].tolist() == [0, 7, 7]
