"""Dense changes compressed: the best pair of a rank, with its true error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.formats.compress import CompressionTarget, fit_pair, fold_dora
from lorakeet.formats.files.base_model import open_base
from tiny.adapters import random_adapter
from tiny.dense import folded
from tiny.models import tiny_model


@pytest.mark.parametrize("shape", [(10, 7), (7, 10), (6, 4, 3, 3)])
def test_the_stated_error_is_the_true_one_and_the_least(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    change = torch.randn(shape)
    pair, error = fit_pair(change, CompressionTarget(rank=3))
    true = float((pair.delta() - change).norm() / change.norm())
    sigma = torch.linalg.svdvals(change.flatten(1))
    assert pair.rank == 3 and pair.scale == 1 and error == pytest.approx(true, rel=1e-4)
    assert error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-4)


def test_an_error_gives_the_smallest_rank_within_it() -> None:
    U, V = torch.linalg.qr(torch.randn(9, 9)).Q, torch.linalg.qr(torch.randn(9, 9)).Q
    change = U @ torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.01, *[0.0] * 5])) @ V
    ranks = {error: fit_pair(change, CompressionTarget(error=error))[0].rank for error in (0.5, 0.1, 0.01, 0.001)}
    assert ranks == {0.5: 1, 0.1: 2, 0.01: 3, 0.001: 4}
    both, error = fit_pair(change, CompressionTarget(rank=2, error=0.001))
    assert both.rank == 2 and error > 0.001
    nothing, error = fit_pair(torch.zeros(4, 4), CompressionTarget(error=0.1))
    assert nothing.rank == 1 and error == 0


def test_values_without_meaning_are_refused() -> None:
    for values, message in (({"rank": 0}, "--rank is 0"), ({"error": 1.5}, r"--error is 1\.5"), ({"error": -0.1}, "--error is")):
        with pytest.raises(ConfigError, match=message):
            CompressionTarget(**values)  # type: ignore[arg-type]
    assert not CompressionTarget().given and CompressionTarget(error=0.0).given


def saved(tmp_path: Path, family: str) -> tuple[Path, dict[str, torch.Tensor]]:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / family)
    return tmp_path / family, dict(model.state_dict())


@pytest.mark.parametrize(("family", "leaf"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_the_folded_pair_makes_the_same_weight(family: str, leaf: str, tmp_path: Path) -> None:
    folder, weights = saved(tmp_path, family)
    adapter = random_adapter(tiny_model(family), leaf, dora=True)
    said: list[str] = []
    plain = fold_dora(adapter, open_base(folder), CompressionTarget(error=1e-6), said.append)
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
    plain = fold_dora(adapter, open_base(folder), CompressionTarget(rank=8), said.append)
    path = next(iter(adapter.pairs))
    change = folded(weights[f"{path}.weight"], adapter.pairs[path]) - weights[f"{path}.weight"]
    true = float((plain.pairs[path].delta() - change).norm() / change.norm())
    stated = float(re.findall(r"relative error ([\d.e-]+)", said[0])[0])
    assert stated == pytest.approx(true, rel=0.05) and true > 0.01


def test_without_weights_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"missing for model\.layers\.0\.self_attn\.q_proj.*--base"):
        fold_dora(random_adapter(tiny_model("llama"), "q_proj", dora=True), None, CompressionTarget(rank=8), print)
