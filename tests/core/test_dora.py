"""DoRA against the literal dense computation and against PEFT's layer."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.dora import DoraPair
from lorakeet.core.layers.linear import LoraConv2d, dense_base_of, new_pair
from lorakeet.core.plan import PlanEntry


def pair_on(module: nn.Module, kind: str, *, random: bool = True) -> DoraPair:
    """A DoRA pair begun on `module`, its factors and magnitude then moved away from their start."""
    weight = module.weight.detach().t() if kind == "conv1d" else module.weight.detach()
    entry = PlanEntry("q", kind, tuple(weight.shape), 4, 12.0, variant="dora")  # type: ignore[arg-type]
    pair = new_pair(entry, weight=lambda: weight, seed=0)
    assert isinstance(pair, DoraPair)
    if random:
        with torch.no_grad():
            pair.A.normal_(0, 0.3)
            pair.B.normal_(0, 0.3)
            pair.magnitude.mul_(1 + 0.3 * torch.rand_like(pair.magnitude))
    return pair.eval()


def literal(weight: torch.Tensor, pair: DoraPair) -> torch.Tensor:
    """m ∘ (W + s·B·A) / ‖W + s·B·A‖ on W (out, in…), in fp64."""
    full = weight.double() + (3 * pair.B.double().flatten(1) @ pair.A.double().flatten(1)).view(weight.shape)
    gain = pair.magnitude.double() / full.flatten(1).norm(dim=1)
    return full * gain.view(-1, *[1] * (weight.dim() - 1))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_forward_and_fold_are_the_literal_formula(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(6, 9) if kind == "linear" else Conv1D(9, 6)
    pair, x = pair_on(module, kind), torch.randn(5, 6)
    rows = module.weight.detach() if kind == "linear" else module.weight.detach().t()
    wanted = literal(rows, pair)
    got = pair(x, dense_base_of(module, kind), module.bias)
    assert torch.allclose(got.double(), x.double() @ wanted.T + module.bias.double(), atol=1e-5)
    folded = pair.fold(module.weight)
    assert folded.is_contiguous() and not folded.requires_grad
    assert torch.allclose(folded.double(), wanted if kind == "linear" else wanted.T, atol=1e-6)


def test_convolution_is_the_literal_formula() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 8, 3, padding=1, stride=2), torch.randn(2, 3, 6, 6)
    pair = pair_on(conv, "conv2d")
    layer = LoraConv2d(conv).eval()
    layer.attach("a", pair)
    layer.active = "a"
    wanted = literal(conv.weight.detach(), pair)
    dense = nn.functional.conv2d(x.double(), wanted, conv.bias.double(), conv.stride, conv.padding)
    assert torch.allclose(layer(x).double(), dense, atol=1e-5)
    assert torch.allclose(pair.fold(conv.weight.detach()).double(), wanted, atol=1e-6)


@pytest.mark.parametrize("start", ["kaiming", "gaussian", "orthogonal", "pissa", "olora"])
def test_the_start_changes_nothing(start: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(6, 9), torch.randn(5, 6)
    entry = PlanEntry("q", "linear", (9, 6), 4, 12.0, variant="dora", start=start)  # type: ignore[arg-type]
    pair = new_pair(entry, weight=module.weight.detach, seed=0)
    assert torch.allclose(pair(x, dense_base_of(module, "linear"), module.bias), module(x), atol=1e-5)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_the_gain_is_not_rounded_to_bf16(products: torch.dtype) -> None:
    """bf16's neighbours of 0.994 are 0.9922 and 0.9961: a gain rounded to one of them errs on all rows alike."""
    torch.manual_seed(0)
    module, x = nn.Linear(64, 64, bias=False).bfloat16(), torch.randn(256, 64).bfloat16()
    pair = pair_on(module, "linear", random=False)
    with torch.no_grad():
        pair.magnitude.mul_(0.994)
    got = pair(x, dense_base_of(module, "linear"), None, products)
    wanted = x.double() @ literal(module.weight.detach(), pair).T
    assert got.dtype == torch.bfloat16
    assert abs((got.double() * wanted).sum() / (wanted * wanted).sum() - 1) < 5e-4  # numbers are rounded, each for itself


def test_a_convolution_s_gain_is_not_rounded_to_bf16() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, bias=False).bfloat16(), torch.randn(4, 8, 8, 8).bfloat16()
    pair = pair_on(conv, "conv2d", random=False)
    with torch.no_grad():
        pair.magnitude.mul_(0.994)
    layer = LoraConv2d(conv).eval()
    layer.attach("a", pair)
    layer.active = "a"
    wanted = nn.functional.conv2d(x.double(), literal(conv.weight.detach(), pair))
    assert abs((layer(x).double() * wanted).sum() / (wanted * wanted).sum() - 1) < 5e-4


def test_gradients_with_the_norm_held_constant() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(6, 9), torch.randn(5, 6)
    pair = pair_on(module, "linear")
    target = torch.randn(5, 9)
    (pair(x, dense_base_of(module, "linear"), module.bias) * target).sum().backward()
    A, B, m = (p.detach().clone().requires_grad_() for p in (pair.A, pair.B, pair.magnitude))
    full = module.weight.detach() + 3 * B @ A
    dense = full * (m / full.detach().norm(dim=1))[:, None]
    ((x @ dense.T + module.bias.detach()) * target).sum().backward()
    for ours, theirs in ((pair.A, A), (pair.B, B), (pair.magnitude, m)):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)


def test_output_and_gradients_equal_pefts_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9))
    module = net[0]
    pair, x = pair_on(module, "linear"), torch.randn(5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], use_dora=True)
        theirs = peft.get_peft_model(net, config).base_model.model[0]
    parameters = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for parameter, value in zip(parameters, (pair.A, pair.B, pair.magnitude), strict=True):
            parameter.copy_(value)
    ours, peers = pair(x, dense_base_of(module, "linear"), module.bias), theirs(x)
    assert torch.allclose(ours, peers, atol=1e-5)
    ours.pow(2).sum().backward()
    peers.pow(2).sum().backward()
    for mine, other in zip((pair.A, pair.B, pair.magnitude), parameters, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-3, rtol=1e-4)


def test_a_row_of_zeros_stays_finite() -> None:
    module = nn.Linear(6, 9)
    nn.init.zeros_(module.weight)
    pair = pair_on(module, "linear", random=False)
    assert pair(torch.randn(5, 6), dense_base_of(module, "linear")).isfinite().all()
    assert pair.fold(module.weight.detach()).isfinite().all()


def test_value_carries_the_magnitude() -> None:
    pair = pair_on(nn.Linear(6, 9), "linear")
    value = pair.value()
    other = pair_on(nn.Linear(6, 9), "linear")
    other.load(value)
    assert value.magnitude is not None and torch.equal(other.magnitude, pair.magnitude) and torch.equal(other.A, pair.A)
