"""`export.llama_cpp`: what it refuses is said with llama.cpp's reason; its own quantiser; greedy texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.exporting.llama_cpp import FILE_TYPES, LlamaCpp, quantise
from lorakeet.formats.files.gguf_file import GgufFile
from tiny.exports import write_model
from tiny.models import save_tiny_llama


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tiny_llama_folder, None, tmp_path_factory.mktemp("llama") / "model.gguf")


def test_k_quants_are_llama_cpps_own(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", hidden_size=256, intermediate_size=256, num_attention_heads=4, num_hidden_layers=1)
    wide = write_model(base, None, tmp_path / "wide.gguf")
    for quant, kind in (("q4_k_m", "Q4_K"), ("q6_k", "Q6_K"), ("q4_0", "Q4_0")):
        quantise(wide, tmp_path / f"{quant}.gguf", quant)
        file = GgufFile(tmp_path / f"{quant}.gguf")
        assert file.types[kind] > 0.5 * sum(file.types.values())
        wanted, got = dict(GgufFile(wide).tensors()), dict(file.tensors())
        name = "blk.0.attn_q.weight"
        assert 0 < float((got[name][:] - wanted[name][:]).norm() / wanted[name][:].norm()) < 0.15
        with LlamaCpp(tmp_path / f"{quant}.gguf", context=32) as engine:
            assert bool(torch.isfinite(engine.logits([1, 2, 3])).all())
    assert set(FILE_TYPES) >= {"q2_k", "q3_k_m", "q5_k_m", "iq4_xs"}


def test_logits_do_not_depend_on_earlier_requests(model: Path) -> None:
    with LlamaCpp(model, context=64) as engine:
        first = engine.logits([5, 6, 7])
        engine.logits([9] * 20)
        assert torch.equal(engine.logits([5, 6, 7]), first) and first.shape == (3, engine.vocabulary)
        written = engine.greedy([5, 6, 7], 6, frozenset())
        assert len(written) == 6 and written[0] == int(first[-1].argmax())
        assert engine.greedy([5, 6, 7], 6, frozenset({written[2]}))[-1] == written[2]
        with pytest.raises(ConfigError, match=r"do not fit into llama\.cpp's context of"):
            engine.logits([1] * 5000)


def test_passes_give_what_one_pass_gives(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of earlier passes are there, and only asked tokens are told."""
    ids = [5 + place % 60 for place in range(40)]
    with LlamaCpp(model, context=128) as engine:
        whole, text = engine.logits(ids), engine.greedy(ids, 8, frozenset())
        assert len(list(engine.logit_parts(ids))) == 1
    monkeypatch.setattr("lorakeet.exporting.llama_cpp.PASS", 16)
    with LlamaCpp(model, context=128) as engine:
        parts = list(engine.logit_parts(ids))
        assert [len(part) for part in parts] == [16, 16, 8]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)
        for last in (1, 8, 9, 40):
            torch.testing.assert_close(engine.logits(ids, last), whole[-last:], atol=1e-5, rtol=0)
        assert engine.greedy(ids, 8, frozenset()) == text


def test_what_is_refused_is_said(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"llama\.cpp cannot load .*broken\.gguf"):
        LlamaCpp(broken)
    with pytest.raises(ConfigError, match="cannot load the adapter"):
        LlamaCpp(model, adapter=model, context=32)
    with pytest.raises(EnvironmentProblem, match=r"could not quantise broken\.gguf to q4_0"):
        quantise(broken, tmp_path / "out.gguf", "q4_0")
    assert not (tmp_path / "out.gguf").exists()
