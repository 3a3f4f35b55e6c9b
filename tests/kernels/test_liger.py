"""liger-kernel's kernels, in Triton's interpreter, compute what torch does; where they would not, they are not used."""

from __future__ import annotations

import functools
import logging
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.fused.attention import rotated
from lorakeet.kernels import liger as kernels
from lorakeet.kernels import proof
from lorakeet.kernels import triton_support as support
from lorakeet.kernels.choose import elementwise_ops, loss_kernel, passed_over
from lorakeet.kernels.protocol import Situation
from lorakeet.train.text.loss import frozen_head_losses

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """What was proved with kernels that a test has changed is not kept."""
    yield
    kernels.computes_the_same.cache_clear()
    proof.missing_package.cache_clear()


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def near(found: Tensor, expected: Tensor, roundings: int = 3) -> None:
    """Equal to so many roundings of the dtype, relative to the largest number."""
    allowed = roundings * torch.finfo(found.dtype).eps * float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) <= max(allowed, 1e-6), (found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 8), (2, 48), (1, 4, 577)])
def test_norm(liger: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = (numbers(*shape, dtype=dtype, seed=seed, spread=3.0) for seed in (1, 2))
    weight = numbers(shape[-1], dtype=dtype, seed=3)
    y, rho = liger.norm(x, weight, EPSILON)
    leaf = x.double().requires_grad_()
    scale = torch.rsqrt(leaf.square().mean(-1, keepdim=True) + EPSILON)
    expected = weight.double() * (leaf * scale)
    (of_x,) = torch.autograd.grad(expected, leaf, grad.double())
    assert y.dtype == dtype and rho.shape == (*shape[:-1], 1) and rho.dtype == torch.float32
    near(y, expected.detach())
    near(rho, scale.detach(), roundings=4)
    assert torch.equal(liger.norm_again(x, rho, weight), y)
    before = grad.clone()
    near(liger.norm_backward(grad, x, rho, weight), of_x, roundings=4)
    assert torch.equal(grad, before), "the gradient of others stays"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_gates(liger: Any, dtype: torch.dtype, kind: str) -> None:
    gate, up, grad = (numbers(4, 70, dtype=dtype, seed=seed, spread=2.0) for seed in (4, 5, 6))
    activation = torch.nn.functional.silu if kind == "silu" else functools.partial(torch.nn.functional.gelu, approximate="tanh")
    forward, backward = (liger.gated, liger.gated_backward_) if kind == "silu" else (liger.gelu_gated, liger.gelu_gated_backward_)
    leaves = [each.double().requires_grad_() for each in (gate, up)]
    expected = activation(leaves[0]) * leaves[1]
    of_gate, of_up = torch.autograd.grad(expected, leaves, grad.double())
    near(forward(gate, up), expected.detach())
    inner = backward(gate, up, grad)
    for mine, theirs in ((inner, expected.detach()), (gate, of_gate), (up, of_up)):
        near(mine, theirs, roundings=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_rotation(liger: Any, dtype: torch.dtype, back: bool, heads: int) -> None:
    states = numbers(5, heads, 24, dtype=dtype, seed=7)
    angles = numbers(5, 12, seed=8)
    cos, sin = (torch.cat([each, each], -1).to(dtype) for each in (angles.cos(), angles.sin()))
    expected = rotated(states.double(), cos.double(), sin.double(), back=back)
    liger.rotate_(states, cos, sin, back)
    near(states, expected)


@pytest.mark.parametrize("wants_grad", [True, False])
def test_losses(liger: Any, wants_grad: bool) -> None:
    logits, targets = numbers(4, 100, spread=6.0), torch.tensor([0, 99, 50, 7])
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    slope = logits.double().softmax(1)
    slope[torch.arange(4), targets] -= 1
    before = logits.clone()
    near(liger.loss_in_place(logits, targets, wants_grad=wants_grad), expected, roundings=16)
    near(logits, slope, roundings=16) if wants_grad else None
    assert wants_grad or torch.equal(logits, before)
    assert liger.loss_in_place(logits[:0], targets[:0], wants_grad=True).shape == (0,)


def test_the_loss_of_a_head_is_computed_by_it(liger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = numbers(9, 16, seed=1).requires_grad_(), numbers(50, 16, seed=2)
    targets = torch.arange(9) * 5
    losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), hidden)
    assert loss_kernel(hidden, weight.dtype, 50) is liger
    seen: list[int] = []
    launch = liger.loss_in_place
    monkeypatch.setattr(liger, "loss_in_place", lambda z, t, **more: seen.append(len(z)) or launch(z, t, **more))  # type: ignore[func-returns-value]
    found = frozen_head_losses(hidden, weight, targets, chunk=4)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden)[0], expected, rtol=1e-4, atol=1e-5)
    assert seen == [4, 4, 1]


