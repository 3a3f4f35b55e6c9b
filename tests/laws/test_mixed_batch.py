"""Law: a batch whose rows use different adapters gives each row what it gets alone, and rows without one the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.selection import Share
from lorakeet.models.attention import register
from lorakeet.models.fuse import fuse
from lorakeet.models.inject import activate, attach, selection_of
from lorakeet.models.text.load import set_attention
from tiny.adapters import random_adapter
from tiny.models import tiny_model

ROWS = (5, 3, 4, 6)
WANTED: tuple[dict[str, float], ...] = ({"a": 1.0}, {}, {"b": 1.0}, {"a": 0.7, "c": 0.3})
RANKS = {"a": 4, "b": 2, "c": 8}
IDS = (torch.arange(sum(ROWS)) * 37 + 5) % 90


def model_with(*names: str, fused: bool = False, dora: str = "", **options: Any) -> Any:
    register()
    model = tiny_model("llama")
    set_attention(model, "varlen")
    bare = tiny_model("llama")
    for seed, name in enumerate(names):
        leaves = ("q_proj", "v_proj", "up_proj", *([] if dora else ["embed_tokens"])) if name == "b" else ()
        settings = {"rank": RANKS[name], "alpha": 3.0 * RANKS[name], "dora": name in dora, **options}
        attach(model, random_adapter(bare, *leaves, seed=seed, **settings), name)
    if fused:
        fuse(model)
    return model.eval()


def states(model: Any, ids: Tensor, rows: tuple[int, ...]) -> Tensor:
    places = torch.cat([torch.arange(length) for length in rows])
    given = {"input_ids": ids[None], "position_ids": places[None], "row_lengths": rows, "use_cache": False}
    found: Tensor = model.get_decoder()(**given).last_hidden_state[0]
    return found


def shares() -> list[Share]:
    found, start = [], 0
    for length, wanted in zip(ROWS, WANTED, strict=True):
        found += [Share(start, start + length, name, weight) for name, weight in wanted.items()]
        start += length
    return found


def alone(model: Any, row: int) -> Tensor:
    """One row by itself: bare, one adapter, or the mix as its own division of a batch of one row."""
    ids, wanted = IDS.split(ROWS)[row], WANTED[row]
    if len(wanted) > 1:
        selection_of(model).divide([Share(0, len(ids), name, weight) for name, weight in wanted.items()], units=len(ids))
    else:
        activate(model, next(iter(wanted), None))
    return states(model, ids, (len(ids),))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dora", ["", "b"], ids=["plain", "one with DoRA"])
@pytest.mark.parametrize("grad", [False, True], ids=["stacked", "share by share"])
def test_each_row_gets_what_it_gets_alone(grad: bool, dora: str, fused: bool) -> None:
    with torch.set_grad_enabled(grad):
        model = model_with("a", "b", "c", fused=fused, dora=dora)
        expected = [alone(model, row) for row in range(len(ROWS))]
        selection_of(model).divide(shares(), units=len(IDS))
        found = states(model, IDS, ROWS).split(ROWS)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1][:1]).abs().max() > 0.1, "the adapters have an effect"


def test_a_mix_is_the_weighted_sum_of_the_changes() -> None:
    model = model_with("a", "c")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    selection_of(model).divide([Share(0, 3, "a", 0.7), Share(0, 3, "c", 0.3)], units=3)
    with torch.no_grad():
        weight = layer.weight + 0.7 * layer.adapters["a"].delta() + 0.3 * layer.adapters["c"].delta()
        torch.testing.assert_close(layer(x), x @ weight.T)


def test_gradients_of_two_adapters_in_one_pass_are_those_of_two_passes() -> None:
    model = model_with("a", "b")
    parameters = {name: p for name, p in model.named_parameters() if ".adapters." in name}

    def gradients(division: list[Share] | None, rows: list[int], name: str | None = None) -> dict[str, Tensor]:
        for parameter in parameters.values():
            parameter.requires_grad_(True).grad = None
        ids = torch.cat([IDS.split(ROWS)[row] for row in rows])
        lengths = tuple(ROWS[row] for row in rows)
        if division is None:
            activate(model, name)
        else:
            selection_of(model).divide(division, units=len(ids))
        states(model, ids, lengths).square().sum().backward()
        return {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}

    both = gradients([Share(0, 5, "a"), Share(5, 9, "b")], [0, 2])
    single = {**gradients(None, [0], "a"), **gradients(None, [2], "b")}
    assert both.keys() == single.keys() == parameters.keys()
    for name, expected in single.items():
        torch.testing.assert_close(both[name], expected, rtol=1e-3, atol=1e-4)


def test_dora_rows_by_themselves() -> None:
    model = model_with("a", dora="a")
    expected = []
    for name in ("a", None):
        activate(model, name)
        expected.append(states(model, IDS[:5], (5,)))
    selection_of(model).divide([Share(0, 5, "a")], units=10)
    found = states(model, IDS[:5].repeat(2), (5, 5)).split([5, 5])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    selection_of(model).divide([Share(0, 5, "a", 0.5)], units=10)
    with pytest.raises(ValueError, match="no weighted mix"):
        states(model, IDS[:10], (5, 5))


def test_switching_touches_one_object_whatever_is_loaded() -> None:
    model = model_with("a", "b", "c")
    layers = {id(module.selection) for module in model.modules() if hasattr(module, "selection")}
    assert len(layers) == 1
    selection = selection_of(model)
    activate(model, "a")
    first = states(model, IDS[:5], (5,))
    selection.use("b")
    assert not torch.equal(states(model, IDS[:5], (5,)), first)
    selection.use("a")
    assert torch.equal(states(model, IDS[:5], (5,)), first)
