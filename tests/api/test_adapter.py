"""An adapter as a value: read from any format, looked into, written, combined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorakeet as lk
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError


def value(seed: int = 0) -> Adapter:
    torch.manual_seed(seed)
    paths = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    return lk.Adapter({path: Pair(torch.randn(2, 6), torch.randn(5, 2), 4.0) for path in paths}, base="owner/base")


def test_it_is_a_mapping_of_pairs() -> None:
    adapter = value()
    path = "model.layers.0.self_attn.q_proj"
    assert list(adapter) == list(adapter.pairs) and len(adapter) == 2 and path in adapter
    pair = adapter[path]
    torch.testing.assert_close(pair.delta(), 2.0 * pair.B @ pair.A)
    assert str(adapter) == "Adapter of 2 pairs, rank 2, 44 parameters, for owner/base"
    with pytest.raises(KeyError, match=r"no pair at 'model.layers.0.self_attn.q_pro'. Did you mean"):
        adapter["model.layers.0.self_attn.q_pro"]


@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_written_and_read_again(tmp_path: Path, format: str) -> None:
    adapter, path = value(), tmp_path / "mine"
    assert adapter.write(path, format=format) == path
    again = lk.Adapter.read(path, quiet=True)
    assert all(torch.allclose(again[name].delta(), adapter[name].delta(), atol=1e-6) for name in adapter)
    assert [found.name for found in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="mine"):
        adapter.write(path, format=format)


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"to in Adapter.write is 'kohja'.*Did you mean 'kohya'"):
        value().write(tmp_path / "mine", format="kohja")


def test_combined_is_the_weighted_sum() -> None:
    one, two = value(0), value(1)
    both = lk.combine({"one": one, "two": two}, weights=(0.7, 0.3))
    for path in one:
        torch.testing.assert_close(both[path].delta(), 0.7 * one[path].delta() + 0.3 * two[path].delta(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="weights"):
        lk.combine({"one": one, "two": two}, weights=(1.0,))
    with pytest.raises(ConfigError, match="nothing to combine"):
        lk.combine({})
