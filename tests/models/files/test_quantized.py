"""Packed linear layers: in every family the function of the dequantised weights, one dense matrix at a time while loading."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models import modules
from lorakeet.models.files import quantized
from lorakeet.models.files.quantized import load_packed, load_quantised, packing_divided, quantised_model
from lorakeet.models.files.stored_tensors import dense_model, tensor_files
from lorakeet.quant.construct import quantise_weight
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack
from lorakeet.train.launch import launched
from lorakeet.train.processes import joined
from tiny.models import FAMILIES
from tiny.together import Together

IDS = torch.tensor([[5, 9, 31, 2, 77, 4], [8, 8, 60, 3, 1, 90]])


def saved(model: Any, folder: Path) -> tuple[Path, Any]:
    model.save_pretrained(folder)
    return folder, AutoConfig.from_pretrained(folder)


def loaded(folder: Path, config: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return load_quantised(folder, config, dtype, QuantSpec(**settings), lambda line: None)


def packed_layers(model: Any) -> dict[str, PackedLinear]:
    return {path: module for path, module in modules.original_modules(model) if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_that_of_the_dequantised_weights(
    family: str, method: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    dense = tiny_model(family)
    dense.set_attn_implementation("eager")
    model = loaded(*saved(dense, tmp_path), method=method)
    layers = packed_layers(model)
    assert len(layers) >= 8
    before = dense(IDS, use_cache=False).logits
    for path, layer in layers.items():
        dense.get_submodule(path).weight.copy_(layer.weight)
    for path, stack in model.named_modules():
        if isinstance(stack, PackedStack):
            dense.get_parameter(path).copy_(stack.dense())
    with torch.no_grad():
        ours, theirs = model(IDS, use_cache=False).logits, dense(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def packed_in_parts(folder: str, method: str) -> dict[str, Any]:
    """What this process has packed itself, by shape, and the bytes of all packed layers that it has then."""
    own: list[list[int]] = []

    def packing(weight: Tensor, spec: QuantSpec) -> PackedBase:
        own.append(list(weight.shape))
        return quantise_weight(weight, spec)

    quantized.quantise_weight = packing  # in a process of its own
    config = AutoConfig.from_pretrained(folder)
    with joined(launched()) as processes, packing_divided(processes.rank, processes.count, processes.broadcast):
        model = loaded(Path(folder), config, method=method)
        processes.disband()
    return {"own": own, "bytes": digests(model)}


def digests(model: Any) -> dict[str, str]:
    return {
        f"{path}.{name}": hashlib.sha256(buffer.numpy().tobytes()).hexdigest()
        for path, layer in packed_layers(model).items()
        for name, buffer in layer.base.named_buffers()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [("llama", "nf4"), ("gpt2", "int8")])
def test_several_processes_pack_each_weight_once(
    family: str, method: str, tiny_model: Callable[..., Any], tmp_path: Path, forked: Together
) -> None:
    folder, config = saved(tiny_model(family), tmp_path)
    alone = loaded(folder, config, method=method)
    for count in (2, 3):
        each = forked.call("models.files.test_quantized:packed_in_parts", str(folder), method, count=count)
        assert all(one["bytes"] == digests(alone) for one in each), "the bytes that one process makes"
        shares = [sum(rows * columns for rows, columns in one["own"]) for one in each]
        layers = packed_layers(alone).values()
        assert sum(len(one["own"]) for one in each) == len(layers), "each by one process"
        assert sum(shares) == sum(layer.in_features * layer.out_features for layer in layers)
        assert max(shares) <= 1.5 * min(shares), "about as much each"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral"])
def test_head_routers_and_embeddings_are_kept(family: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = loaded(*saved(tiny_model(family), tmp_path), method="nf4")
    assert not {"lm_head", "gate", "wte"} & {path.rpartition(".")[2] for path in packed_layers(model)}
    assert modules.output_layer(model).weight.dtype == torch.float32  # type: ignore[union-attr]
    kinds = {modules.kind_of(layer) for layer in packed_layers(model).values()}
    assert kinds == {"conv1d" if family == "gpt2" else "linear"}


def test_the_head_is_quantised_on_request_and_refused_where_it_is_the_embedding(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = loaded(*saved(tiny_model("llama"), tmp_path / "own"), method="int8", head="quantize")
    assert isinstance(model.lm_head, PackedLinear)
    with pytest.raises(ConfigError, match=r"model\.quantize\.head is quantize, but 'lm_head'"):
        loaded(*saved(tiny_model("qwen2"), tmp_path / "tied"), method="int8", head="quantize")


def test_one_dense_matrix_at_a_time(tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packed weight's dense tensor is gone before the next one is read."""
    import weakref

    folder, config = saved(tiny_model("llama"), tmp_path)
    live: list[tuple[str, weakref.ref[Tensor]]] = []
    worst: list[list[str]] = []
    read = SafeFile.read

    def watched(self: SafeFile, name: str) -> Tensor:
        worst.append([held for held, tensor in live if tensor() is not None and "proj" in held])
        tensor = read(self, name)
        live.append((name, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(SafeFile, "read", watched)
    loaded(folder, config, method="nf4")
    assert len(worst) == len(tensor_files(folder)) and max(map(len, worst)) == 0


def test_a_stock_that_does_not_fit_is_answered_with_every_tensor(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    folder, config = saved(tiny_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name] = tensors[name][:5].clone()
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match="has 2 weights of other shapes") as caught:
        loaded(folder, config, method="nf4")
    for part in ("layers.0.mlp.up_proj.weight is 5×32, expected 48×32", "layers.1.mlp.up_proj"):
        assert part in str(caught.value)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name] = torch.zeros(48, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"lacks 1 weights of its 'llama' architecture: model\.norm\.weight"):
        loaded(folder, config, method="nf4")


def test_packed_weights_without_a_place_are_named(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    folder, config = saved(tiny_model("llama"), tmp_path)
    stored_model = quantised_model(dense_model(tensor_files(folder)), config, QuantSpec(method="int8"))
    make = next(iter(stored_model.packed.values()))
    stored_model.packed["model.layers.7.mlp.up_proj.weight"] = make  # type: ignore[index]
    with pytest.raises(DataError, match=r"1 packed weights .* model\.layers\.7\.mlp\.up_proj\.weight"):
        load_packed(stored_model, config, torch.float32, folder)


@pytest.mark.parametrize("method", ["awq", "bitsandbite"])
def test_an_unknown_way_of_packing_is_refused(method: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    folder, config = saved(tiny_model("llama"), tmp_path)
    config.quantization_config = {"quant_method": method}
    with pytest.raises(ConfigError, match=f"quantised by '{method}'; readable are bitsandbytes"):
        loaded(folder, config)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ConfigError, match="quantised already"):
        loaded(folder, config, method="nf4")
    with pytest.raises(ConfigError, match=r"LLM\.int8"):
        loaded(folder, config)
