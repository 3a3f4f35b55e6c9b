"""The second adapter of a recipe is what it would be as the first, for less work; what is wrong with it is still found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter, FlatPairs, TokenRows
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.files import loaded_file
from lorakeet.formats.files.loaded_file import load_safetensors, open_header
from lorakeet.formats.peft import peft, peft_config, shared_layout
from lorakeet.formats.peft.peft_config import CONFIG_NAME
from tiny.adapters import random_adapter, random_pair
from tiny.models import tiny_model

CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "linear": ("llama", (), {}),
    "dora": ("llama", (), {"dora": True}),
    "rslora": ("llama", ("q_proj",), {"scale_rule": "alpha/sqrt(rank)"}),
    "conv1d": ("gpt2", (), {}),
    "embedding": ("llama", ("embed_tokens", "q_proj"), {}),
}


@pytest.fixture(autouse=True)
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was worked out since nothing is remembered: headers, configurations, and adapters tensor by tensor."""
    found: list[str] = []
    for place, name in ((loaded_file, "check_header"), (peft_config, "parse_config"), (peft, "_read")):
        real = getattr(place, name)

        def counted(*given: Any, real: Any = real, name: str = name) -> Any:
            found.append(name)
            return real(*given)

        monkeypatch.setattr(place, name, counted)
    for known in (loaded_file._HEADERS, loaded_file._NAMED, peft_config._KNOWN, shared_layout.LAYOUTS):
        known.clear()
    return found


def saved(folder: Path, seed: int, case: str = "linear") -> Path:
    family, leaves, options = CASES[case]
    peft.write(random_adapter(tiny_model(family), *leaves, seed=seed, **options), folder)
    return folder


def assert_same(one: Adapter, other: Adapter) -> None:
    assert list(one.pairs) == list(other.pairs) and one.parameters == other.parameters
    for path, pair in one.pairs.items():
        twin = other.pairs[path]
        assert (pair.alpha, pair.kind, pair.scale_rule) == (twin.alpha, twin.kind, twin.scale_rule)
        for a, b in ((pair.A, twin.A), (pair.B, twin.B), (pair.magnitude, twin.magnitude), (pair.bias, twin.bias)):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype is torch.float32 and a.is_contiguous() and torch.equal(a, b))
    assert (one.base, one.metadata, one.extras) == (other.base, other.metadata, other.extras)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_second_is_what_it_would_be_as_the_first(case: str, mapped: bool, tmp_path: Path, looked: list[str]) -> None:
    folders = [saved(tmp_path / str(seed), seed, case) for seed in range(3)]
    adapters = [peft.read(folder, opened=lambda path: load_safetensors(path, mapped=mapped)) for folder in folders]
    assert looked == ["parse_config", "check_header", "_read"]
    outlines = {id(adapter.pairs.outline) for adapter in adapters if isinstance(adapter.pairs, FlatPairs)}
    assert len(outlines) == 1
    for folder, adapter in zip(folders, adapters, strict=True):
        assert_same(adapter, peft.read(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype, tmp_path: Path, looked: list[str]) -> None:
    for seed in range(2):
        tensors = load_file(saved(tmp_path / str(seed), seed) / peft.MODEL_NAME)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / str(seed) / peft.MODEL_NAME)
        adapter = peft.read(tmp_path / str(seed), opened=load_safetensors)
        assert isinstance(adapter.pairs, FlatPairs)
        assert_same(adapter, peft.read(tmp_path / str(seed)))
    assert looked.count("_read") == 3, "once, and twice for comparison"


def test_biases_are_filled_in(tmp_path: Path, looked: list[str]) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        pairs = {f"a.{n}": random_pair("linear", torch.ones(7, 5), bias=torch.randn(7)) for n in range(2)}
        peft.write(Adapter(pairs), tmp_path / str(seed))
        assert_same(peft.read(tmp_path / str(seed), opened=load_safetensors), peft.read(tmp_path / str(seed)))
    assert looked.count("_read") == 3


