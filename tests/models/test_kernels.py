"""What of other libraries is missing is reported, and NF4 weights of a block decode their maxima together on a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.kernels import proof
from lorakeet.kernels.device import standing_for
from lorakeet.kernels.nf4_maxima import decoded_bytes
from lorakeet.models.kernels import missing_libraries, shared_maxima_bytes
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import model_from_config
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from tiny.simulated_card import simulated_card


def shared_by_block(model: Any) -> dict[str, set[int]]:
    """The parts that decode block maxima, by decoder block; 0 for a weight that decodes its own."""
    found: dict[str, set[int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear) and isinstance(module.base, Nf4Base):
            shared = module.base.shared
            found.setdefault(path.split(".")[2], set()).add(0 if shared is None else id(shared[0]))
    return found


def test_on_a_card_the_nf4_weights_of_a_block_decode_their_maxima_together(tiny_llama_folder: Path) -> None:
    spec = ModelSpec(path=str(tiny_llama_folder), dtype="bfloat16", device="cpu", quantize=QuantSpec(method="nf4"))
    assert set.union(*shared_by_block(load_text_model(spec).model).values()) == {0}, "the CPU needs no launches"
    with simulated_card():
        text = load_text_model(replace(spec, device="cuda"))
        parts = shared_by_block(text.model)
        assert all(len(block) == 1 for block in parts.values()) and len(set.union(*parts.values())) == len(parts) > 1
        assert 0 not in set.union(*parts.values())
        first = [module.base for module in text.model.model.layers[0].modules() if isinstance(module, PackedLinear)]
        assert len({id(base.shared[0]) for base in first}) == 1 and len(first) == 7
        assert shared_maxima_bytes(text.model, text.family) == decoded_bytes([base.absmax.numel() for base in first])


def test_a_plan_for_a_card_holds_the_maxima_of_a_block(tiny_llama_folder: Path) -> None:
    config = read_config(tiny_llama_folder)
    made = {"dtype": torch.bfloat16, "products": torch.bfloat16, "quantize": QuantSpec(method="nf4")}
    on_cpu = model_from_config(config, name="a", **made)
    with standing_for(torch.device("cuda", 0)):
        on_card = model_from_config(config, name="a", **made)
    size = shared_maxima_bytes(on_cpu.model, on_cpu.family)
    assert size > 0 and "shared_maxima" not in dict(on_cpu.model.named_buffers())
    assert on_card.model.shared_maxima.nbytes == size and "shared_maxima" not in on_card.model.state_dict()


@pytest.mark.parametrize(("version", "words"), [("", "is not installed"), ("0.1", "is 0.1; expected")])
def test_a_library_that_is_missing_or_of_another_version_is_said_on_a_gpu(
    version: str, words: str, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each, with the command; never a silent slow path."""

    known = metadata.version

    def installed(name: str) -> str:
        if name not in ("liger-kernel", "bitsandbytes"):
            return known(name)
        if not version:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(proof.metadata, "version", installed)
    proof.missing_package.cache_clear()
    nf4, cuda = QuantSpec(method="nf4"), torch.device("cuda", 0)
    try:
        norms, weights = missing_libraries(cuda, nf4)
        assert norms.startswith(f"liger-kernel {words}") and "Install it with: pip install 'liger-kernel<0.9,>=0.8.5'." in norms
        assert weights.startswith(f"bitsandbytes {words}") and weights.endswith("by torch's operations, which is slower.")
        assert [*missing_libraries(cuda, QuantSpec())] == [norms] and not [*missing_libraries(torch.device("cpu"), nf4)]
        said: list[str] = []
        with simulated_card():
            load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="bfloat16", device="cuda"), say=said.append)
        assert said.count(norms) == 1
    finally:
        proof.missing_package.cache_clear()


def test_nothing_is_missing_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("lorakeet.models.kernels.why_no_launcher", lambda: "")
    pytest.importorskip("liger_kernel")
    assert not [*missing_libraries(torch.device("cuda", 0), QuantSpec(method="nf4"))]
