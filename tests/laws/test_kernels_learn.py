"""A step of a whole model through the Triton kernels, in Triton's interpreter, gives the gradients that torch gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.data.pack import Batch
from lorakeet.kernels.triton import tiles
from lorakeet.models.inject import trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.text.loss import text_loss
from tiny.adapters import random_adapter
from tiny.triton_device import DEVICE, needs_triton

pytestmark = needs_triton

LENGTHS = 7, 4


@pytest.mark.parametrize(("fused", "launches"), [(64, {"fused_product"}), (0, set())])
def test_gradients_of_a_model_in_nf4(
    fused: int, launches: set[str], tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products are not fused, torch or bitsandbytes dequantises."""
    spec = ModelSpec(path=str(tiny_llama_folder), dtype="float32", device=str(DEVICE), fused_tokens=fused)
    adapter = random_adapter(load_text_model(spec).model)
    ids = torch.arange(sum(LENGTHS)) % 90
    batch = Batch(ids, LENGTHS, torch.arange(len(ids)), ids.roll(1), ("one", "two")).to(DEVICE)
    monkeypatch.setattr("lorakeet.models.text.load.check_kernels", lambda *given: None)  # the proof has its own tests
    found = {}
    for kernels in ("torch", "triton"):
        text = load_text_model(replace(spec, quantize=QuantSpec(method="nf4"), kernels=kernels))  # type: ignore[arg-type]
        add_adapter(text, adapter)
        launched = _launches(monkeypatch)
        loss, _ = text_loss(text, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert launched == (launches if kernels == "triton" else set())
        parameters = trained_parameters(text.model, "default")
        found[kernels] = {"loss": loss.detach(), **{name: each.grad for name, each in parameters.items()}}
    assert len(found["torch"]) > 20
    for name, expected in found["torch"].items():
        assert expected is not None and bool(expected.any())
        torch.testing.assert_close(found["triton"][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def _launches(patch: pytest.MonkeyPatch) -> set[str]:
    """The names of the launchers that are called from now on."""
    seen: set[str] = set()

    def watched(name: str, launch: Any) -> Any:
        def noted(*given: Any, **more: Any) -> Any:
            seen.add(name)
            return launch(*given, **more)

        return noted

    for module, name in ((tiles, "unpack_tiles"), (tiles, "fused_product")):
        patch.setattr(module, name, watched(name, getattr(module, name)))
    return seen
