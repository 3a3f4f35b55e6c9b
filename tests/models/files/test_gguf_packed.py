"""A .gguf file whose own blocks are trained on: the same numbers as its dense copy, in its own bytes, or a message."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from lorakeet.errors import ConfigError, DataError
from lorakeet.models.files.gguf_packed import file_blocks, packed_copy, tensors_of
from lorakeet.models.files.gguf_validate import config_of_gguf
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.gguf import GgufBase
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec
from tiny.gguf_file import write_tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")
    return tmp_path / "tiny.gguf"


def spec(path: Path, method: str) -> ModelSpec:
    return ModelSpec(path=str(path), dtype="float32", quantize=QuantSpec(method=method))  # type: ignore[arg-type]


def test_the_numbers_are_those_of_the_dense_copy(file: Path) -> None:
    packed, dense = (load_text_model(spec(file, method), say=lambda _: None).model for method in ("gguf", "none"))
    numbers = dense.state_dict()
    layers = {path: module for path, module in packed.named_modules() if isinstance(module, PackedLinear)}
    for path, layer in layers.items():
        assert torch.equal(layer.weight, numbers[f"{path}.weight"]), path
    plain = {name: tensor for name, tensor in packed.state_dict().items() if name in numbers}
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in plain.items())
    assert len(plain) + len(layers) == len(numbers)
    kinds = {path.rsplit(".", 1)[1]: layer.base.kind for path, layer in layers.items() if isinstance(layer.base, GgufBase)}
    assert kinds == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "Q4_0")  # down: 48 wide


def test_every_pair_on_it_gets_a_gradient(file: Path) -> None:
    from lorakeet.core.spec import LoraSpec
    from lorakeet.models.inject import trained_parameters
    from lorakeet.models.targets import plan_for

    text = load_text_model(spec(file, "gguf"), say=lambda _: None)
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4, alpha=12), text.family), seed=0)
    parameters = trained_parameters(text.model, "default")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".B"):
                parameter.normal_(std=0.02)
    ids = torch.arange(9)[None]
    states = text.model.get_decoder()(input_ids=ids, row_lengths=(9,), use_cache=False).last_hidden_state
    states.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters.values())


def test_blocks_of_layers_that_the_file_does_not_hold_are_no_silent_loss(file: Path) -> None:
    known = "model.layers.0.mlp.gate_proj.weight"
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}["blk.0.ffn_gate.weight"]

    def blocks_of(name: str) -> torch.Tensor:
        assert name == known
        return torch.from_numpy(held.copy())

    assert [content for _, content in file_blocks(file, {known}, blocks_of)] == [held.tobytes()]
    with pytest.raises(DataError, match=r"has no tensors lm_head\.weight, whose blocks"):
        list(file_blocks(file, {known, "lm_head.weight"}, blocks_of))


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_goes_meanwhile_is_named_and_not_the_cache(file: Path, packed: bool) -> None:
    tensors = tensors_of(file, config_of_gguf(file), packed=packed)
    file.unlink()
    with pytest.raises(DataError, match=r"tiny\.gguf cannot be read: No such file"):
        next(tensor for tensor in tensors if tensor.packed == packed).read()


def test_a_file_that_was_cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=r"was probably cut off\. Fetch the file again"):
        packed_copy(file, print)


def test_layers_of_a_type_that_is_not_read_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakeet.models.files import gguf_packed

    monkeypatch.setattr(gguf_packed, "BLOCK_TYPES", {"Q8_0": None})
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")
    with pytest.raises(DataError, match=r"blk.0.attn_q.weight is Q4_0; layers may be Q8_0, F32") as caught:
        packed_copy(tmp_path / "tiny.gguf", print)
    assert "blk.1.ffn_up.weight" in str(caught.value)


def test_a_folder_has_no_blocks_to_keep(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"method is gguf, but .* is no \.gguf file"):
        load_text_model(spec(tmp_path, "gguf"))
