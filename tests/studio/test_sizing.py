"""`studio.sizing`: sizes are those of the files that are written, before they are; times follow from measured rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.kinds.text.run_time import Speed
from lorakeet.models.text.load import load_tokenizer, read_config
from lorakeet.studio.sizing import BITS, EXACT, Numbers, disk_rate, export_seconds, merge_seconds, numbers_of, sizes_of_run
from lorakeet.studio.taking import QUANTS, WAYS
from tiny.models import save_tiny_llama

SPEED = Speed(1e11, 1e10)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0"])
def test_the_size_of_a_file_is_that_of_its_tensors(model: Path, tmp_path: Path, quant: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf, of the extra lorakeet[gguf], reads what was written")
    write_gguf(model, None, tmp_path / "a.gguf", quant=quant, tokenizer=load_tokenizer(model), facts={})
    stored = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors)
    assert numbers_of(read_config(model)).quantised(quant) == pytest.approx(stored, rel=0.01)


def test_the_size_of_a_merge_is_that_of_the_model(model: Path) -> None:
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert numbers_of(read_config(model)).stored == pytest.approx(stored, rel=0.1)


def test_every_type_has_its_bits_and_more_work_takes_longer() -> None:
    assert set(BITS) == set(QUANTS) and set(EXACT) < set(QUANTS)
    small, large = Numbers(1_000_000, 1000, 2), Numbers(2_000_000, 1000, 2)
    assert merge_seconds(small, 1e8, SPEED, 100) < merge_seconds(large, 1e8, SPEED, 100) < merge_seconds(large, 1e7, SPEED, 100)
    assert export_seconds(small, "q8_0", 1e8, SPEED, 10) < export_seconds(small, "q4_k_m", 1e8, SPEED, 10)


def test_sizes_of_a_run_are_sent_in_words(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    save_file({"a": torch.zeros(4)}, run / "adapter" / "adapter_model.safetensors")
    (run / "config.yaml").write_text(f"model: {model}\ndata: rows.jsonl\n")
    sent: list[Any] = []
    sizes_of_run({"folder": str(run)}, sent.append)
    [found] = sent
    assert set(found["sizes"]) == set(WAYS) and set(found["quants"]) == set(QUANTS)
    assert "here, its check among it" in found["sizes"]["merge"] and found["quants"]["q4_k_m"].startswith("about ")
    (run / "config.yaml").write_text("kind: image\nmodel: m\ndata: photos\n")
    sizes_of_run({"folder": str(run)}, sent.append)
    assert sent[-1]["quants"] == {} and "some seconds" in sent[-1]["sizes"]["kohya"]


def test_the_disk_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    assert disk_rate(tmp_path) > 0 and not list(tmp_path.iterdir())
