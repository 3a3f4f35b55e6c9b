"""From files to a store and to a streaming model: every family's tensors, and what is missing or foreign is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from lorakeet.errors import ConfigError, DataError
from lorakeet.memory.store import WeightStore
from lorakeet.memory.transfer import HostTransfer
from lorakeet.models.families import GENERIC, family_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import (
    Residence,
    bytes_of_storing,
    empty_model,
    identity,
    open_streamed,
    records_of,
    write_store,
)
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.spec import QuantSpec
from tiny.held import HeldBytes
from tiny.models import FAMILIES, save_tiny_llama
from tiny.streams import loaded

PLAIN = QuantSpec()


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama", "qwen2", "mixtral")])
def test_every_family_gives_the_resident_models_logits(family: str, method: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", family=family)
    ids = torch.arange(5, 17)[None]
    resident, streamed = loaded(folder, method=method), loaded(folder, tmp_path / "store", method=method)
    assert streamed.attention == resident.attention
    with torch.no_grad():
        assert torch.equal(*(text.head(text.model.get_decoder()(input_ids=ids, row_lengths=(12,), use_cache=False)
                                       .last_hidden_state[0]) for text in (resident, streamed)))  # fmt: skip


def test_missing_kernels_are_said_of_a_streamed_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.models.files.quantized.bitsandbytes_advice", lambda: "bitsandbytes is not installed")
    folder = save_tiny_llama(tmp_path / "model")
    for method, times in (("nf4", 1), ("int8", 0), ("none", 0)):
        said: list[str] = []
        spec = ModelSpec(path=str(folder), dtype="float32", device="cpu", quantize=QuantSpec(method=method))  # type: ignore[arg-type]
        load_text_model(spec, store=tmp_path / "store", say=said.append)
        assert sum("bitsandbytes is not installed" in line for line in said) == times


def test_a_store_is_used_again_and_belongs_to_its_model(tmp_path: Path) -> None:
    folder, store = save_tiny_llama(tmp_path / "model"), tmp_path / "store"
    loaded(folder, store)
    (path,) = store.iterdir()
    stamp = path.stat().st_mtime_ns
    loaded(folder, store)
    assert path.stat().st_mtime_ns == stamp
    other = save_tiny_llama(tmp_path / "other" / "model", seed=1)
    loaded(other, store)
    assert len(list(store.iterdir())) == 2
    stolen = next(file for file in store.iterdir() if file != path)
    stolen.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="holds another model"):
        loaded(other, store)
    loaded(folder, store, dtype="bfloat16")
    loaded(folder, store, method="int8")
    assert len(list(store.iterdir())) == 4


def test_a_truncated_store_is_refused(tmp_path: Path) -> None:
    folder, store = save_tiny_llama(tmp_path / "model"), tmp_path / "store"
    loaded(folder, store)
    (path,) = store.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="is damaged"):
        loaded(folder, store)


def test_missing_and_misshapen_tensors_are_listed_and_no_store_is_left(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 2 weights .*: model\.layers\.1\.mlp\.up_proj\.weight; model\.norm\.weight;"):
        loaded(folder, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is 3×3, expected 32×32"):
        loaded(folder, tmp_path / "store")


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no list of blocks"):
        records_of(nn.Linear(2, 2), GENERIC)


def test_the_store_names_packed_layers_and_holds_every_tensor_once(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    config, path = AutoConfig.from_pretrained(folder), tmp_path / "s"
    quantize = QuantSpec(method="nf4")
    same = identity(folder, torch.float32, quantize)
    write_store(path, same, source=folder, config=config, dtype=torch.float32, quantize=quantize, family=family_of(config))
    store = WeightStore.open(path, same)
    assert len(json.loads(store.identity["packed"])) == 14
    assert sum("embed_tokens" in name for name in store.tensors) == 1 and not any("lm_head" in name for name in store.tensors)
    model, streamed = open_streamed(store, config, torch.float32, family_of(config))
    assert len(streamed.blocks) == 2 and not model.model.norm.weight.is_meta and not model.model.rotary_emb.inv_freq.is_meta
    streamed.stream.close()


@pytest.mark.parametrize("vocabulary", [320, 8192])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_store_takes_while_it_is_written_is_planned(tied: bool, vocabulary: int, tmp_path: Path) -> None:
    """A block with one of its matrices, or the embedding alone: no tensor from elsewhere comes while a block is not whole."""
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "tie_word_embeddings": tied}
    folder = save_tiny_llama(tmp_path / "model", vocab_size=vocabulary, **wide)
    config = AutoConfig.from_pretrained(folder)
    family, model = family_of(config), empty_model(config, torch.bfloat16)
    block = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name.startswith("model.layers.0."))
    with HeldBytes() as held:
        write_store(
            tmp_path / "s", {}, source=folder, config=config, dtype=torch.bfloat16, quantize=PLAIN, family=family
        )
    planned = bytes_of_storing(model, family, block, 4 + 2)
    assert planned / 4 < held.peak <= planned + 20_000, "the bytes of a file are no tensors, norms come beside"


def test_what_stays_is_on_the_device_and_what_streams_goes_there(tmp_path: Path) -> None:
    """torch's device for shapes without numbers stands for one that is not here."""
    folder, there = save_tiny_llama(tmp_path / "model", tie_word_embeddings=False), torch.device("meta")
    config, path = AutoConfig.from_pretrained(folder), tmp_path / "s"
    same = identity(folder, torch.float32, QuantSpec())
    write_store(path, same, source=folder, config=config, dtype=torch.float32, quantize=QuantSpec(), family=family_of(config))
    store = WeightStore.open(path, same)
    model, streamed = open_streamed(store, config, torch.float32, family_of(config), residence=Residence(device=there))
    assert model.model.norm.weight.device == model.model.rotary_emb.inv_freq.device == there
    assert model.get_input_embeddings().rows.device == model.get_output_embeddings().rows.device == there
    assert isinstance(streamed.stream.transfer, HostTransfer) and Residence().transfer(store) is None
    streamed.stream.close()
