"""The finish of a merge into a quantised model: the pairs learn through the quantiser, and what is returned is what computes."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.data.chat import Encoder, encode_rows
from lorakeet.data.pack import micro_batches
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.merge.requantise import Latent, Requantised
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.grids import grid_of
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedLinear
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.loss import text_loss
from lorakeet.train.text.quantisation_aware import quantisation_aware_finish
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
