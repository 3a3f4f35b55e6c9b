"""A model that asks for Triton kernels: it proves them on its own weights, then computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.data.pack import Batch
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kernels import proof
from lorakeet.kernels.device import standing_for
from lorakeet.kernels.nf4_maxima import decoded_bytes
from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.kernels.triton import support
from lorakeet.models.image.model import load_image_model
from lorakeet.models.kernels import (
    check_kernels,
    checked_products,
    kernel_bases,
    kernels_for,
    missing_libraries,
    shared_maxima_bytes,
    with_runnable_kernels,
)
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.from_config import model_from_config
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.quant.gptq import GptqBase, groups_in_order, quantise_to_nearest
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from tiny.adapters import random_adapter
from tiny.simulated_card import simulated_card
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton

if support.has_triton():
    from lorakeet.kernels.triton import tiles as triton_tiles


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    if support.has_triton():
        behave_like_a_card(monkeypatch)


def spec(folder: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(**{"path": str(folder), "dtype": "float32", "device": str(DEVICE), "kernels": "triton", **settings})


@needs_triton
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_a_loaded_model_computes_with_them(tiny_llama_folder: Path, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spec(tiny_llama_folder, quantize=QuantSpec(method=method))
    adapter = random_adapter(load_text_model(spec(tiny_llama_folder, kernels="torch")).model)
    fused, plain = load_text_model(asked), load_text_model(replace(asked, kernels="torch"))
    assert fused.kernels == TritonRequest(64) and plain.kernels is None
    assert all(base.kernels is None for base in kernel_bases(plain.model))
    ids = torch.arange(6)
    batch = Batch(ids, (6,), ids, ids, ("row",)).to(DEVICE)
    for text in (fused, plain):
        add_adapter(text, adapter)
    calls: list[int] = []
    launch = triton_tiles.product_and_pair
    monkeypatch.setattr(triton_tiles, "product_and_pair", lambda *given: calls.append(1) or launch(*given))
    found, expected = (text.head(text.hidden(batch)) for text in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    bases = list(kernel_bases(fused.model))
    assert calls and bases and all(base.kernels == TritonRequest(64) for base in bases)


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("product_and_pair", r"compute y \(tokens 1, rank 8\) differently"),
        ("product_and_pair_t", r"compute ∂L/∂x \(tokens 1, rank 8\) differently"),
    ],
)
def test_a_wrong_kernel_is_refused(tiny_llama_folder: Path, kernel: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., Any] = getattr(triton_tiles, kernel)

    def wrong(*given: Any) -> Any:
        found = right(*given)
        return None if found is None else (found[0] * 1.001, found[1])

    monkeypatch.setattr(triton_tiles, kernel, wrong)
    with pytest.raises(EnvironmentProblem, match=f"{said} from torch .*Set model.kernels to torch"):
        load_text_model(spec(tiny_llama_folder))


@needs_triton
def test_a_weight_that_is_one_bit_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_tiles.unpack_tiles

    def wrong(tiles: Any, out: Any, first: int = 0) -> Any:
        right(tiles, out, first).view(-1)[-1].mul_(1 + 2e-7)
        return out

    monkeypatch.setattr(triton_tiles, "unpack_tiles", wrong)
    with pytest.raises(EnvironmentProblem, match="compute the first rows of W in float32 differently"):
        check_kernels([gptq_layer()], TritonRequest(1), torch.float32)


def test_the_tokens_and_ranks_of_the_proof_follow_what_is_fused() -> None:
    every = [(1, 0), (1, 8), (17, 0), (17, 8), (33, 0), (33, 8), (33, support.RANK)]
    assert checked_products(TritonRequest()) == every
    assert checked_products(TritonRequest(4)) == [(1, 0), (1, 8), (4, 0), (4, 8), (4, support.RANK)]
    assert checked_products(TritonRequest(1)) == [(1, 0), (1, 8), (1, support.RANK)] and checked_products(TritonRequest(0)) == []


SAID_OF_PRODUCTS = {  # (tokens, rank, transposed) of the one wrong product: how it is called
    (17, 0, False): r"x·Wᵀ \(tokens 17, rank 0\)",
    (33, 0, True): r"g·W \(tokens 33, rank 0\)",
    (4, 8, False): r"y \(tokens 4, rank 8\)",
    (33, 64, True): r"∂L/∂x \(tokens 33, rank 64\)",
}


@needs_triton
@pytest.mark.parametrize("wrong", SAID_OF_PRODUCTS, ids=str)
def test_one_wrong_program_of_the_products_is_refused(wrong: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_tiles.fused_product

    def launch(tiles: Any, x: Any, pair: Any = None, *, transposed: bool = False) -> Any:
        y, shrunk = right(tiles, x, pair, transposed=transposed)
        off = (len(x), 0 if pair is None else len(pair.shrink), transposed) == wrong
        return (y * 1.01 if off else y), shrunk

    monkeypatch.setattr(triton_tiles, "fused_product", launch)
    with pytest.raises(EnvironmentProblem, match=f"compute {SAID_OF_PRODUCTS[wrong]} differently from torch"):
        check_kernels([packed_layer()], TritonRequest(4 if wrong[0] == 4 else 64), torch.float32)


def packed_layer() -> PackedLinear:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) / 8
    return PackedLinear(Nf4Base.of(weight)).to(DEVICE)


def gptq_layer() -> PackedLinear:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 8
    codes, grid = quantise_to_nearest(weight, 4, False, groups_in_order(32, 32), 1)
    return PackedLinear(GptqBase.of(codes, grid, bits=4, sym=False)).to(DEVICE)


@needs_triton
def test_weights_are_brought_back_in_fp32_too_where_products_are_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    right, layer = triton_tiles.unpack_tiles, gptq_layer()

    def launch(tiles: Any, out: Any, first: int = 0) -> Any:
        right(tiles, out, first)
        return out.mul_(1 + 2e-7) if out.dtype == torch.float32 else out

    check_kernels([layer], TritonRequest(1), torch.bfloat16)
    monkeypatch.setattr(triton_tiles, "unpack_tiles", launch)
    with pytest.raises(EnvironmentProblem, match="compute the first rows of W in float32 differently"):
        check_kernels([layer], TritonRequest(1), torch.bfloat16)


@needs_triton
def test_what_does_not_compile_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        """As Triton's own, which derive from nothing else."""

    def failing(*given: Any, **more: Any) -> Any:
        raise OutOfResources("out of resource:\nshared memory")

    monkeypatch.setattr(triton_tiles, "fused_product", failing)
    said = r"do not run on this device, for .* \(OutOfResources: out of resource: shared memory\)\. Set model\.kernels to torch"
    with pytest.raises(EnvironmentProblem, match=said):
        check_kernels([packed_layer()], TritonRequest(1), torch.float32)


def test_where_they_cannot_run_it_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    expected = "torch" if support.why_not_on(cpu) else "triton"
    monkeypatch.setattr(support, "has_triton", lambda: False)
    with pytest.raises(EnvironmentProblem, match=r"model.kernels is triton: .* is on 'cpu'. Set model.kernels to torch"):
        kernels_for(spec(Path("model"), device="cpu"), cpu)
    assert kernels_for(ModelSpec(path="model"), cpu) is None
    made_elsewhere = spec(Path("model"), device="cpu")
    assert with_runnable_kernels(made_elsewhere) == replace(made_elsewhere, kernels="torch")
    monkeypatch.undo()
    assert with_runnable_kernels(made_elsewhere).kernels == expected


def test_image_models_refuse_them() -> None:
    with pytest.raises(ConfigError, match=r"model\.kernels triton is for text models"):
        load_image_model(spec(Path("model")))


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
