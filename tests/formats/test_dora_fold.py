"""DoRA folded into plain pairs: the same weights, within the stated error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.formats.diffusion.dense import Compression
from lorakeet.formats.dora_fold import fold_dora
from lorakeet.formats.files.base_model import open_base
from tiny.adapters import random_adapter
from tiny.dense import folded
from tiny.models import tiny_model


def saved(tmp_path: Path, family: str) -> tuple[Path, dict[str, torch.Tensor]]:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / family)
    return tmp_path / family, dict(model.state_dict())


@pytest.mark.parametrize(("family", "leaf"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_the_folded_pair_makes_the_same_weight(family: str, leaf: str, tmp_path: Path) -> None:
    folder, weights = saved(tmp_path, family)
    adapter = random_adapter(tiny_model(family), leaf, dora=True)
    said: list[str] = []
    plain = fold_dora(adapter, open_base(folder), Compression(error=1e-6), said.append)
    for path, pair in adapter.pairs.items():
        weight = weights[f"{path}.weight"]
        ours = plain.pairs[path]
        assert ours.magnitude is None and ours.kind == pair.kind
        torch.testing.assert_close(weight + ours.delta(), folded(weight, pair).float(), atol=1e-5, rtol=1e-4)
    assert len(said) == len(adapter.pairs)


def test_the_stated_error_is_that_of_the_change(tmp_path: Path) -> None:
    folder, weights = saved(tmp_path, "llama")
    adapter = random_adapter(tiny_model("llama"), "q_proj", dora=True)
    said: list[str] = []
    plain = fold_dora(adapter, open_base(folder), Compression(rank=8), said.append)
    path = next(iter(adapter.pairs))
    change = folded(weights[f"{path}.weight"], adapter.pairs[path]) - weights[f"{path}.weight"]
    true = float((plain.pairs[path].delta() - change).norm() / change.norm())
    stated = float(re.findall(r"relative error ([\d.e-]+)", said[0])[0])
    assert stated == pytest.approx(true, rel=0.05) and true > 0.01


def test_without_weights_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"missing for model\.layers\.0\.self_attn\.q_proj.*--base"):
        fold_dora(random_adapter(tiny_model("llama"), "q_proj", dora=True), None, Compression(rank=8), print)
