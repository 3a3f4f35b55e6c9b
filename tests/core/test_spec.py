"""LoraSpec: what it refuses, which blocks a text means, which value a pattern gives."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from lorakeet.core.spec import LoraSpec, layers_chosen, pattern_value
from lorakeet.errors import ConfigError


def test_the_defaults_are_fine() -> None:
    assert LoraSpec().validate() == []
    LoraSpec().check()
    assert (LoraSpec().rank, LoraSpec().alpha, LoraSpec().dropout) == (16, 32, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [("r", r"It is rank here: lk\.Lora\(rank=…\)"), ("lora_alpha", "It is alpha here"), ("rnak", "Did you mean 'rank'")],
)
def test_names_of_peft_are_explained(given: str, said: str) -> None:
    with pytest.raises(TypeError, match=rf"lk\.Lora has no argument '{given}'\. ?{said}.* It takes rank, alpha, dropout"):
        LoraSpec(**{given: 8})
    assert str(signature(LoraSpec)).startswith("(rank: ") and pickle.loads(pickle.dumps(LoraSpec(4))) == LoraSpec(rank=4)
    assert "`alpha` is 32" in (LoraSpec.__doc__ or "")


def test_every_setting_is_explained() -> None:
    assert all(field.metadata["help"].endswith(".") for field in fields(LoraSpec))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"lora\.rank is 0; it must be 1 or more"),
        ({"rank": -3}, r"lora\.rank is -3"),
        ({"alpha": 0.0}, r"lora\.alpha is 0; it must be above 0"),
        ({"dropout": 1.0}, r"lora\.dropout is 1; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, r"lora\.dropout is -0\.1"),
        ({"target_modules": ()}, r"lora\.target_modules is empty"),
        ({"start": "orthogonal", "rank": 5}, r"needs an even rank; lora\.rank is 5"),
        ({"rank_pattern": {"q_proj": 0}}, r"lora\.rank_pattern 'q_proj' is 0"),
        ({"alpha_pattern": {"(": 4.0}}, r"lora\.alpha_pattern '\(' is not a regular expression"),
        ({"layers": "0-"}, r"lora\.layers is '0-'; expected all, a range"),
        ({"layers": "0,3-1"}, r"lora\.layers has the range 3-1, which ends before it begins"),
        ({"layers": "top:0"}, r"lora\.layers is 'top:0'"),
        ({"layers": ""}, r"lora\.layers is ''"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSpec(**changes).check()


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError, match="3 problems") as error:
        LoraSpec(rank=0, alpha=-1.0, layers="x").check()
    assert all(name in str(error.value) for name in ("lora.rank", "lora.alpha", "lora.layers"))


def test_nothing_to_adapt_is_fine_where_something_else_is_trained() -> None:
    assert LoraSpec(target_modules=(), new_tokens=("<a>",)).validate() == []
    assert LoraSpec(target_modules=(), extra_modules=("score",)).validate() == []


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", {0, 1, 2, 3, 4, 5}), ("0-2", {0, 1, 2}), ("0,5", {0, 5}), ("1-2,4", {1, 2, 4}), (" 1 - 2 , 4 ", {1, 2, 4}),
        ("top:2", {4, 5}), ("top:9", {0, 1, 2, 3, 4, 5}), ("7", {7}), ("3-1", set()),
    ],
)  # fmt: skip
def test_layers_chosen(text: str, chosen: set[int]) -> None:
    assert layers_chosen(text, 6) == chosen


PATTERNS: dict[str, float] = {r"layers\.1\..*": 2.0, "q_proj": 4.0, "self_attn.v_proj": 6.0, "^model.lm_head": 8.0}


@pytest.mark.parametrize(
    "path",
    ["model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj", "q_proj", "my_q_proj", "model.layers.0.q_proj.x",
     "model.layers.0.self_attn.v_proj", "model.lm_head", "other.model.lm_head", "layers.11.q_proj"],
)  # fmt: skip
def test_patterns_mean_what_they_mean_in_peft(path: str) -> None:
    assert pattern_value(PATTERNS, path) == PATTERNS.get(get_pattern_key(PATTERNS, path))


def test_the_first_pattern_that_matches_wins() -> None:
    path = "model.layers.1.q_proj"
    assert pattern_value({"q_proj": 1.0, r"layers\.1\..*": 2.0}, path) == 1
    assert pattern_value({r"layers\.1\..*": 2.0, "q_proj": 1.0}, path) == 2
    assert pattern_value({}, path) is None


def test_torch_is_not_imported() -> None:
    code = "import sys, lorakeet.core.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
