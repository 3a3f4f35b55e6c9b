"""A new kernel is one line of the table: a toy in the first line of each task is what computes, and what is reported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.base import frozen_product, matmul_each
from lorakeet.core.fused.mlp_and_norm import rms_norm
from lorakeet.core.fused.packed_attention import causal_rows
from lorakeet.core.layers.linear import LoraLinear, SharedInput, dense_base_of, new_pair
from lorakeet.core.pair_products import PairProducts, PairSpan
from lorakeet.core.plan import PlanEntry
from lorakeet.core.reordered import ReorderedBase
from lorakeet.core.selection import Share
from lorakeet.data.pack import Batch
from lorakeet.kernels import choose
from lorakeet.kernels.choose import TABLE, in_words, passed_over
from lorakeet.kernels.cpu import block, trained_block
from lorakeet.kernels.protocol import Kernel, Situation
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.int8 import Int8Base
from lorakeet.train.text.loss import frozen_head_losses
from tiny import trained_blocks
from tiny.models import save_tiny_llama
from tiny.native import needs_native

CPU = torch.device("cpu")
OUT, IN, TOKENS = 48, 32, 4


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Toys:
    """Puts a toy in the first line of a task, and notes what is called of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.called = patch, list[str]()

    def noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **more: (self.called.append(name), function(*given, **more))[1]

    def first(self, task: str, source: str = "toy_kernel", **offers: Any) -> Kernel:
        toy = ModuleType("toy_kernel")
        for name, offer in offers.items():
            setattr(toy, name, self.noting(name, offer) if callable(offer) and not isinstance(offer, type) else offer)
        self.patch.setitem(sys.modules, "toy_kernel", toy)
        line = Kernel("toy", lambda _: "", None, "", source)
        self.patch.setitem(TABLE, task, (line, *TABLE[task]))
        self.patch.setattr(choose, "CANDIDATES", {})
        return line


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Toys:
    return Toys(monkeypatch)


def elementwise(toys: Toys) -> None:
    toys.first("elementwise ops", norm=lambda x, weight, epsilon: (x + 1, x[..., :1]))
    x = numbers(2, 3)
    assert torch.equal(rms_norm(x, x[0], 1e-5)[0], x + 1)
    assert toys.called == ["norm"]


def attention(toys: Toys) -> None:
    class Rows:
        def __init__(self, rows: tuple[int, ...], scale: float, prefix: int = 0) -> None:
            toys.called.append(f"rows {rows}")

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return query.transpose(1, 2) + 7, ()

    toys.first("attention", "toy_kernel:Rows", Rows=Rows)
    states = numbers(1, 2, 5, 4)
    assert torch.equal(causal_rows(states, states, states, (3, 2), 0.5, torch.float32), states.transpose(1, 2) + 7)
    assert toys.called == ["rows (3, 2)"]


def dense_product(toys: Toys) -> None:
    toys.first("product, dense weight", DENSE_PRODUCT=lambda x, weight, across: torch.full((1,), 7.0))
    assert frozen_product(numbers(2, IN), numbers(OUT, IN)).tolist() == [7.0]
    assert toys.called == ["DENSE_PRODUCT"]


def quantised_product(toys: Toys) -> None:
    toys.first(
        "product, quantised weight",
        quantised_product=lambda weight, x, across: x.new_full((len(x), weight.shape[int(across)]), 7.0),
        add_quantised_product=lambda weight, to, x, across: to.add_(7) is not None,
    )
    base, to = Int8Base.of(numbers(OUT, IN)), torch.zeros(2, IN)
    base.add_matmul_t(to, numbers(2, OUT))
    assert base.matmul(numbers(2, IN)).unique().tolist() == base.matmul_t(numbers(2, OUT)).unique().tolist() == [7.0]
    assert toys.called == ["add_quantised_product", "quantised_product", "quantised_product"] and to.unique().tolist() == [7.0]


def int8_product(toys: Toys) -> None:
    toys.first(
        "product in int8",
        OUTLIER_COLUMNS=lambda x, count: (torch.arange(count), x[:, :count]),
        QUANTISE_ROWS=lambda x, by, columns=None: (x, x[:, :1]),
        INT8_PRODUCT=lambda codes, steps, weight, scale, across, columns=None, apart=None: codes.new_full((1,), 7.0),
    )
    base = Int8Base.of(numbers(OUT, IN)).train()
    base.in_int8 = True
    of_both = [*matmul_each([base, base], numbers(2, IN)), base.matmul_t(numbers(2, OUT))]
    assert [found.tolist() for found in of_both] == [[7.0]] * 3
    once = ["OUTLIER_COLUMNS", "QUANTISE_ROWS", "INT8_PRODUCT", "INT8_PRODUCT"]
    assert toys.called == [*once, "QUANTISE_ROWS", "INT8_PRODUCT"]


