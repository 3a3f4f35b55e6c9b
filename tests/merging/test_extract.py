"""`merge.extract`: base and adapter are the tuned model where the rank suffices, and what is lost or left out is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.core.adapter import MODEL_TYPE, Adapter
from lorakeet.errors import ConfigError
from lorakeet.formats.peft import peft
from lorakeet.merging.checkpoint import open_checkpoint
from lorakeet.merging.extract import Extracted, extract_adapter
from lorakeet.merging.merged_folder import merge_into
from tiny.adapters import random_adapter
from tiny.dense import change, fold_into
from tiny.models import tiny_model

RANK = 8  # more than any random adapter here has


def nothing(model: Any) -> None:
    """Tunes no more than the adapter."""


def save(folder: Path, model: Any, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def tuned_pair(tmp_path: Path, family: str, *leaves: str, also: Callable[[Any], None] = nothing, **changes: Any) -> Adapter:
    """Saves tmp_path/base and tmp_path/tuned, whose difference is the adapter that is returned and what `also` does."""
    adapter = random_adapter(tiny_model(family, **changes), *leaves)
    save(tmp_path / "base", tiny_model(family, **changes))
    model = fold_into(tiny_model(family, **changes), adapter)
    with torch.no_grad():
        also(model)
    save(tmp_path / "tuned", model)
    return adapter


def extracted(tmp_path: Path, rank: int = RANK, **more: Any) -> Extracted:
    tuned, base = open_checkpoint(tmp_path / "tuned"), open_checkpoint(tmp_path / "base")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "base"))
    return extract_adapter(tuned, base, model, rank=rank, **more)


def merges_to_the_tuned(tmp_path: Path, found: Extracted) -> None:
    """base + adapter, through the disk, has the tuned model's parameters."""
    peft.write(found.adapter, tmp_path / "adapter")
    merge_into(tmp_path / "base", peft.read(tmp_path / "adapter"), tmp_path / "merged")
    mine, theirs = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "tuned"))
    wanted = dict(theirs.named_parameters(remove_duplicate=False))
    for name, parameter in mine.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(parameter, wanted[name], atol=1e-5, rtol=0)


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("llama", ()),
    "phi3 fused": ("phi3", ()),
    "gpt2": ("gpt2", ("c_attn", "c_proj")),
    "mixtral": ("mixtral", ("q_proj", "gate_up_proj", "down_proj")),
    "qwen2_moe": ("qwen2_moe", ("o_proj", "gate_up_proj", "down_proj")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_of_low_rank_is_found_again(case: str, tmp_path: Path) -> None:
    family, leaves = CASES[case]
    adapter = tuned_pair(tmp_path, family, *leaves)
    found = extracted(tmp_path)
    assert set(found.adapter.pairs) == set(adapter.pairs) and not found.left_out and not found.adapter.extras
    for path, pair in found.adapter.pairs.items():
        torch.testing.assert_close(change(pair), change(adapter.pairs[path]), atol=1e-5, rtol=0)
    assert found.energy > 1 - 1e-9 and found.unchanged > 0
    merges_to_the_tuned(tmp_path, found)


def test_too_small_a_rank_says_what_is_lost(tmp_path: Path) -> None:
    adapter = tuned_pair(tmp_path, "llama")
    found = extracted(tmp_path, rank=2)
    lost = whole = 0.0
    for path, low in found.captured.items():
        exact = change(adapter.pairs[path])
        error = float((change(found.adapter.pairs[path]) - exact).norm() / exact.norm())
        assert low.error == pytest.approx(error, abs=1e-4) and found.adapter.pairs[path].rank == 2
        lost, whole = lost + error**2 * float(exact.norm()) ** 2, whole + float(exact.norm()) ** 2
    assert found.energy == pytest.approx(1 - lost / whole, abs=1e-4) and 0.3 < found.energy < 0.95


def norms_and_embedding(model: Any) -> None:
    model.model.norm.weight.mul_(1.5)
    model.model.embed_tokens.weight.add_(0.1)


def test_other_parameters_are_kept_whole_or_named(tmp_path: Path) -> None:
    tuned_pair(tmp_path, "llama", also=norms_and_embedding)
    found = extracted(tmp_path)
    assert set(found.adapter.extras) == {"model.norm.weight", "model.embed_tokens.weight"} and not found.left_out
    merges_to_the_tuned(tmp_path, found)
    short = extracted(tmp_path, whole="none")
    assert not short.adapter.extras and set(short.left_out) == set(found.adapter.extras)


def test_a_tied_embedding_is_kept_for_the_head_too(tmp_path: Path) -> None:
    tuned_pair(tmp_path, "qwen3", also=norms_and_embedding)
    found = extracted(tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(found.adapter.extras)
    assert "it is kept twice, also as lm_head.weight" in found.notes[0]
    merges_to_the_tuned(tmp_path, found)


def biases(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias.add_(0.3)


@pytest.mark.parametrize("leaves", [("v_proj", "up_proj"), ("up_proj",)])
def test_biases_are_kept_exactly(leaves: tuple[str, ...], tmp_path: Path) -> None:
    tuned_pair(tmp_path, "qwen2", *leaves, also=biases)
    found = extracted(tmp_path)
    assert not found.left_out and not found.adapter.extras
    merges_to_the_tuned(tmp_path, found)


def layer_norm(model: Any) -> None:
    model.transformer.ln_f.bias.add_(0.2)


def test_a_module_of_two_parameters_is_kept_with_both(tmp_path: Path) -> None:
    tuned_pair(tmp_path, "gpt2", "c_attn", also=layer_norm)
    found = extracted(tmp_path)
    assert set(found.adapter.extras) == {"transformer.ln_f.bias", "transformer.ln_f.weight"}
    merges_to_the_tuned(tmp_path, found)


def test_progress_counts_every_parameter(tmp_path: Path) -> None:
    tuned_pair(tmp_path, "llama")
    seen: list[tuple[int, int]] = []
    extracted(tmp_path, on_progress=lambda done, total, path: seen.append((done, total)))
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)] and len(seen) > 15


def test_models_that_do_not_belong_together_are_listed(tmp_path: Path) -> None:
    save(tmp_path / "base", tiny_model("llama"))
    save(tmp_path / "tuned", tiny_model("llama", intermediate_size=80, num_hidden_layers=1))
    with pytest.raises(ConfigError) as raised:
        extracted(tmp_path)
    said = str(raised.value)
    assert "is not a tuned copy of" in said and "model.layers.1.mlp.up_proj.weight is not in" in said
    assert "model.layers.0.mlp.up_proj.weight is (80, 32) tuned and" in said


def test_a_longer_vocabulary_is_refused_or_left_out(tmp_path: Path) -> None:
    save(tmp_path / "base", tiny_model("llama"))
    longer = fold_into(tiny_model("llama"), random_adapter(tiny_model("llama"), "q_proj"))
    longer.resize_token_embeddings(100)
    save(tmp_path / "tuned", longer)
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is \(100, 32\) tuned and .*Leave it out with --whole none"):
        extracted(tmp_path)
    assert set(extracted(tmp_path, whole="none").left_out) == {"model.embed_tokens.weight", "lm_head.weight"}


def hole(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    tuned_pair(tmp_path, "llama", "q_proj", also=hole)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite values"):
        extracted(tmp_path)
    with pytest.raises(ConfigError, match="rank is 0; expected 1 or more"):
        extracted(tmp_path, rank=0)
    tuned_pair(tmp_path / "same", "llama", "nothing here")
    with pytest.raises(ConfigError, match=r"are equal in all \d+ parameters"):
        extracted(tmp_path / "same")


def test_the_type_of_the_base_is_kept_for_peft(tmp_path: Path) -> None:
    tuned_pair(tmp_path, "glm4_moe", "o_proj", "up_proj")
    assert extracted(tmp_path).adapter.metadata == {MODEL_TYPE: "glm4_moe"}
