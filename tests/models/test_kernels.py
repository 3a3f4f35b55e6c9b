"""A model that asks for Triton kernels: it proves them on its own weights, then computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core import kernels as dispatch
from lorakeet.core.in_tiles import Kernels
from lorakeet.data.pack import Batch
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models import kernels
from lorakeet.models.adapt import put_adapter
from lorakeet.models.image import load_image_model
from lorakeet.models.kernels import bases_of, kernels_for, where_possible
from lorakeet.models.load import load_text_model
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from tiny.adapters import random_adapter
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.has_triton():
        behave_like_a_card(monkeypatch)


def spec(folder: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(**{"path": str(folder), "dtype": "float32", "device": str(DEVICE), "kernels": "triton", **settings})


@needs_triton
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_a_loaded_model_computes_with_them(tiny_llama_folder: Path, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spec(tiny_llama_folder, quantize=QuantSpec(method=method))
    adapter = random_adapter(load_text_model(spec(tiny_llama_folder, kernels="torch")).model)
    fused, plain = load_text_model(asked), load_text_model(replace(asked, kernels="torch"))
    assert fused.kernels == Kernels(64) and plain.kernels is None
    assert all(base.kernels is None for base in bases_of(plain.model))
    ids = torch.arange(6)
    batch = Batch(ids, (6,), ids, ids, ("row",)).to(DEVICE)
    for text in (fused, plain):
        put_adapter(text, adapter)
    calls: list[int] = []
    launch = dispatch.low_rank_product
    monkeypatch.setattr("lorakeet.core.lowrank.low_rank_product", lambda *given: calls.append(1) or launch(*given))
    found, expected = (text.head(text.hidden(batch)) for text in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert calls and list(bases_of(fused.model)) and all(base.kernels == Kernels(64) for base in bases_of(fused.model))


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "said"),
    [("low_rank_product", "compute y otherwise"), ("low_rank_product_t", "compute ∂L/∂x otherwise")],
)
def test_a_wrong_kernel_is_refused(
    tiny_llama_folder: Path, kernel: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[..., Any] = getattr(dispatch, kernel)

    def wrong(*given: Any) -> Any:
        found = right(*given)
        return None if found is None else (found[0] * 1.001, found[1])

    monkeypatch.setattr(kernels, kernel, wrong)
    with pytest.raises(EnvironmentProblem, match=f"{said} than torch .*Set model.kernels to torch"):
        load_text_model(spec(tiny_llama_folder))


@needs_triton
def test_a_weight_that_is_one_bit_off_is_refused(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dispatch.unpack

    def wrong(tiles: Any, out: Any, first: int = 0) -> Any:
        right(tiles, out, first).view(-1)[-1].mul_(1 + 2e-7)
        return out

    monkeypatch.setattr(dispatch, "unpack", wrong)
    with pytest.raises(EnvironmentProblem, match="compute the first rows of W otherwise"):
        load_text_model(spec(tiny_llama_folder, quantize=QuantSpec(method="nf4")))


def test_where_they_cannot_run_it_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    with pytest.raises(EnvironmentProblem, match=r"model.kernels is triton: .* is on 'cpu'. Set model.kernels to torch"):
        kernels_for(spec(Path("model"), device="cpu"), torch.device("cpu"))
    assert kernels_for(ModelSpec(path="model"), torch.device("cpu")) is None
    made_elsewhere = spec(Path("model"), device="cpu")
    assert where_possible(made_elsewhere) == replace(made_elsewhere, kernels="torch")
    monkeypatch.setattr(dispatch, "_interpreted", dispatch.has_triton)
    assert where_possible(made_elsewhere).kernels == ("triton" if dispatch.has_triton() else "torch")


def test_image_models_refuse_them() -> None:
    with pytest.raises(ConfigError, match=r"model\.kernels triton is for text models"):
        load_image_model(spec(Path("model")))
