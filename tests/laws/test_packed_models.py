"""Whole models over packed layers, against the same models over the dequantised numbers: plans, adapters, fusing and folding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorakeet.core.fused.mlp_and_norm import GatedMlp
from lorakeet.core.scratch import SCRATCH
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.kernels.cpu import operators
from lorakeet.models import modules
from lorakeet.models.families import family_of
from lorakeet.models.files.quantized import packable
from lorakeet.models.fuse import fuse, unfuse
from lorakeet.models.inject import activate, adapter_of, attach, eject, inject, trained_parameters, use_products
from lorakeet.models.targets import plan_for
from lorakeet.models.text.folded_weights import folded_weights
from lorakeet.quant.gguf import BLOCK_TYPES
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedLinear
from tiny.gguf_file import write_tiny_gguf
from tiny.gptq_folder import save_mixed_gptq
from tiny.streams import loaded

FAMILIES = ("llama", "gpt2", "qwen2_moe", "gemma2", "phi3")
IDS = torch.arange(5, 22)[None] * 5 % 96


def twins(tiny_model: Callable[..., Any], family: str, make: Callable[[Tensor], Any] = Nf4Base.of) -> tuple[Any, Any]:
    """A model whose linear layers are packed, and the dense one that computes the same."""
    packed, dense = tiny_model(family), tiny_model(family)
    for path, module in packable(packed, head=False).items():
        transposed = isinstance(module, Conv1D)
        weight = module.weight.t() if transposed else module.weight
        layer = PackedLinear(make(weight), module.bias, transposed=transposed)
        modules.replace(packed, path, layer)
        dense.get_submodule(path).weight.copy_(layer.weight)
    return packed, dense


def with_adapter(model: Any, **settings: Any) -> dict[str, torch.nn.Parameter]:
    spec = LoraSpec(**{"rank": 4, "alpha": 12.0, **settings})
    inject(model, plan_for(model, spec, family_of(model.config)), seed=1)
    parameters = trained_parameters(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return parameters


def logits_and_gradients(model: Any, parameters: dict[str, torch.nn.Parameter]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=IDS, use_cache=False).logits
    grads = torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), list(parameters.values()))
    return logits.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_models_agree_fused_and_not(family: str, variant: str, tiny_model: Callable[..., Any]) -> None:
    packed, dense = twins(tiny_model, family)
    exclude = ("experts",) if family == "qwen2_moe" and variant == "dora" else ()
    found = [with_adapter(model, variant=variant, exclude_modules=exclude) for model in (packed, dense)]
    assert list(found[0]) == list(found[1])
    ours, theirs = logits_and_gradients(packed, found[0]), logits_and_gradients(dense, found[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    fuse(packed)
    if family in ("llama", "gemma2"):
        assert sum(isinstance(module, GatedMlp) for module in packed.modules()) == 2
    torch.testing.assert_close(logits_and_gradients(packed, found[0]), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_count_and_shape_packed_weights_like_dense_ones(family: str, tiny_model: Callable[..., Any]) -> None:
    packed, dense = twins(tiny_model, family)
    spec = LoraSpec(rank=4, alpha=12)
    assert plan_for(packed, spec, family_of(packed.config)) == plan_for(dense, spec, family_of(dense.config))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_goes_from_one_to_the_other_and_out_again(family: str, tiny_model: Callable[..., Any]) -> None:
    packed, dense = twins(tiny_model, family, Int8Base.of)
    before = {path: id(module) for path, module in packed.named_modules()}
    with_adapter(packed, variant="dora")
    attach(dense, adapter_of(packed))
    with torch.no_grad():
        torch.testing.assert_close(packed(IDS, use_cache=False).logits, dense(IDS, use_cache=False).logits, rtol=0, atol=1e-5)
    theirs, ours = ({path: weight[:] for path, weight in folded_weights(model, "default")} for model in (dense, packed))
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)
    activate(packed, None)
    eject(packed)
    assert {path: id(module) for path, module in packed.named_modules()} == before


def test_layers_without_a_pair_run_in_the_dtype_of_the_products(tiny_model: Callable[..., Any]) -> None:
    packed, _ = twins(tiny_model, "llama")
    with_adapter(packed, target_modules=("q_proj",))
    use_products(packed, torch.bfloat16)
    layers = [module for _, module in modules.original_modules(packed) if isinstance(module, PackedLinear)]
    assert {layer.products for layer in layers} == {torch.bfloat16}
    SCRATCH.clear()
    with operators.torch_only():
        packed(IDS, use_cache=False)
    assert {buffer.dtype for buffer in SCRATCH._buffers.values()} == {torch.bfloat16}


def test_fusing_unpacks_nothing_and_is_taken_out_again(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = twins(tiny_model, "llama")
    before = {path: id(module) for path, module in packed.named_modules()}
    with monkeypatch.context() as patch:
        patch.setattr(Nf4Base, "unpack", lambda self, out: pytest.fail("a packed weight was unpacked"))
        assert fuse(packed) == 7  # two MLPs, five norms
    unfuse(packed)
    assert {path: id(module) for path, module in packed.named_modules()} == before


def test_a_packed_module_is_never_trained_whole(tiny_model: Callable[..., Any]) -> None:
    packed, _ = twins(tiny_model, "llama")
    for name in ("up_proj", "mlp"):
        spec = LoraSpec(rank=4, alpha=12, target_modules=("q_proj",), extra_modules=(name,))
        with pytest.raises(ConfigError, match=r"has packed weights[\s\S]*model\.quantize none"):
            plan_for(packed, spec, family_of(packed.config))


def test_a_copied_model_is_its_own(tiny_model: Callable[..., Any]) -> None:
    packed, _ = twins(tiny_model, "llama")
    twin = copy.deepcopy(packed)
    twin.model.layers[0].mlp.up_proj.base.store(torch.zeros(48, 32))
    assert bool(packed.model.layers[0].mlp.up_proj.weight.any()) and not bool(twin.model.layers[0].mlp.up_proj.weight.any())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "gguf"])
def test_a_model_in_every_file_format_is_the_dense_one(
    kind: Any, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from files in which each layer is packed in another way: logits and gradients are those of the dequantised numbers."""
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    if kind == "gguf":
        write_tiny_gguf(tmp_path / "model.gguf", (*BLOCK_TYPES, "F16", "BF16"), hidden_size=256, intermediate_size=256)
        packed = loaded(tmp_path / "model.gguf", method="gguf").model
    else:
        save_mixed_gptq(tmp_path / "model", kind)
        packed = loaded(tmp_path / "model").model
    dense = copy.deepcopy(packed)
    for path, layer in list(modules.original_modules(dense)):
        if isinstance(layer, PackedLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
            plain.weight.copy_(layer.weight)
            modules.replace(dense, path, plain)
    for model in (packed, dense):
        model.set_attn_implementation("eager")
    found = [with_adapter(model, variant=variant) for model in (packed, dense)]
    torch.testing.assert_close(
        logits_and_gradients(packed, found[0]), logits_and_gradients(dense, found[1]), rtol=1e-4, atol=2e-5
    )
