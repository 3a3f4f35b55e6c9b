"""Merged folders: what transformers loads from them computes what the adapter meant, and bad input leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter, TokenRows
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.formats.files import safetensors_file
from lorakeet.merging.merged_folder import merge_into
from lorakeet.models.inject import attach
from tiny.adapters import random_adapter, random_pair
from tiny.dense import fold_into, folded
from tiny.models import tiny_model

IDS = torch.tensor([[1, 5, 9, 33, 60, 7, 90, 12]])
TOLERANCE = 1e-5  # of fp32 logits of about 5


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def saved(folder: Path, family: str, **changes: Any) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def check(tmp_path: Path, family: str, adapter: Adapter, **changes: Any) -> Any:
    """Merges `adapter` into a saved tiny model and compares with the dense definition; returns the result."""
    result = merge_into(saved(tmp_path / "base", family, **changes), adapter, tmp_path / "merged")
    wanted = logits(fold_into(tiny_model(family, **changes), adapter))
    got = logits(loaded(tmp_path / "merged"))
    assert (wanted - logits(tiny_model(family, **changes))).abs().max() > 1e-2
    assert (wanted - got).abs().max() <= TOLERANCE
    return result


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "llama": ("llama", (), {}),
    "llama dora": ("llama", (), {"dora": True}),
    "mistral": ("mistral", (), {}),
    "qwen2": ("qwen2", (), {}),
    "gemma2": ("gemma2", (), {}),
    "gemma3": ("gemma3", (), {}),
    "phi3 fused": ("phi3", (), {}),
    "gpt2": ("gpt2", (), {}),
    "gpt2 dora": ("gpt2", ("c_attn", "c_proj"), {"dora": True}),
    "mixtral": ("mixtral", ("q_proj", "gate_up_proj", "down_proj"), {}),
    "qwen2_moe": ("qwen2_moe", ("o_proj", "gate_up_proj", "down_proj", "gate_proj"), {}),
    "qwen3_moe": ("qwen3_moe", ("gate_up_proj",), {}),
    "embedding": ("llama", ("embed_tokens", "q_proj"), {}),
    "head": ("llama", ("lm_head",), {}),
    "scaled embedding": ("gemma2", ("embed_tokens",), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_folder_computes_the_dense_fold_and_what_the_live_adapter_computes(case: str, tmp_path: Path) -> None:
    family, leaves, options = CASES[case]
    live = tiny_model(family)
    adapter = random_adapter(live, *leaves, **options)
    check(tmp_path, family, adapter)
    attach(live, adapter)
    assert (logits(live) - logits(loaded(tmp_path / "merged"))).abs().max() <= TOLERANCE


@pytest.mark.parametrize("leaves", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_pair_on_one_of_two_tied_weights_unties_them(family: str, leaves: tuple[str, ...], tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model(family, tie_word_embeddings=True), *leaves)
    result = check(tmp_path, family, adapter, tie_word_embeddings=True)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    assert any("written separately" in note for note in result.notes)


def test_gpt2_unties_although_its_config_does_not_mention_tying(tmp_path: Path) -> None:
    check(tmp_path, "gpt2", random_adapter(tiny_model("gpt2"), "wte", "c_attn"))


def test_a_whole_head_unties(tmp_path: Path) -> None:
    head = torch.randn(96, 32)
    check(tmp_path, "qwen3", Adapter({}, {"lm_head.weight": head}), tie_word_embeddings=True)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"], head)


def test_tied_models_stay_tied_where_nothing_parts_them(tmp_path: Path) -> None:
    result = check(tmp_path, "qwen3", random_adapter(tiny_model("qwen3")))
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert not result.notes


def test_new_token_rows_lengthen_the_embedding(tmp_path: Path) -> None:
    rows = torch.randn(2, 32)
    adapter = Adapter({}, token_rows={"model.embed_tokens": TokenRows((97, 98), rows, ("<a>", "<b>"), "lm_head")})
    result = merge_into(saved(tmp_path / "base", "qwen3"), adapter, tmp_path / "merged")
    model = loaded(tmp_path / "merged")
    weight, old = model.model.embed_tokens.weight, tiny_model("qwen3").model.embed_tokens.weight
    assert model.config.vocab_size == 99
    assert torch.equal(weight[97:], rows) and torch.equal(weight[:96], old)
    assert torch.allclose(weight[96], old.mean(0), atol=1e-6)
    assert model.lm_head.weight is weight
    assert "<a>, <b>" in result.notes[0]


def test_token_rows_within_the_vocabulary(tmp_path: Path) -> None:
    adapter = Adapter({}, token_rows={"model.embed_tokens": TokenRows((5, 33), torch.randn(2, 32))})
    check(tmp_path, "llama", adapter)


def test_a_pairs_bias_is_added_where_the_module_has_one(tmp_path: Path) -> None:
    plain = random_adapter(tiny_model("qwen2"), "q_proj", "v_proj")
    biased = {path: replace(pair, bias=torch.randn(pair.B.shape[0])) for path, pair in plain.pairs.items()}
    check(tmp_path, "qwen2", Adapter(biased))


def test_a_pairs_bias_is_refused_where_the_module_has_none(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model("llama"), "q_proj", bias=torch.ones(32))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has no bias in the checkpoint"):
        merge_into(saved(tmp_path / "base", "llama"), adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_bias_of_zeros_adds_nothing_and_needs_no_place(tmp_path: Path) -> None:
    """PEFT writes one for every pair of an adapter in which any pair has a bias."""
    check(tmp_path, "llama", random_adapter(tiny_model("llama"), "q_proj", bias=torch.zeros(32)))


def test_shards_keep_their_layout(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "base", max_shard_size="40kB")
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    adapter = random_adapter(model, "q_proj", "down_proj", "lm_head")
    result = merge_into(tmp_path / "base", adapter, tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert merged["weight_map"] == index["weight_map"]
    assert merged["metadata"]["total_size"] == index["metadata"]["total_size"]
    assert result.tensors == len(index["weight_map"]) and result.changed == 2 + 8 + 1
    wanted = logits(fold_into(model, adapter))
    assert (logits(loaded(tmp_path / "merged")) - wanted).abs().max() <= TOLERANCE


def test_experts_kept_in_one_tensor_on_disk(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    adapter = random_adapter(model, "gate_up_proj", "down_proj")
    (tmp_path / "base").mkdir()
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / "base" / "model.safetensors")
    merge_into(tmp_path / "base", adapter, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for path, pair in adapter.pairs.items():
        assert torch.allclose(written[path].double(), folded(model.get_parameter(path), pair), atol=1e-6)


def test_convolutions(tmp_path: Path) -> None:
    weight = torch.randn(8, 3, 3, 3)
    (tmp_path / "base").mkdir()
    save_file({"down.conv.weight": weight}, tmp_path / "base" / "model.safetensors")
    for name, dora in (("plain", False), ("dora", True)):
        pair = random_pair("conv2d", weight, dora=dora)
        merge_into(tmp_path / "base", Adapter({"down.conv": pair}), tmp_path / name)
        written = load_file(tmp_path / name / "model.safetensors")["down.conv.weight"]
        assert torch.allclose(written.double(), folded(weight, pair), atol=1e-6)


@pytest.mark.parametrize("dtype", ["same", "float32"])
def test_rounding_is_measured(dtype: Any, tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapter = random_adapter(model, "q_proj", "down_proj")
    result = merge_into(tmp_path / "base", adapter, tmp_path / "merged", dtype=dtype)
    assert loaded(tmp_path / "merged").dtype is (torch.bfloat16 if dtype == "same" else torch.float32)
    assert set(result.rounding) == {f"{path}.weight" for path in adapter.pairs}
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for path, pair in adapter.pairs.items():
        exact = folded(model.get_submodule(path).weight, pair)
        error = (written[f"{path}.weight"].double() - exact).abs().max().item()
        assert result.rounding[f"{path}.weight"] == pytest.approx(error, abs=1e-6)
        assert error <= (exact.abs().max().item() * 2**-8 if dtype == "same" else 1e-6)
    assert result.worst == (max(result.rounding.items(), key=lambda item: item[1]) if dtype == "same" else ("", 0.0))


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(file: safetensors_file.SafeFile, name: str, read: Any = safetensors_file.SafeFile.read) -> torch.Tensor:
        nonlocal most
        tensor = read(file, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    adapter = random_adapter(tiny_model("mixtral"), "q_proj", "gate_up_proj", "lm_head")
    saved(tmp_path / "base", "mixtral")
    monkeypatch.setattr(safetensors_file.SafeFile, "read", counted)
    merge_into(tmp_path / "base", adapter, tmp_path / "merged")
    assert len(alive) == 41 and most == 1


def test_tokenizer_files_go_along_and_weights_of_other_formats_do_not(tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_folder, base)
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / "README.md").write_text("the card of the base")
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    merge_into(base, Adapter({}, token_rows={"model.embed_tokens": TokenRows((3,), torch.randn(1, 32))}), tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        path.name for path in base.iterdir() if path.suffix != ".bin" and path.name != "README.md"
    }
    merge_into(base, random_adapter(loaded(base), "q_proj"), tmp_path / "two", tokenizer=run)
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "two" / "metrics.jsonl").exists()


def test_every_mismatch_is_listed_and_nothing_written(tmp_path: Path) -> None:
    wide = random_adapter(tiny_model("llama", hidden_size=64), "q_proj")
    other = random_adapter(tiny_model("gpt2"), "c_attn")
    adapter = Adapter({**wide.pairs, **other.pairs}, {"score.weight": torch.zeros(2, 32), "lm_head.weight": torch.zeros(96, 8)})
    with pytest.raises(ConfigError, match="6 problems") as error:
        merge_into(saved(tmp_path / "base", "llama"), adapter, tmp_path / "merged")
    text = str(error.value)
    for path in (*wide.pairs, *other.pairs):
        assert f"{path}.weight" in text
    assert "score.weight: the checkpoint has no such tensor" in text
    assert "lm_head.weight is (96, 32) in the checkpoint and (96, 8) in the adapter" in text
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="exists already and is never overwritten"):
        merge_into(saved(tmp_path / "base", "llama"), random_adapter(tiny_model("llama")), tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "base", "llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10_000, 9_000, 1_000))
    with pytest.raises(EnvironmentProblem, match=r"needs [\d,]{6,} bytes on the disk of .*, and 1,000 are free"):
        merge_into(tmp_path / "base", random_adapter(tiny_model("llama")), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    def fills_up(done: int, total: int, name: str) -> None:
        if done == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EnvironmentProblem, match="are free"):
        merge_into(
            saved(tmp_path / "base", "llama"), random_adapter(tiny_model("llama")), tmp_path / "merged", on_progress=fills_up
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