def dequantise(toys: Toys) -> None:
    toys.first("dequantise", dequantise_into=lambda weight, out, first: out.fill_(7) is not None)
    base = Int8Base.of(numbers(OUT, IN))
    assert base.dense().unique().tolist() == [7.0]
    torch.testing.assert_close(base.matmul(torch.ones(1, IN)), torch.full((1, OUT), 7.0 * IN))
    assert toys.called == ["dequantise_into"] * 2


def pairs_in_training(toys: Toys) -> None:
    toys.first(
        "low-rank pairs, training",
        TRAINED_PAIRS=lambda ys, x, factors, places, scales: ys[0].add_(7),
        TRAINED_PAIRS_BACKWARD=lambda grad_x, grads, h, factors, places, scales: (h, torch.zeros(factors[1].numel())),
        TRAINED_PAIRS_OF_A=lambda u, x, factors, places: torch.zeros(factors[0].numel()),
    )
    pairs, factors, y = (
        PairProducts([PairSpan(0, TOKENS, 1.0)], torch.float32),
        (numbers(2, IN), numbers(OUT, 2)),
        numbers(TOKENS, OUT),
    )
    before = y.clone()
    kept = pairs.add([y], numbers(TOKENS, IN), factors)
    through, _ = pairs.backward(None, [numbers(TOKENS, OUT)], kept, factors)
    pairs.of_a(through, numbers(TOKENS, IN), factors)
    assert torch.equal(y, before + 7)
    assert toys.called == ["TRAINED_PAIRS", "TRAINED_PAIRS_BACKWARD", "TRAINED_PAIRS_OF_A"]


def pairs_in_inference(toys: Toys) -> None:
    class PairLayout:
        bytes = 0

        def __init__(self, kinds: Any, shapes: Any) -> None:
            self.count = len(shapes)
            self.held = (1 << self.count) - 1

        def at(self, memory: Tensor) -> Tensor:
            return torch.zeros(self.count, 2, dtype=torch.int64)

        def copy(self, pairs: Any, memory: Tensor) -> None:
            toys.called.append("copy")

    class LayerRows:
        def __init__(self, shapes: Any, numbers: Any) -> None: ...

        def add(self, ys: list[Tensor], x: Tensor, shares: Any) -> None:
            toys.called.append("add")
            for y in ys:
                y.add_(shares)

    offers = {"PairLayout": PairLayout, "LayerRows": LayerRows, "as_readable": lambda x: x}
    toys.first("low-rank pairs, inference", Shares=lambda shares: float(sum(len(own) for own, _ in shares)), **offers)
    linear = nn.Linear(IN, OUT).requires_grad_(False)
    layer = LoraLinear(linear, dense_base_of(linear, "linear")).eval()
    entry = PlanEntry("a", "linear", (OUT, IN), 2, 4.0)
    layer.attach("a", new_pair(entry, weight=lambda: linear.weight, seed=0).eval())
    layer.selection.divide([Share(0, 3, "a")], units=TOKENS)
    x = numbers(TOKENS, IN)
    with torch.no_grad():
        torch.testing.assert_close(SharedInput()([layer], x)[0], linear(x) + 3)
    assert toys.called == ["as_readable", "as_readable", "copy", "Shares", "add"]


def inference_weights(toys: Toys) -> None:
    class Layout:
        def __init__(self, weight: Tensor) -> None:
            toys.called.append("layout")

        def product(self, x: Tensor) -> Tensor:
            toys.called.append("product")
            return x + 7

    toys.first("dense weights, inference", "toy_kernel:Layout", Layout=Layout)
    x = numbers(TOKENS, IN)
    assert torch.equal(ReorderedBase(numbers(OUT, IN)).matmul(x), x + 7)
    assert toys.called == ["layout", "product"]


def head_losses(toys: Toys) -> None:
    found = {"loss_in_place": lambda logits, targets, wants_grad: logits.new_full((len(targets),), 7.0)}
    toys.first("loss of the head", TILED=False, **found)
    losses = frozen_head_losses(numbers(TOKENS, IN), numbers(OUT, IN), torch.arange(TOKENS), chunk=3)
    assert losses.tolist() == [7.0] * TOKENS and toys.called == ["loss_in_place"] * 2


TASKS: dict[str, Callable[[Toys], None]] = {
    "attention": attention,
    "elementwise ops": elementwise,
    "product, dense weight": dense_product,
    "product, quantised weight": quantised_product,
    "product in int8": int8_product,
    "dequantise": dequantise,
    "low-rank pairs, training": pairs_in_training,
    "low-rank pairs, inference": pairs_in_inference,
    "dense weights, inference": inference_weights,
    "loss of the head": head_losses,
}
BLOCKS = {"decoder block, training", "decoder block, generation"}  # which are tested below, on whole models


