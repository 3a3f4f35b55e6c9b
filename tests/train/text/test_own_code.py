"""The first pass of a run equals transformers' own code, and blocks that are called in another way are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakeet.core.fused.mlp_and_norm import GatedMlp
from lorakeet.core.layers.linear import Replacement
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.errors import EnvironmentProblem
from lorakeet.models import modules
from lorakeet.models.inject import trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter, own_modules
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.train.text.own_code import EXACT, ROUNDED, TOKENS, compare_with_own_code, require_own_code
from tiny.models import save_tiny_llama

MORE = {"gemma4": {"vocab_size_per_layer_input": 320}}


def prepared(folder: Path, family: str, dtype: str = "float32") -> TextModel:
    save_tiny_llama(folder, family=family, **MORE.get(family, {}))
    text = load_text_model(ModelSpec(path=str(folder), dtype=dtype), say=lambda _: None)
    return initialise_adapter(text, plan_for(text.model, LoraSpec(rank=2), text.family), seed=0)


def examples() -> list[Example]:
    """Rows that begin alike, of which few tokens are targets: a shared prefix, and a last block for few tokens."""
    chance = np.random.default_rng(0)
    found = []
    for number in range(3):
        ids = chance.integers(5, 300, TOKENS - 2 + number)
        ids[:6] = np.arange(6) + 10
        supervised = np.arange(len(ids)) >= len(ids) - 5
        found.append(Example(ids, supervised, str(number), None, False))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4", "qwen3_moe", "hrm_text", "gpt2"])
def test_the_first_pass_is_that_of_the_model_s_own_code(tmp_path: Path, family: str) -> None:
    text = prepared(tmp_path, family)
    kinds = [type(module) for module in text.model.modules() if isinstance(module, Replacement)]
    found = require_own_code(text, trained_parameters(text.model, "default"), examples())
    assert found.passed and found.allowed == EXACT
    assert found.gradient < 1e-4 and found.loss < 1e-4
    assert (found.rows, found.tokens) == (2, 2 * TOKENS - 3)
    assert [type(module) for module in text.model.modules() if isinstance(module, Replacement)] == kinds
    assert text.attention == "varlen"
    assert all(parameter.grad is None for parameter in text.model.parameters())


def test_the_last_tokens_are_predicted_whatever_the_run_trains(tmp_path: Path) -> None:
    """Rows of plain text, whose every token is a target, rows without a target, short ones; a row of one token is no help."""
    text = prepared(tmp_path, "llama")
    parameters = trained_parameters(text.model, "default")
    ids = np.arange(5, 5 + 2 * TOKENS)
    plain = Example(ids, np.arange(len(ids)) > 0, "plain", None, False)
    none = Example(ids[:3], np.zeros(3, bool), "none", None, False)
    one = Example(ids[:1], np.zeros(1, bool), "one", None, False)
    found = require_own_code(text, parameters, [one, none, plain, plain])
    assert found.passed and (found.rows, found.tokens) == (2, 3 + TOKENS)
    with pytest.raises(ValueError, match="at least one example"):
        compare_with_own_code(text, parameters, [one])


def test_a_base_that_is_sure_of_every_token_is_no_fault(tmp_path: Path) -> None:
    """Its gradients are rounding: only the losses can be compared."""
    text = prepared(tmp_path, "llama")
    with torch.no_grad():
        text.model.lm_head.weight.mul_(1000)  # the likeliest token is certain
    ids = np.arange(5, 5 + TOKENS)
    for _ in range(TOKENS):  # a row of tokens that the model predicts itself
        with torch.no_grad(), own_modules(text):
            best = text.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].argmax(1).numpy()
        ids[1:] = best[:-1]
    row = Example(ids, np.arange(len(ids)) > 0, "0", None, False)
    found = require_own_code(text, trained_parameters(text.model, "default"), [row])
    assert found.sure and found.passed and found.loss < EXACT


def test_numbers_of_few_bits_allow_more(tmp_path: Path) -> None:
    """Activations in bf16 round, whatever the products are in."""
    text = replace(prepared(tmp_path, "llama", "bfloat16"), products=torch.float32)
    assert require_own_code(text, trained_parameters(text.model, "default"), examples()).allowed == ROUNDED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_run_several_times_are_found_if_the_last_one_is_narrowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    text = prepared(tmp_path, "hrm_text", dtype)
    parameters = trained_parameters(text.model, "default")
    assert require_own_code(text, parameters, examples()).passed
    monkeypatch.setattr(modules, "blocks_run_once", lambda model, family: True)
    with pytest.raises(EnvironmentProblem, match=r"'hrm_text' models cannot be trained: on 61 tokens.*Nothing was trained"):
        require_own_code(replace(text), parameters, examples())  # which knows nothing of its blocks yet


def test_a_fused_block_that_computes_something_else_is_found(tmp_path: Path) -> None:
    text = prepared(tmp_path, "llama")
    mlp = next(module for module in text.model.modules() if isinstance(module, GatedMlp))
    mlp.original.register_forward_hook(lambda module, given, output: 1.5 * output)
    with pytest.raises(EnvironmentProblem, match="'llama' models cannot be trained"):
        require_own_code(text, trained_parameters(text.model, "default"), examples())


def test_a_model_that_amplifies_rounding_without_bound_is_no_fault(tmp_path: Path) -> None:
    """Random weights so large that the model's own gradients change altogether with the last bit of its embeddings."""
    text = prepared(tmp_path, "llama", "bfloat16")
    with torch.no_grad():
        for name, parameter in text.model.named_parameters():
            if name.endswith("weight") and ".layers." in name and parameter.dim() == 2:
                parameter.mul_(20)
    found = require_own_code(text, trained_parameters(text.model, "default"), examples())
    assert found.gradient > ROUNDED and found.noise > ROUNDED / 2 and found.passed


def test_experts_chosen_differently_by_rounding_are_no_fault(tmp_path: Path) -> None:
    """In bf16 a token near the border goes to another expert, which changes the gradients of few tensors much."""
    text = prepared(tmp_path, "mixtral", "bfloat16")
    found = compare_with_own_code(text, trained_parameters(text.model, "default"), examples())
    assert found.passed and found.allowed == ROUNDED
    assert text.products == torch.bfloat16


def test_code_that_fails_with_pairs_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prepared(tmp_path, "llama")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(type(text.model.model), "forward", fails)
    with pytest.raises(EnvironmentProblem, match=r"'llama' models cannot be trained in torch.float32: .* dtype\)\. Nothing was"):
        compare_with_own_code(text, trained_parameters(text.model, "default"), examples())
