"""The packed form of a streamed model in a store of its own: the same function as packed in memory, and read layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.errors import DataError
from lorakeet.memory.store import StoreRefused
from lorakeet.models.files.quantized import packable
from lorakeet.models.modules import find
from lorakeet.models.modules import replace as put
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.packed_store import StoredBases, open_packed, write_packed
from lorakeet.planning.rehearse_text import RowShape, made_up_batch
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from tiny.models import save_tiny_llama

SPEC: dict[str, Any] = {"dtype": "float32", "products": "float32", "device": "cpu"}


def loaded(folder: Path, store: Path | None, method: str = "none") -> TextModel:
    spec = ModelSpec(path=str(folder), quantize=QuantSpec(method=method), **SPEC)  # type: ignore[arg-type]
    return load_text_model(spec, say=lambda line: None, store=store)


def logits(text: TextModel) -> torch.Tensor:
    with torch.no_grad():
        return text.head(text.hidden(made_up_batch(RowShape(12, 2))))


def blocks(text: TextModel, bases: dict[str, PackedBase]) -> Iterator[dict[str, PackedBase]]:
    """Every layer of each block in NF4, made while the block is in memory; in `bases` too."""
    assert text.streamed is not None
    for number in range(len(text.streamed.blocks)):
        start = f"{text.family.blocks}.{number}."
        with text.streamed.present(number, then=number):
            paths = [path for path in packable(text.model, head=False) if path.startswith(start)]
            found: dict[str, PackedBase] = {path: Nf4Base.of(find(text.model, path).weight) for path in paths}  # type: ignore[union-attr, arg-type]
        bases.update(found)
        yield found


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "mixtral"])
def test_it_computes_what_the_layers_packed_in_memory_do(family: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", family=family)
    streamed, resident, bases = loaded(folder, tmp_path), loaded(folder, None), {}
    paths = write_packed(streamed, blocks(streamed, bases), tmp_path / "packed")
    assert paths == list(bases) and paths
    for path, base in bases.items():
        put(resident.model, path, PackedLinear(base, find(resident.model, path).bias))  # type: ignore[union-attr, arg-type]
    packed = open_packed(streamed, tmp_path / "packed")
    assert packed.attention == streamed.attention and packed.tokenizer is streamed.tokenizer
    assert torch.equal(logits(packed), logits(resident))
    assert not torch.equal(logits(streamed), logits(packed))


def test_its_weights_are_read_one_by_one(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    text, bases = loaded(folder, tmp_path), {}
    paths = write_packed(text, blocks(text, bases), tmp_path / "packed")
    store = open_packed(text, tmp_path / "packed").store
    assert store is not None
    found = StoredBases(store, paths)
    assert list(found) == paths and len(found) == len(paths)
    for path in paths:
        assert found[path].settings == bases[path].settings and found[path] is not found[path]
        assert torch.equal(found[path].dense(), bases[path].dense())
    with pytest.raises(KeyError):
        found["lm_head"]


def test_a_block_that_fails_leaves_no_store(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    text = loaded(folder, tmp_path)

    def failing(error: Exception) -> Iterator[dict[str, PackedBase]]:
        yield {}
        raise error

    with pytest.raises(DataError, match="torn"):
        write_packed(text, failing(DataError("torn")), tmp_path / "packed")
    with pytest.raises(StoreRefused, match="its disk is full"):
        write_packed(text, failing(OSError(28, "No space left on device")), tmp_path / "packed")
    assert not list(tmp_path.glob("*packed*"))
