"""Experts that are packed at loading train, are planned, streamed and merged as a dense model of the same numbers is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.core.adapter import Adapter
from lorakeet.data.pack import pack_examples
from lorakeet.formats.peft import peft
from lorakeet.merging.dequantise import rounding_steps
from lorakeet.merging.merged_folder import merge_into
from lorakeet.models.files.packing import packing_of
from lorakeet.models.files.quantized import kept_experts, skeleton
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.inject import activate, adapter_of, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack
from lorakeet.train.text.loss import head_losses
from lorakeet.verbs.merge import merge
from lorakeet.verbs.options import MergeOptions
from tiny.family_columns import in_transformers, loaded, rows, saved, with_pairs
from tiny.float_folders import mxfp4_folder, written
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, run, write_rows

KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_5_moe_text", "granitemoehybrid", "longcat_flash")
CLOSE = 1e-5
NF4 = QuantSpec("nf4")


def stacks_of(text: TextModel) -> dict[str, PackedStack]:
    return {path: module for path, module in text.model.named_modules() if isinstance(module, PackedStack)}


def computed(text: TextModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients on packed rows."""
    batch, trained = pack_examples(rows()), trained_parameters(text.model)
    losses = head_losses(text, text.hidden(batch), batch.target_ids)
    found = torch.autograd.grad(losses.sum(), list(trained.values()))
    with torch.no_grad():
        logits = text.head(text.hidden(batch))
    return logits, dict(zip(trained, found, strict=True))


def assert_same(found: Tensor, wanted: Tensor, name: str) -> None:
    assert float((found - wanted).norm()) <= CLOSE * max(float(wanted.norm()), 1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), [*((kind, "nf4") for kind in KINDS), ("mixtral", "int8")])
def test_they_train_and_merge_as_a_dense_model_of_their_numbers(kind: str, method: Any, tmp_path: Path) -> None:
    spec = QuantSpec(method)
    source = saved(kind, tmp_path)
    packed = with_pairs(loaded(tmp_path, quantize=spec), tmp_path)
    assert stacks_of(packed) and kept_experts(packed.model) == ""
    before: Any = rounding_steps(source, spec)
    (tmp_path / "other").mkdir()
    merge_into(source, Adapter({}), tmp_path / "other" / "model", tokenizer=source, before=before)
    dense = with_pairs(loaded(tmp_path / "other"), tmp_path)
    (logits, gradients), (wanted, own) = computed(packed), computed(dense)
    assert gradients.keys() == own.keys() and any(".experts." in name for name in own)
    assert_same(logits, wanted, "logits")
    for name, gradient in own.items():
        assert_same(gradients[name], gradient, name)

    adapter = adapter_of(packed.model, base=str(source))
    peft.write(adapter, tmp_path / "adapter")
    merge_into(source, peft.read(tmp_path / "adapter"), tmp_path / "merged", tokenizer=source, before=before)
    with torch.no_grad():
        model = in_transformers(tmp_path / "merged")
        merged = torch.cat([model(input_ids=torch.from_numpy(row.ids)[None], use_cache=False).logits[0, :-1] for row in rows()])
    assert_same(logits, merged, "merged")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_they_are_planned_as_they_are_loaded_and_streamed(kind: str, tmp_path: Path) -> None:
    source = saved(kind, tmp_path)
    text = loaded(tmp_path, quantize=NF4)
    packed = {path: module.base.settings for path, module in text.model.named_modules() if isinstance(module, PackedLinear)}
    packed |= {path: stack.settings for path, stack in stacks_of(text).items()}
    config = read_config(source)
    planned = packing_of(skeleton(config), config, NF4)
    assert {path: {**own, "shape": list(own["shape"])} for path, own in planned.items()} == packed
    spec = ModelSpec(path=str(source), dtype="float32", device="cpu", quantize=NF4)
    streamed = load_text_model(spec, say=lambda line: None, store=tmp_path / "store")
    batch = pack_examples(rows())
    with torch.no_grad():
        assert torch.equal(text.hidden(batch), streamed.hidden(batch))


def test_they_are_packed_from_their_stored_numbers(tmp_path: Path) -> None:
    """A model in bf16 has the codes of one in fp32: what its files have is not rounded first."""
    saved("qwen3_moe", tmp_path)
    wide, narrow = (stacks_of(loaded(tmp_path, dtype, quantize=NF4)) for dtype in ("float32", "bfloat16"))
    assert wide.keys() == narrow.keys() and wide
    assert all(torch.equal(narrow[path].packed, stack.packed) for path, stack in wide.items())
    assert all(stack.dtype == torch.bfloat16 for stack in narrow.values())


def test_code_that_multiplies_by_a_whole_stack_keeps_it(tmp_path: Path) -> None:
    """Llama 4's, with a word on it."""
    saved("llama4_text", tmp_path)
    said: list[str] = []
    spec = ModelSpec(path=str(tmp_path / "model"), dtype="float32", device="cpu", attention="sdpa", quantize=NF4)
    text = load_text_model(spec, say=said.append)
    assert not stacks_of(text) and any(line.startswith("Experts of this model stay as they are") for line in said)


