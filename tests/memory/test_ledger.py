"""The ledger against sums that can be done by hand: views, in-place results, what autograd saves and lets go."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, unset_fake_temporarily  # torch offers no public name

from lorakeet.memory import ledger as module
from lorakeet.memory.ledger import Ledger

MB = 1 << 20
SQUARE = 512  # fp32: 1 MiB


def test_views_and_in_place_results_are_counted_once() -> None:
    with Ledger() as ledger:
        x = torch.zeros(SQUARE, SQUARE)
        view = x[:100].view(-1)
        x.add_(1)
        assert ledger.bytes == MB and view.shape == (100 * SQUARE,)
        y = x + 1
        assert ledger.bytes == 2 * MB
        del x
        assert ledger.bytes == 2 * MB, "a view keeps the whole storage"
        del view
        assert ledger.bytes == MB
        del y
    assert ledger.bytes == 0


def test_each_phase_has_its_own_peak_that_counts_what_was_there() -> None:
    with Ledger() as ledger:
        x = torch.zeros(SQUARE, SQUARE)
        ledger.name("base", [x])
        with ledger.phase("first"):
            del_me = x + 1
            del del_me
        with ledger.phase("second"):
            y = x[0] + 1
    assert ledger.peaks["first"].kinds == {"base": MB, "scratch": MB}
    assert ledger.peaks["second"].bytes == MB + y.nbytes


def test_saved_activations_live_until_the_backward_pass_lets_them_go() -> None:
    with Ledger() as ledger:
        x, w = torch.zeros(SQUARE, SQUARE), nn.Parameter(torch.zeros(SQUARE, SQUARE))
        ledger.name("base", [x])
        ledger.name("adapter", [w])
        ledger.watch_gradients([w])
        with ledger.phase("step"):
            h = torch.mm(x, w).sigmoid()  # sigmoid saves its result
            loss = h.sum()
            del h
            assert ledger.in_use["saved activations"] == MB
            loss.backward()
            del loss
        assert ledger.in_use["saved activations"] == 0
        assert ledger.in_use["gradients"] == MB
        w.grad = None
        assert ledger.in_use["gradients"] == 0
        ledger.close()
    assert ledger.peaks["step"].kinds["saved activations"] == MB


def test_logits_are_known_by_their_width() -> None:
    with Ledger(vocabulary=1000) as ledger:
        logits = torch.zeros(7, 16) @ torch.zeros(16, 1000)
        assert ledger.in_use["logits"] == logits.nbytes


def test_numbers_that_are_asked_for_are_one() -> None:
    with Ledger():
        x = torch.zeros(3)
        assert x.sum().item() == 1.0 and bool(torch.isfinite(x).all()) and int(x.long()[0]) == 1


def test_of_runs_of_numbers_there_is_one_and_of_its_length_nothing_is_known() -> None:
    with Ledger():
        numbers = torch.arange(6)
        assert numbers.unique_consecutive().tolist() == [1]
        with pytest.raises(DynamicOutputShapeException):
            numbers.unique_consecutive(return_counts=True)


def test_work_is_counted_by_phase() -> None:
    with Ledger() as ledger:
        a, b = torch.zeros(8, 16), torch.zeros(16, 4)
        with ledger.phase("product"):
            torch.mm(a, b)
    assert ledger.work["product"].flops == 2 * 8 * 16 * 4
    assert ledger.work["product"].written == 8 * 4 * 4


def test_attention_on_a_cpu_is_counted_too() -> None:
    with Ledger() as ledger:
        q = torch.zeros(1, 2, 5, 4)
        with ledger.phase("attention"):
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True)
        with ledger.phase("backward"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(out, q, q, q, out, sums, 0.0, True)
        with ledger.phase("not causal"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
        with ledger.phase("fewer queries"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[:, :, :3], q, q, 0.0, True)
        with ledger.phase("more queries"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q[:, :, :3], q[:, :, :3], 0.0, True)
    seen = 5 * 6 // 2  # keys up to each query
    found = {phase: ledger.work[phase].flops for phase in ("attention", "backward", "not causal")}
    assert ledger.work["fewer queries"].flops == 2 * (2 * 2 * (1 + 2 + 3) * 4)
    assert ledger.work["more queries"].flops == 2 * (2 * 2 * (1 + 2 + 3 + 3 + 3) * 4)
    assert found == {
        "attention": 2 * (2 * 2 * seen * 4), "backward": 5 * (2 * 2 * seen * 4), "not causal": 2 * (2 * 2 * 25 * 4)
    }  # fmt: skip


def test_a_product_has_the_shape_of_a_product_and_what_does_not_fit_is_refused() -> None:
    with Ledger() as ledger:
        left, right = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(6, 4, dtype=torch.bfloat16)
        before = ledger.bytes
        found = torch.mm(left, right.t())
        assert (found.shape, found.stride(), found.dtype) == ((3, 6), (6, 1), torch.bfloat16)
        assert ledger.bytes - before == 2 * 3 * 6
        for wrong in (right, right.t()[0]):
            with pytest.raises(RuntimeError):
                torch.mm(left, wrong)


def test_what_is_computed_with_numbers_within_a_rehearsal_takes_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies of modules are compared so; with their workspaces a plan's peak lay in the first process that compared."""
    monkeypatch.setattr(module, "WORKSPACES", {torch.ops.aten.mm.default: lambda *_: 100 * MB})
    module._KNOWN.clear()
    try:
        with Ledger() as ledger:
            with unset_fake_temporarily():
                numbers = torch.ones(3, 3)
                assert torch.equal(torch.mm(numbers, numbers), 3 * numbers)
            assert ledger.peaks.get("") is None or ledger.peaks[""].bytes < MB
            torch.mm(torch.zeros(3, 3), torch.zeros(3, 3))
            assert ledger.peaks[""].bytes > 100 * MB
    finally:
        module._KNOWN.clear()
