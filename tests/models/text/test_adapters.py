"""`models.adapt`: an adapter begun or put into a text model computes as it does in training."""

from __future__ import annotations

from pathlib import Path

import torch

from lorakeet.core.fused.mlp_and_norm import FrozenRmsNorm, GatedMlp
from lorakeet.core.layers.linear import AdaptedLayer
from lorakeet.core.spec import LoraSpec
from lorakeet.data.pack import Batch
from lorakeet.models.inject import activate, adapter_of, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import add_adapter, as_trained, initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel


def loaded(folder: Path) -> TextModel:
    return load_text_model(ModelSpec(path=str(folder), dtype="bfloat16", products="float32", device="cpu"))


def kinds(text: TextModel) -> tuple[int, int, set[torch.dtype | None]]:
    found = list(text.model.modules())
    adapted = [module for module in found if isinstance(module, AdaptedLayer)]
    fused = sum(isinstance(module, (GatedMlp, FrozenRmsNorm)) for module in found)
    return len(adapted), fused, {layer.products for layer in adapted}


def test_an_adapter_that_was_put_in_again_computes_what_the_trained_one_does(tiny_llama_folder: Path) -> None:
    live, again = loaded(tiny_llama_folder), loaded(tiny_llama_folder)
    initialise_adapter(live, plan_for(live.model, LoraSpec(rank=4, alpha=12), live.family), seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(live.model).values():
            parameter.normal_(std=0.1)
    add_adapter(again, adapter_of(live.model), "second")
    assert kinds(live) == kinds(again)
    pairs, fused, products = kinds(live)
    assert pairs == 14 and fused == 7 and products == {torch.float32}  # 2 MLPs, 5 norms
    ids = torch.arange(20)
    batch = Batch(ids, (20,), torch.arange(20), ids, ("row",))
    with torch.no_grad():
        assert torch.equal(live.hidden(batch), again.hidden(batch))


def test_a_bare_model_computes_as_trained_within_a_context(tiny_llama_folder: Path) -> None:
    bare, live = loaded(tiny_llama_folder), loaded(tiny_llama_folder)
    initialise_adapter(live, plan_for(live.model, LoraSpec(rank=4, alpha=12), live.family), seed=3)
    activate(live.model, None)
    with as_trained(bare), as_trained(live):
        assert kinds(bare) == (0, 7, set()) and kinds(live)[1] == 7
    assert kinds(bare)[1] == 0 and kinds(live)[1] == 7, "as they were"