def test_an_outline_tells_of_its_numbers_what_they_will_be(tmp_path: Path, looked: list[str]) -> None:
    outline = peft.read(saved(tmp_path / "a", 1), opened=open_header)
    adapter = peft.read(saved(tmp_path / "b", 2), opened=load_safetensors)
    assert looked.count("_read") == 1
    assert isinstance(outline.pairs, FlatPairs) and isinstance(adapter.pairs, FlatPairs)
    assert outline.pairs.outline is adapter.pairs.outline and outline.parameters == adapter.parameters
    assert all(pair.A.is_meta and pair.A.shape == adapter.pairs[path].A.shape for path, pair in outline.pairs.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_in_a_known_recipe_is_named(value: float, tmp_path: Path) -> None:
    good, bad = saved(tmp_path / "good", 1), saved(tmp_path / "bad", 2)
    peft.read(good, opened=load_safetensors)
    tensors = load_file(bad / peft.MODEL_NAME)
    name = sorted(tensors)[5]
    tensors[name][0, 1] = value
    save_file(tensors, bad / peft.MODEL_NAME, metadata={"format": "pt"})
    for mapped in (False, True):
        with pytest.raises(DataError, match="NaN or infinite") as error:
            peft.read(bad, opened=lambda path, mapped=mapped: load_safetensors(path, mapped=mapped))  # type: ignore[misc]
        assert name in str(error.value) and str(bad) in str(error.value) and str(error.value).count("NaN") == 1
    assert_same(peft.read(good, opened=load_safetensors), peft.read(good))


def test_another_shape_name_or_length_in_a_known_recipe_is_refused(tmp_path: Path, looked: list[str]) -> None:
    peft.read(saved(tmp_path / "good", 1), opened=load_safetensors)
    file = saved(tmp_path / "bad", 2) / peft.MODEL_NAME
    whole, tensors = file.read_bytes(), load_file(file)
    name = sorted(tensors)[4]
    save_file({**tensors, name: tensors[name].t().contiguous()}, file)
    with pytest.raises(DataError, match="rank"):
        peft.read(tmp_path / "bad", opened=load_safetensors)
    save_file({(f"{key}x" if key == name else key): tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(DataError, match=r"has .* but no"):
        peft.read(tmp_path / "bad", opened=load_safetensors)
    file.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="it was cut off"):
        peft.read(tmp_path / "bad", opened=load_safetensors)
    file.write_bytes(whole)
    peft.read(tmp_path / "bad", opened=load_safetensors)
    assert looked.count("check_header") == 4 and looked.count("_read") == 3, "the last is of the known recipe again"


def test_another_byte_of_the_configuration_counts(tmp_path: Path, looked: list[str]) -> None:
    first = peft.read(saved(tmp_path / "a", 1), opened=load_safetensors)
    config = saved(tmp_path / "b", 1) / CONFIG_NAME
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 12', '"lora_alpha": 13'))
    second = peft.read(tmp_path / "b", opened=load_safetensors)
    assert {pair.alpha for pair in first.pairs.values()} == {12.0} and {pair.alpha for pair in second.pairs.values()} == {13.0}
    assert looked == ["parse_config", "check_header", "_read", "parse_config", "_read"]
    for wrong, said in (('"lora_alpha": null', "lora_alpha is None"), ('"lora_alpha": 12, "strange": 3', "the key strange")):
        config.write_text(text.replace('"lora_alpha": 12', wrong))
        for _ in range(2):
            with pytest.raises(ConfigError, match=said) as error:
                peft.read(tmp_path / "b", opened=load_safetensors)
            assert str(config) in str(error.value)
    config.write_text(text.replace('"r": 4', '"r": 5'))
    with pytest.raises(DataError, match="on disk, but adapter_config"):
        peft.read(tmp_path / "b", opened=load_safetensors)


def test_few_recipes_are_remembered(tmp_path: Path) -> None:
    config = saved(tmp_path / "a", 1) / CONFIG_NAME
    text = config.read_text()
    for alpha in range(2 * shared_layout.LAYOUTS.capacity):
        config.write_text(text.replace('"lora_alpha": 12', f'"lora_alpha": {alpha + 1}'))
        peft.read(tmp_path / "a", opened=load_safetensors)
    assert len(shared_layout.LAYOUTS) == shared_layout.LAYOUTS.capacity and len(peft_config._KNOWN) == peft_config._KNOWN.capacity


def test_what_is_more_than_pairs_is_read_tensor_by_tensor(tmp_path: Path, looked: list[str]) -> None:
    pair = random_pair("linear", torch.ones(7, 5))
    more: dict[str, dict[str, Any]] = {
        "extras": {"extras": {"score.weight": torch.ones(2, 3)}},
        "rows": {"token_rows": {"embed": TokenRows((3, 4), torch.ones(2, 6))}},
    }
    for name, parts in more.items():
        peft.write(Adapter({"a": pair}, **parts), tmp_path / name)
    peft.write(random_adapter(tiny_model("mixtral"), "q_proj", "gate_up_proj", "down_proj"), tmp_path / "experts")
    conv = random_pair("conv2d", torch.ones(7, 5, 3, 3), dora=True)
    peft.write(Adapter({"a": conv}), tmp_path / "conv")
    for name in (*more, "experts", "conv"):
        looked.clear()
        for _ in range(2):
            adapter, plain = peft.read(tmp_path / name, opened=load_safetensors), peft.read(tmp_path / name)
            assert_same(adapter, plain) if not adapter.extras else None
            assert adapter.extras.keys() == plain.extras.keys() and adapter.token_rows.keys() == plain.token_rows.keys()
        assert looked.count("_read") == 4 and len(shared_layout.LAYOUTS) == 0


def test_mixed_dtypes_are_read_tensor_by_tensor(tmp_path: Path, looked: list[str]) -> None:
    file = saved(tmp_path / "a", 1) / peft.MODEL_NAME
    tensors = load_file(file)
    save_file({name: tensor.bfloat16() if "lora_A" in name else tensor for name, tensor in tensors.items()}, file)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        peft.read(folder, opened=open_header)
        assert_same(peft.read(folder, opened=load_safetensors), peft.read(folder))
    assert looked.count("_read") == 5, "the outline once"
