"""`models.folded`: what each weight should be once an adapter is folded in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter, TokenRows
from lorakeet.core.math import delta, scale_of
from lorakeet.errors import ConfigError
from lorakeet.models.fuse import fuse
from lorakeet.models.inject import activate, attach
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.folded_weights import fold_layers, folded_weights
from tiny.adapters import random_adapter, random_pair
from tiny.models import save_tiny_llama
from tiny.streams import loaded


def folded(model: Any, name: str | None) -> dict[str, torch.Tensor]:
    return {path: weight[:] for path, weight in folded_weights(model, name)}


@pytest.mark.parametrize(
    ("family", "leaves"),
    [("llama", ()), ("gpt2", ("c_attn", "c_proj")), ("mixtral", ("gate_up_proj", "down_proj")), ("qwen2", ("embed_tokens",))],
)
def test_changed_weights_have_their_pair_and_others_are_as_they_were(
    tiny_model: Callable[..., Any], family: str, leaves: tuple[str, ...]
) -> None:
    model = tiny_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters(remove_duplicate=False)}
    adapter = random_adapter(model, *leaves)
    attach(model, adapter, "mine")
    found = folded(model, "mine")
    assert found.keys() == before.keys()
    changed = {path if pair.kind == "experts" else f"{path}.weight": pair for path, pair in adapter.pairs.items()}
    assert changed
    for name, weight in found.items():
        expected = before[name]
        if name in changed:
            pair = changed[name]
            expected = expected + delta(pair.A, pair.B, scale_of(pair.alpha, pair.rank), pair.kind)
            assert not torch.equal(expected, before[name])
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in folded(model, None).items())


def test_the_folded_weights_compute_what_the_adapted_model_computes(tiny_model: Callable[..., Any]) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    pair = random_pair("linear", model.model.layers[0].mlp.up_proj.weight, dora=True)
    other = random_pair("linear", model.model.layers[1].self_attn.q_proj.weight)
    pairs = {"model.layers.0.mlp.up_proj": pair, "model.layers.1.self_attn.q_proj": other}
    extras = {"model.norm.weight": torch.rand(32)}
    rows = {"model.embed_tokens": TokenRows((5, 9), torch.randn(2, 32))}
    attach(model, Adapter(pairs, extras, rows, base="tiny"))
    plain.load_state_dict(folded(model, "default"))
    ids = torch.tensor([[5, 9, 3, 40]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_pairs_bias_is_folded_into_the_layers(tiny_model: Callable[..., Any]) -> None:
    model, plain = tiny_model("qwen2"), tiny_model("qwen2")
    path = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(path)
    attach(model, Adapter({path: random_pair("linear", layer.weight, bias=torch.randn(32))}, base="tiny"))
    plain.load_state_dict(folded(model, "default"))
    ids = torch.tensor([[5, 9, 3, 40]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "leaves"),
    [
        ("llama", "none", ("q_proj", "embed_tokens")), ("llama", "nf4", ()), ("gpt2", "none", ("c_attn", "wte")),
        ("mixtral", "none", ("gate_up_proj", "down_proj")), ("qwen2_moe", "none", ("gate_up_proj", "q_proj")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_models_weights_are_read_from_its_store(
    family: str, method: str, leaves: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    folder = save_tiny_llama(tmp_path / "model", family=family, tie_word_embeddings=tied)
    resident, streamed = loaded(folder, method=method), loaded(folder, tmp_path / "store", method=method)
    adapter = random_adapter(loaded(folder).model, *leaves, dora=method == "nf4")
    for text in (resident, streamed):
        add_adapter(text, adapter, "mine")
        text.release()
    assert streamed.streamed is not None and not streamed.streamed.stream._slots
    for name in ("mine", None):
        wanted = {path: weight[:].clone() for path, weight in folded_weights(resident.model, name)}
        found = {path: weight[:].clone() for path, weight in folded_weights(streamed.model, name, streamed.store)}
        assert wanted.keys() == found.keys() and all(torch.equal(found[path], wanted[path]) for path in wanted)


def test_requested_experts_of_a_stack_are_folded(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("mixtral")
    attach(model, random_adapter(model, "gate_up_proj"), "mine")
    path = "model.layers.0.mlp.experts.gate_up_proj"
    weight = dict(folded_weights(model, "mine"))[path]
    assert weight.shape == (4, 96, 32) and weight.dtype == torch.float32
    torch.testing.assert_close(weight[1:3], weight[:][1:3], atol=0, rtol=0)
    assert not torch.equal(weight[1:2], model.get_parameter(path.replace("experts.", "experts.original."))[1:2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_layers_are_plain_and_compute_what_the_adapted_model_computes(
    tiny_model: Callable[..., Any], family: str
) -> None:
    """Also where another layer stays adapted, and where pieces were fused."""
    model = tiny_model(family)
    adapter = random_adapter(model, *(("c_attn", "c_proj") if family == "gpt2" else ()))
    attach(model, adapter, "mine")
    activate(model, "mine")
    fuse(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        paths = list(adapter.pairs)
        expected = {path: folded(model, "mine")[f"{path}.weight"] for path in paths}
        fold_layers(model, "mine", paths)
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
    for path in paths:
        layer = model.get_submodule(path)
        assert type(layer) is torch.nn.Linear
        torch.testing.assert_close(layer.weight, expected[path].t() if family == "gpt2" else expected[path], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match=r"no layer 'model\.nowhere'"):
        fold_layers(model, "mine", ["model.nowhere"])