@pytest.mark.parametrize("task", TASKS)
def test_what_is_first_in_its_row_computes(task: str, toys: Toys) -> None:
    TASKS[task](toys)
    said = in_words(Situation(CPU, torch.float32, torch.float32)).count(f"toy: {task.replace(',', '')}")
    assert toys.called and said == 1


def test_a_report_names_kernels_for_the_weights_at_hand(toys: Toys) -> None:
    """GPTQModel's kernel does not dequantise NF4, nor bitsandbytes' GPTQ."""
    line = toys.first("dequantise")
    toys.patch.setitem(TABLE, "dequantise", (replace(line, method="gptq"), *TABLE["dequantise"][1:]))
    situation = Situation(CPU, torch.float32, torch.float32)
    said = [in_words(situation, methods) for methods in ((), ("nf4",), ("nf4", "gptq"))]
    assert ["toy: dequantise" in text for text in said] == [False, False, True]


def test_every_task_has_a_toy() -> None:
    assert {*TASKS, *BLOCKS} == set(TABLE)


def test_a_kernel_that_does_not_run_leaves_it_to_the_next(toys: Toys) -> None:
    line = toys.first("elementwise ops", norm=lambda x, weight, epsilon: (x + 1, x[..., :1]))
    refusing = Kernel("refusing", lambda it: "takes float64", None, "", line.source)
    toys.patch.setitem(TABLE, "elementwise ops", (refusing, *TABLE["elementwise ops"][1:]))
    toys.patch.setattr(choose, "CANDIDATES", {})
    x = numbers(2, 3)
    rms_norm(x, x[0], 1e-5)
    assert not toys.called
    assert (refusing, "takes float64") in passed_over("elementwise ops", Situation(CPU, x.dtype, x.dtype))[1]


@needs_native
def test_a_new_block_for_training_computes(tmp_path: Path, toys: Toys) -> None:
    trained_blocks.use_c_products(toys.patch)
    text = trained_blocks.load(save_tiny_llama(tmp_path / "model", **trained_blocks.SHAPE))
    others = {name: getattr(trained_block, name) for name in ("Weights", "Pairs")}
    toys.first("decoder block, training", BlockCall=partial(trained_block.BlockCall), **others)
    ids = torch.arange(60) % 50
    batch = Batch(ids, (60,), torch.arange(60), ids.roll(1), ("one",))
    for _ in range(2):  # the second time with cached arguments
        text.hidden(batch)
    assert toys.called == ["BlockCall"] * 2 * text.model.config.num_hidden_layers


def generated_by_c(folder: Path) -> ModelSpec:
    path = save_tiny_llama(folder / "model", head_dim=64, intermediate_size=64)
    return ModelSpec(path=str(path), dtype="bfloat16", products="bfloat16")


@needs_native
def test_a_new_block_for_generation_computes(tmp_path: Path, toys: Toys) -> None:
    text = load_text_model(generated_by_c(tmp_path))
    live = ServingModel(text)
    names = "BlockParts", "BlockPairs", "Shares", "NO_PAIRS"
    toys.first("decoder block, generation", Block=partial(block.Block), **{name: getattr(block, name) for name in names})
    step(text, KeyValues(slots=1, capacity=16), [CacheRow(0, 0, (3, 5, 7), {})], live.selection)
    assert toys.called and set(toys.called) == {"Block"}


PARTS = [
    ("training", "attention"),
    ("training", "elementwise ops"),
    ("training", "product, dense weight"),
    ("training", "product, quantised weight"),
    ("training", "product in int8"),
    ("training", "low-rank pairs, training"),
    ("generation", "elementwise ops"),
    ("generation", "low-rank pairs, inference"),
    ("generation", "dense weights, inference"),
]


@needs_native
@pytest.mark.parametrize(("block", "part"), PARTS)
def test_a_block_in_c_hides_no_new_kernel_of_its_parts(block: str, part: str, toys: Toys) -> None:
    trained_blocks.use_c_products(toys.patch)
    task, narrow = f"decoder block, {block}", Situation(CPU, torch.bfloat16, torch.bfloat16)
    in_c, before = passed_over(task, narrow)
    assert in_c.name.startswith("C: ") and not before
    toys.first(part)
    used, skipped = passed_over(task, narrow)
    assert used.name == "separate kernels" and skipped == [(in_c, f"for {part} it is toy")]


@needs_native
def test_a_new_kernel_computes_in_place_of_its_part_in_generation(tmp_path: Path, toys: Toys) -> None:
    text = load_text_model(generated_by_c(tmp_path))
    live = ServingModel(text)
    offers = {"rotate_": lambda states, cos, sin, back: None, "norm": lambda x, weight, epsilon: (x, x[..., :1])}
    toys.first("elementwise ops", **offers)
    step(text, KeyValues(slots=1, capacity=16), [CacheRow(0, 0, (3, 5, 7), {})], live.selection)
    assert toys.called == [*["rotate_"] * text.model.config.num_hidden_layers, "norm"]
