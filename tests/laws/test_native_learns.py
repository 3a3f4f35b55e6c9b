"""A step of a whole bf16 model by the native library gives the loss and the gradients that torch's own operations give."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.core.selection import Share
from lorakeet.data.pack import Batch
from lorakeet.kernels.cpu import attention, dense, elementwise, int8_rows, operators, stored, trained_pairs
from lorakeet.models.inject import selection_of, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.text.loss import text_loss
from tiny.adapters import random_adapter
from tiny.models import save_tiny_llama
from tiny.native import needs_native

pytestmark = needs_native

LENGTHS, LAYERS = (90, 53, 45), 2
FAMILIES = {"llama": 4, "qwen3": 6}  # turns of a layer: Qwen3 norms queries and keys, and turns them again on the way back


class Counted(TorchDispatchMode):
    """Counts Lorakeet's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lorakeet":
            self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def learnt(text: TextModel, batch: Batch) -> dict[str, Tensor]:
    """The loss, and the gradient of every A and B."""
    loss, _ = text_loss(text, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = trained_parameters(text.model, "default")
    return {"loss": loss.detach(), **{name: each.grad for name, each in parameters.items() if each.grad is not None}}


def rounded_model(folder: Path, family: str) -> Path:
    """A tiny model with heads of 64 whose weights bf16 holds exactly."""
    changes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_tiny_llama(folder, family=family, head_dim=64, num_hidden_layers=LAYERS, **changes)
    weights = {name: (each / 4).bfloat16() for name, each in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_second_backward_pass_is_refused(tmp_path: Path) -> None:
    """The first one overwrites what was saved."""
    text = load_text_model(ModelSpec(path=str(rounded_model(tmp_path, "llama")), dtype="bfloat16", products="bfloat16"))
    add_adapter(text, random_adapter(text.model))
    ids = torch.arange(40) % 90
    loss, _ = text_loss(text, Batch(ids, (40,), torch.arange(40), ids.roll(1), ("one",)))
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_products_in_int8_learn_to_the_bit_what_torch_s_do(tmp_path: Path) -> None:
    """But for the passes between them. x is coded once for q, k and v, and for gate and up."""
    quantize = QuantSpec(method="int8", int8_products=True)
    dense = ModelSpec(path=str(rounded_model(tmp_path, "llama")), dtype="bfloat16", products="bfloat16")
    adapter, spec = random_adapter(load_text_model(dense).model), replace(dense, quantize=quantize)
    ids = torch.arange(60) % 90
    batch = Batch(ids, (60,), torch.arange(60), ids.roll(1), ("one",))
    found, calls = [], []
    for used in (True, False):
        text = load_text_model(spec)
        add_adapter(text, adapter)
        text.model.train()
        with pytest.MonkeyPatch.context() as patch, Counted() as counted:
            if not used:
                patch.setattr("lorakeet.quant.int8.int8_products", lambda _: None)
            found.append(learnt(text, batch))
        calls.append(counted.calls)
    assert calls[0][int8_rows.INT8_PRODUCT] == 14 * LAYERS - 3  # nobody asks for gradients below the first block
    assert calls[0][int8_rows.QUANTISE_ROWS] == (4 + 7) * LAYERS - 3
    assert not calls[1][int8_rows.INT8_PRODUCT] and calls[1][elementwise.gated] == LAYERS
    for name, mine in found[0].items():
        assert torch.equal(mine, found[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [0, 12])
@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_and_torch_learn_the_same(family: str, method: str, prefix: int, tmp_path: Path) -> None:
    """Either way in bf16 is as far from the same step in fp32."""
    folder = rounded_model(tmp_path, family)
    exact = ModelSpec(path=str(folder), dtype="float32", products="float32", attention="varlen")
    adapter = random_adapter(load_text_model(exact).model)
    exact = replace(exact, quantize=QuantSpec(method=method))  # type: ignore[arg-type]
    ids = torch.arange(sum(LENGTHS)) % 90
    for start in (0, *accumulate(LENGTHS[:-1])):
        ids[start : start + prefix] = torch.arange(prefix)  # computed once for all rows
    batch = Batch(ids, LENGTHS, torch.arange(len(ids)), ids.roll(1), ("one", "two", "three"))
    found, calls = [], []
    for spec, context in (
        (replace(exact, dtype="bfloat16", products="bfloat16"), nullcontext()),
        (replace(exact, dtype="bfloat16", products="bfloat16"), operators.torch_only()),
        (exact, nullcontext()),
    ):
        text = load_text_model(spec)
        add_adapter(text, adapter)
        with Counted() as counted, context:
            found.append(learnt(text, batch))
        calls.append(counted.calls)
    native, by_torch, by_fp32 = calls
    assert not by_torch and not by_fp32
    assert native[attention.ROW_ATTENTION] == native[attention.ROW_ATTENTION_BACKWARD] == LAYERS
    assert native[elementwise.gated] == native[elementwise.gated_backward_] == LAYERS and native[elementwise.norm] > 2 * LAYERS
    assert native[elementwise.rotate_] == LAYERS * FAMILIES[family]
    of_head, unasked = 2, 3  # products, and those that would give the embeddings' gradient
    products = 14 * LAYERS - unasked + of_head if dense.multiplies() else 0
    packed = native[stored.STORED_PRODUCT] + native[stored.STORED_PRODUCT_ADD]
    assert native[dense.DENSE_PRODUCT] + native[dense.DENSE_PRODUCT_ADD] + packed == products
    assert packed == (products - of_head if method == "nf4" and products else 0)
    mine, theirs, truth = found
    assert len(truth) == 7 * 2 * LAYERS + 1
    for name, expected in truth.items():
        off, usual = (float((each[name].float() - expected).norm() / expected.norm()) for each in (mine, theirs))
        assert off < 1.5 * usual + 2e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_share_a_batch_learn_the_same_in_one_call(family: str, tmp_path: Path) -> None:
    """Rows of three adapters, one of a single token, a bare row and filler: C's gradients are as near to fp32's as torch's."""
    folder, names = rounded_model(tmp_path, family), ("one", "two", "three")
    exact = ModelSpec(path=str(folder), dtype="float32", products="float32", attention="varlen")
    adapter = random_adapter(load_text_model(exact).model)
    narrow = replace(exact, dtype="bfloat16", products="bfloat16")
    ids = torch.arange(100) % 90
    batch = Batch(ids, (33, 1, 40, 26), torch.arange(100), ids.roll(1), (*names, "bare"))
    shares = [Share(0, 33, "one"), Share(33, 34, "two"), Share(34, 74, "three")]
    found, calls = [], []
    for spec, context in ((narrow, nullcontext()), (narrow, operators.torch_only()), (exact, nullcontext())):
        text = load_text_model(spec)
        for name in names:
            add_adapter(text, adapter, name)
        trained = {f"{name}/{key}": each for name in names for key, each in trained_parameters(text.model, name).items()}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        text.model.train()
        text = text.with_every_token(pad=True)
        with Counted() as counted, context:
            selection_of(text.model).divide(shares, units=text.computed_tokens(100))
            loss, _ = text_loss(text, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                assert torch.equal(text_loss(text, batch)[0], loss.detach())  # as streamed blocks are computed twice
        found.append({"loss": loss.detach(), **{name: cast(Tensor, each.grad) for name, each in trained.items()}})
        calls.append(counted.calls)
    groups = 4  # q, k, v; o; gate, up; down
    assert calls[0][trained_pairs.TRAINED_PAIRS] == 2 * groups * LAYERS
    assert calls[0][trained_pairs.TRAINED_PAIRS_BACKWARD] == calls[0][trained_pairs.TRAINED_PAIRS_OF_A] == groups * LAYERS
    assert not calls[1] and not calls[2]
    nothing = 1e-6 * max(float(wanted.norm()) for wanted in found[2].values())  # a row of one token sees no other: its q and k
    for name, wanted in found[2].items():
        by_c, by_torch = ((of[name].float() - wanted).norm() for of in found[:2])
        assert by_c <= 1.5 * by_torch + 0.01 * wanted.norm() + nothing, name