# The proof.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "width"), [("norm", 48), ("gates", 48), ("rotation", 16), ("loss", 90)])
def test_they_are_proved(liger: Any, kind: str, width: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    assert liger.computes_the_same(kind, CPU, dtype, width) and not caplog.records


@pytest.mark.parametrize(
    ("kind", "function", "said"),
    [
        ("norm", "norm", "differs from torch in a norm"), ("norm", "norm_backward", "in ∂x of a norm"),
        ("norm", "norm_again", "does not give the same bits"), ("gates", "gelu_gated", "in gelu(z)∘u"),
        ("gates", "gated_backward_", "in silu(z)∘u again"), ("rotation", "rotate_", "in a rotation"),
        ("loss", "loss_in_place", "in a loss"),
    ],
)  # fmt: skip
def test_one_that_differs_is_not_used_and_is_said_once(
    liger: Any, kind: str, function: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(liger, function)

    def wrong(first: Tensor, *given: Any, **more: Any) -> Any:
        found = right(first, *given, **more)
        (first if found is None else found[0] if isinstance(found, tuple) else found).mul_(1.01)
        return found

    monkeypatch.setattr(liger, function, wrong)
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        for _ in range(2):
            assert not liger.computes_the_same(kind, CPU, torch.float32, 48)
    (record,) = caplog.records
    assert said in record.getMessage() and "Torch computes instead" in record.getMessage()
    x = numbers(2, 48)
    assert (elementwise_ops(x, x) is None) == (kind == "gates") and (elementwise_ops(x, by_rows=True) is None) == (kind == "norm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [48, 512])
def test_the_other_gelu_is_seen_in_narrow_dtypes(
    liger: Any, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By erf; it differs from the approximation with tanh by at most 0.0005 of u."""
    def by_erf(gate: Tensor, up: Tensor) -> Tensor:
        return (torch.nn.functional.gelu(gate.float()) * up.float()).to(gate.dtype)

    monkeypatch.setattr(liger, "gelu_gated", by_erf)
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        assert not liger.computes_the_same("gates", CPU, dtype, width)
    assert "in gelu(z)∘u" in caplog.text


def test_rotations_are_proved_for_each_number_of_heads(liger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is compiled for it: one that does not compile for 8 heads serves 2, and torch computes the others."""
    right, seen = liger.rotate_, []

    def rotate(states: Tensor, *given: Any) -> None:
        seen.append(states.shape[1])
        if states.shape[1] == 8:
            raise RuntimeError("out of resource: shared memory")
        right(states, *given)

    monkeypatch.setattr(liger, "rotate_", rotate)
    angles = numbers(3, 16)
    assert [elementwise_ops(numbers(3, heads, 16), angles) is liger for heads in (2, 8)] == [True, False]
    assert set(seen) == {2, 8}


def test_one_that_does_not_run_is_not_used(
    liger: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OutOfResources(Exception):
        """As Triton's own, which derive from nothing else."""

    def failing(*_: Any) -> Any:
        raise OutOfResources("out of resource:\nshared memory")

    monkeypatch.setattr(liger, "norm", failing)
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        assert not liger.computes_the_same("norm", CPU, torch.float32, 48)
    assert "does not run: OutOfResources out of resource: shared memory." in caplog.text

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(liger, "gated", full)
    with pytest.raises(torch.OutOfMemoryError):
        liger.computes_the_same("gates", CPU, torch.float32, 48)


# Where they do not run.


def reasons(task: str = "elementwise ops", device: torch.device = CUDA, dtype: torch.dtype = torch.float32) -> list[str]:
    return [why for kernel, why in passed_over(task, Situation(device, dtype, dtype))[1] if kernel.name.startswith("Liger")]


def test_why_it_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(device=CPU) == ["it is a kernel for CUDA GPUs"]
    assert reasons(dtype=torch.float64) == ["takes float32, bfloat16 and float16; states are float64"]
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert reasons() == ["Triton is not installed: torch for CUDA on Linux brings it"]
    monkeypatch.setattr(kernels, "has_triton", lambda: True)

    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    install = "Install it with: pip install 'liger-kernel<0.9,>=0.8.5'"
    for version, said in (
        (missing, f"liger-kernel is not installed. {install}"),
        (lambda _: "0.7.0", f"liger-kernel is 0.7.0; expected <0.9,>=0.8.5. {install}"),
    ):
        proof.missing_package.cache_clear()
        monkeypatch.setattr(proof.metadata, "version", version)
        assert reasons() == reasons("loss of the head") == [said]
    proof.missing_package.cache_clear()
    monkeypatch.setattr(proof.metadata, "version", lambda _: "0.8.5")
    if not torch.cuda.is_available():
        assert reasons() == ["torch sees no CUDA device here"]


def test_gpus_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(proof.metadata, "version", lambda _: "0.8.5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(support, "why_no_launcher", lambda: "")
    assert not reasons() and not reasons(dtype=torch.float16)
    assert reasons(dtype=torch.bfloat16) == ["needs compute capability 8.0; this GPU has 7.5"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert reasons() == ["needs compute capability 7.5; this GPU has 7.0"]
