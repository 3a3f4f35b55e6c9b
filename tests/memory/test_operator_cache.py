"""Remembered results against torch's own rules, call by call, and which calls are not remembered."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # torch offers no public name
from torch.utils._pytree import tree_leaves

from lorakeet.memory import ledger
from lorakeet.memory.ledger import Ledger


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The operators that torch's rules are asked for, from nothing known."""
    operators: list[Any] = []
    dispatch = FakeTensorMode.dispatch

    def counted(mode: FakeTensorMode, func: Any, *rest: Any) -> Any:
        operators.append(func)
        return dispatch(mode, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    monkeypatch.setattr(ledger, "_KNOWN", {})
    yield operators


CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "new": lambda x, y: x + y,
    "new, of another dtype": lambda x, _: x.to(torch.bfloat16),
    "new, with holes": lambda x, _: torch.empty_strided((3, 2), (4, 1)),
    "a number": lambda x, _: x.sum(),
    "nothing in it": lambda x, _: x[:0] * 2,
    "a view": lambda x, _: x.t()[1:, 2:],
    "views": lambda x, _: torch.split(x, [1, 3]),
    "in place": lambda x, y: x.mul_(y),
    "into a part": lambda x, y: torch.add(x[:2], y[:2], out=x[2:]),
    "several": lambda x, _: torch.max(x, dim=1),
    "of a list": lambda x, y: torch.cat([x, y.t()], dim=1),
    "made one of": lambda x, _: x.index_select(0, torch.arange(3)),
}


def told(result: Any) -> list[Any]:
    return [
        (leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device, leaf.untyped_storage().nbytes())
        for leaf in tree_leaves(result)
    ]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_is_remembered_is_what_torch_makes(call: Callable[[Tensor, Tensor], Any], asked: list[Any]) -> None:
    found = []
    for _ in range(2):
        with Ledger() as account:
            x, y = torch.zeros(4, 4), torch.zeros(4, 4)
            result = call(x, y)
            shared = [[leaf.untyped_storage()._cdata == one.untyped_storage()._cdata for one in (x, y)]
                      for leaf in tree_leaves(result)]  # fmt: skip
            same = [[leaf is one for one in (x, y)] for leaf in tree_leaves(result)]
            found.append((type(result), told(result), shared, same, account.bytes, dict(account.in_use), account.work))
            asked.append("again")
    assert found[0] == found[1]
    assert asked.index("again") > 0 and asked[-1] == "again" and asked[-2] == "again", "the second time torch is not asked"


@pytest.mark.parametrize("shape", [(4, 5), (5, 5)])
def test_another_shape_stride_dtype_or_number_is_another_call(shape: tuple[int, int], asked: list[Any]) -> None:
    with Ledger():
        x, y = torch.zeros(4, 4), torch.zeros(4, 4)
        assert (x * 1).dtype == torch.float32 and (x.long() * 1).dtype == torch.int64 and (x.long() * 1.0).dtype == torch.float32
        assert (x + y).stride() == (4, 1) and (x.t() + y.t()).stride() == (1, 4)
        assert (torch.zeros(shape) + 1).shape == shape
        assert x[1:].storage_offset() == 4 and x[2:].storage_offset() == 8


def test_what_gives_an_argument_another_shape_is_asked_every_time(asked: list[Any]) -> None:
    for _ in range(2):
        with Ledger():
            x, wide = torch.zeros(2, 3), torch.zeros(2, 3)
            x.t_()
            assert x.shape == (3, 2)
            wide.resize_(6, 3)
            assert wide.shape == (6, 3) and wide.untyped_storage().nbytes() == 72
            x.set_(wide.untyped_storage(), 0, (6, 3), (3, 1))
            assert x.untyped_storage()._cdata == wide.untyped_storage()._cdata


def test_tensors_with_numbers_are_left_to_torch(asked: list[Any]) -> None:
    numbers = torch.arange(3)
    for _ in range(2):
        with Ledger():
            assert isinstance(torch.tensor(numbers.tolist()), FakeTensor)
            assert torch.tensor([True]).any().shape == ()


def test_what_is_made_while_the_fake_mode_is_left_has_numbers(asked: list[Any]) -> None:
    with Ledger():
        assert isinstance(torch.zeros(2, 3), FakeTensor)
        with unset_fake_temporarily():
            made = torch.zeros(2, 3)
            assert not isinstance(made, FakeTensor) and (made + 1).sum() == 6
        assert isinstance(torch.zeros(2, 3), FakeTensor)


def test_no_more_calls_are_remembered_than_have_room(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MOST_KNOWN", 3)
    for _ in range(2):
        with Ledger():
            for size in range(1, 8):
                assert torch.zeros(size).shape == (size,)
                assert 1 <= len(ledger._KNOWN) <= 3


def test_a_generator_and_a_tensor_given_twice_are_no_reason_to_ask_again(asked: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    for _ in range(2):
        with Ledger():
            x, y = torch.rand(3, 3, generator=generator), torch.zeros(3, 3)
            assert torch.ops.aten.silu_backward(x, y, grad_input=x) is x
            assert torch.ops.aten.silu_backward(y, x, grad_input=x) is x
            assert torch.promote_types(torch.bfloat16, torch.float16) == torch.float32
        asked.append("again")
    assert asked[-1] == "again" and asked[-2] == "again", "the second time torch is not asked"
    assert torch.equal(generator.get_state(), state), "nothing is drawn on shapes"


def test_numbers_of_python_become_what_torch_makes_of_them() -> None:
    def lifted(with_ledger: bool) -> list[Any]:
        with Ledger() if with_ledger else FakeTensorMode():
            return told([torch.tensor([1.0, 2.0]), torch.tensor([[1, 2], [3, 4]]), torch.tensor([True]), torch.tensor(1.5)])

    assert lifted(True) == lifted(False)
    with Ledger() as account:
        grid = torch.tensor([1.0] * 256)
        assert account.bytes == grid.nbytes == 1024
        del grid
        assert account.bytes == 0


def test_results_are_known_in_another_process_by_the_names_of_operators(asked: list[Any]) -> None:
    def steps() -> None:
        with Ledger():
            x = torch.zeros(4, 4)
            torch.split(torch.mm(x, x.t()).to(torch.bfloat16), 2)
            torch.rand(2, generator=torch.Generator())
            torch.linalg.svd(x)

    steps()
    workspaces = sum(known.cost.workspace is not None for known in ledger._KNOWN.values())
    passed = pickle.loads(pickle.dumps(ledger.known_operators()))
    assert 0 < len(passed) == len(ledger._KNOWN) - workspaces and workspaces > 0, "those with a workspace are left out"
    before = dict(ledger._KNOWN)
    ledger._KNOWN.clear()
    ledger.know_operators({**passed, ("nothing.of.this", 1): next(iter(passed.values()))})
    assert {key: known for key, known in before.items() if known.cost.workspace is None} == ledger._KNOWN
    asked.clear()
    steps()
    assert len(asked) == workspaces
