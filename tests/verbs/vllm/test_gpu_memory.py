"""What a server takes on its GPU is known before its weights are read: weights as they are loaded, and keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.cli.main import main
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.verbs import serve as serve_module
from lorakeet.verbs.vllm import gpu_memory
from lorakeet.verbs.vllm.gpu_memory import least_cache_bytes
from tiny.family_columns import saved
from tiny.hybrids import HYBRIDS
from tiny.models import save_tiny_llama
from tiny.simulated_card import simulated_card


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "deepseek_v3", *HYBRIDS])
def test_keys_and_values_are_never_counted_higher_than_they_are(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    text = load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"))
    cache = KeyValues(slots=3, capacity=32)
    step(text, cache, [CacheRow(0, 0, (3, 5, 7), {})], ServingModel(text).selection)
    assert least_cache_bytes(read_config(folder), 3, 32, torch.float32) == (0 if family == "deepseek_v3" else cache.bytes)


@pytest.mark.parametrize("method", ["none", "nf4"])
def test_a_server_that_does_not_fit_is_refused_before_its_weights_are_read(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    loaded = load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu", quantize=QuantSpec(method=method))).model
    needed = sum(each.nbytes for each in (*loaded.parameters(), *loaded.buffers()))
    asked: list[int] = []
    with simulated_card():
        monkeypatch.setattr(serve_module, "load_text_model", lambda *_, **__: pytest.fail("its weights were read"))
        monkeypatch.setattr(gpu_memory, "fits_now", lambda size, device: asked.append(size))
        given = ["serve", "--model", str(folder), "--dtype", "float32", "--port", "0", "--slots", "4", "--quantize", method]
        assert main(given) == 2
    said = " ".join(capsys.readouterr().err.split())
    keys = least_cache_bytes(read_config(folder), 4, min(2048, loaded.config.max_position_embeddings), torch.float32)
    assert asked == [needed + keys]
    assert f"{folder} cannot be served on cuda:0: its weights take" in said and "No weights were read" in said
    assert ("take --quantize nf4, or give" in said) == (method == "none") and "fewer --slots (4 now)" in said
