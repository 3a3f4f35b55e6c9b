"""The finish of a merge into a quantised model: the pairs learn through the quantiser, and what is returned is what computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.data.chat import Encoder, encode_rows
from lorakeet.data.pack import micro_batches
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.merging.requantise import Latent, Requantised
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.grids import grid_of
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.loss import text_loss
from lorakeet.train.text.quantisation_aware import StraightThroughLinear, quantisation_aware_finish
from tiny.runs import reviews, write_rows

PATHS = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj")


def test_the_loss_falls_and_only_codes_of_the_given_layers_change(tiny_llama_folder: Path, tmp_path: Path) -> None:
    spec = ModelSpec(path=str(tiny_llama_folder), dtype="float32", products="float32")
    text = load_text_model(spec, say=lambda line: None)
    data = DataSpec(train=str(write_rows(tmp_path / "rows.jsonl", reviews(24))), max_tokens=120)
    rows = encode_rows(read_rows(data.train, data), Encoder(text.tokenizer, data)).examples
    solved, pairs = {}, {}
    chance = torch.Generator().manual_seed(0)
    for path in PATHS:
        weight = text.model.get_parameter(f"{path}.weight").detach()
        grid = grid_of(Nf4Base.of(weight))
        solved[path] = Requantised(grid.nearest(weight), Latent(grid, weight), "kept", 0.0)
        out, width = weight.shape
        pairs[path] = Pair(torch.randn(4, width, generator=chance), torch.zeros(out, 4), 12.0)
        text.model.set_submodule(path, PackedLinear(solved[path].base))
    before = {name: tensor.clone() for name, tensor in text.model.state_dict().items() if not name.startswith(PATHS)}
    first, heard = mean_loss(text, rows), []
    bases = quantisation_aware_finish(
        text,
        solved,
        Adapter(pairs),
        rows,
        steps=12,
        spec=TrainSpec(batch_size=8, learning_rate=0.2),
        products=torch.float32,
        on_step=lambda step, loss: heard.append((step, loss)),
    )
    assert [step for step, _ in heard] == list(range(1, 13)) and heard[-1][1] < heard[0][1]
    assert mean_loss(text, rows) < first - 0.1
    for path in PATHS:
        held = text.model.get_submodule(path)
        assert isinstance(held, PackedLinear) and held.base is bases[path]
        assert torch.equal(bases[path].absmax, solved[path].base.absmax)  # type: ignore[arg-type]
        assert not torch.equal(bases[path].packed, solved[path].base.packed)  # type: ignore[arg-type]
    after = text.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def mean_loss(text: object, rows: object) -> float:
    batches = micro_batches(rows, 2048)  # type: ignore[arg-type]
    with torch.no_grad():
        found = [text_loss(text, batch) for batch in batches]  # type: ignore[arg-type]
    return float(sum(loss for loss, _ in found)) / sum(count for _, count in found)


OUT, IN = 16, 64


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer() -> tuple[StraightThroughLinear, PackedBase, Tensor]:
    latent = 0.05 * numbers(OUT, IN, seed=0)
    grid = grid_of(Nf4Base.of(latent))
    pair = Pair(0.1 * numbers(4, IN, seed=1), 0.1 * numbers(OUT, 4, seed=2), 12.0)
    return StraightThroughLinear(latent, pair, grid, numbers(OUT, seed=3)), grid.nearest(latent), latent


def test_it_begins_with_what_was_packed() -> None:
    module, base, latent = layer()
    torch.testing.assert_close(module.weight(), latent)
    x = numbers(5, IN, seed=4)
    torch.testing.assert_close(module(x), x @ base.dense().T + module.bias)
    assert torch.equal(module.packed().dense(), base.dense())


def test_gradients_pass_the_rounding_and_reach_the_pair_alone() -> None:
    """For y = x·Q(W)ᵀ with G = ∂L/∂y: ∂L/∂W = Gᵀ·x, so ∂L/∂A = s·Bᵀ·Gᵀ·x and ∂L/∂B = s·Gᵀ·x·Aᵀ, s = 3."""
    module, _, _ = layer()
    x, grad = numbers(5, IN, seed=4), numbers(5, OUT, seed=5)
    module(x).backward(grad)
    outer = grad.T @ x
    torch.testing.assert_close(module.A.grad, 3 * module.B.detach().T @ outer)
    torch.testing.assert_close(module.B.grad, 3 * outer @ module.A.detach().T)
    assert module.bias is not None and module.bias.grad is None


def test_the_gradient_of_the_input_is_that_of_the_rounded_weight() -> None:
    module, base, _ = layer()
    x, grad = numbers(5, IN, seed=4).requires_grad_(), numbers(5, OUT, seed=5)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ base.dense())


def test_narrow_products_choose_the_same_codes() -> None:
    """Rounding happens in fp32, whatever the products run in; inputs and outputs keep their dtype."""
    wide, base, latent = layer()
    pair = Pair(wide.A.detach(), wide.B.detach(), 12.0)
    narrow = StraightThroughLinear(latent, pair, wide.grid, wide.bias, products=torch.bfloat16)
    assert torch.equal(narrow.packed().dense(), base.dense())
    x, grad = numbers(5, IN, seed=4), numbers(5, OUT, seed=5)
    for module in (wide, narrow):
        module(x).backward(grad)
    assert narrow(x).dtype == torch.float32 and narrow.A.grad is not None and narrow.A.grad.dtype == torch.float32
    torch.testing.assert_close(narrow(x), wide(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(narrow.A.grad, wide.A.grad, rtol=0.05, atol=0.05)


def test_what_is_packed_after_a_step_is_what_it_computes() -> None:
    module, base, _ = layer()
    with torch.no_grad():
        module.B += 0.2 * numbers(OUT, 4, seed=6)
    module.round()
    x = numbers(5, IN, seed=4)
    packed = module.packed().dense()
    assert not torch.equal(packed, base.dense())
    torch.testing.assert_close(module(x), x @ packed.T + module.bias)