def passed(folder: Path) -> bool:
    return bool(json.loads((folder / "certificate.json").read_text())["passed"])


@pytest.mark.slow
def test_a_run_on_experts_in_nf4_is_certified_and_merged(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "base", family="mixtral")
    data = write_rows(tmp_path / "rows.jsonl", reviews(40))
    run(source, data, tmp_path / "run", {"model.quantize": "nf4", "train.steps": "2"})
    assert passed(tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(".experts." in name for name in tensors) == 8 and all(bool(tensor.any()) for tensor in tensors.values())
    merged = merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "merged", into="dequantised"), console=quiet())
    assert merged.certificate.passed


@pytest.mark.slow
def test_a_run_on_a_published_mxfp4_folder_is_certified_and_merged(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "dense", family="gpt_oss", hidden_size=64, intermediate_size=64, head_dim=16)
    folder = mxfp4_folder(source, tmp_path / "mxfp4")
    data = write_rows(tmp_path / "rows.jsonl", reviews(40))
    run(folder, data, tmp_path / "run", {"train.steps": "2"})
    assert passed(tmp_path / "run")
    merged = merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "merged", into="dequantised"), console=quiet())
    assert merged.certificate.passed
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("files", ["named", "unseen"])
def test_published_mxfp4_is_planned_and_streamed_as_it_is_loaded(files: str, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "dense", family="gpt_oss", hidden_size=64, intermediate_size=64, head_dim=16)
    folder = mxfp4_folder(source, tmp_path / "mxfp4")
    spec = ModelSpec(path=str(folder), dtype="float32", device="cpu")
    text = load_text_model(spec, say=lambda line: None)
    config = read_config(folder)
    planned = packing_of(skeleton(config), config, QuantSpec(), folder if files == "named" else None)
    found = {path: stack.settings for path, stack in stacks_of(text).items()}
    assert {path: {**own, "shape": list(own["shape"])} for path, own in planned.items()} == found and len(found) == 4
    streamed = load_text_model(spec, say=lambda line: None, store=tmp_path / "store")
    batch = pack_examples(rows())
    with torch.no_grad():
        assert torch.equal(text.hidden(batch), streamed.hidden(batch))


@pytest.mark.parametrize("number", [torch.float8_e4m3fn, torch.int8])
def test_stacks_in_a_byte_a_number_stay_packed(number: torch.dtype, tmp_path: Path) -> None:
    """A published folder with whole stacks of experts in FP8 or int8, a scale a row: the numbers are those of the dense model."""
    source = saved("gemma4_text (experts)", tmp_path)
    tensors, dense = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() != 3 or ".experts." not in name:
            tensors[name] = dense[name] = weight
            continue
        scale = weight.abs().amax(-1, keepdim=True) / (127 if number == torch.int8 else 448)
        codes = (weight / scale).round() if number == torch.int8 else weight / scale
        tensors |= {name: codes.to(number), f"{name}_scale": scale}
        dense[name] = tensors[name].float() * scale
    assert len(tensors) > len(dense)
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized" if number != torch.int8 else "int-quantized"}
    weights = {"num_bits": 8, "type": "int" if number == torch.int8 else "float", "strategy": "channel"}
    folder = written(source, tmp_path / "packed", tensors, {**settings, "config_groups": {"group_0": {"weights": weights}}})
    (tmp_path / "other").mkdir()
    shutil.copytree(source, tmp_path / "other" / "model")
    save_file(dense, tmp_path / "other" / "model" / "model.safetensors", metadata={"format": "pt"})
    text = load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=lambda line: None)
    assert len(stacks_of(text)) == len(tensors) - len(dense)
    config = read_config(folder)
    planned = packing_of(skeleton(config), config, QuantSpec(), folder)
    assert {path: list(own["shape"]) for path, own in planned.items()} == {
        path: list(stack.shape) for path, stack in stacks_of(text).items()
    }
    batch = pack_examples(rows())
    with torch.no_grad():
        assert_same(text.hidden(batch), loaded(tmp_path / "other").hidden(batch), "hidden")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_packed_experts_are_served(kind: str, tmp_path: Path) -> None:
    """The logits after a text are those of the live model, with the adapter and without."""
    saved(kind, tmp_path)
    live = with_pairs(loaded(tmp_path, quantize=NF4), tmp_path)
    text = loaded(tmp_path, quantize=NF4)
    served = ServingModel(text)
    served.attach("a", adapter_of(live.model))
    row = rows()[1]
    ids, batch = tuple(int(number) for number in row.ids), pack_examples([row])
    for name, mix in (("default", {"a": 1.0}), (None, {})):
        activate(live.model, name)
        with torch.no_grad():
            wanted = live.head(live.hidden(batch))[-1]
        cache = KeyValues(slots=1, capacity=len(ids))
        found = step(text, cache, [CacheRow(0, 0, ids[:-1], mix)], served.selection)
        assert_same(found[0], wanted, str(name))
