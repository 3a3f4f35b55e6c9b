"""Families as data: every tested model has its own line, and its names are names of that model."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version
from transformers import AutoConfig

from lorakeet.models.families import FAMILIES, GENERIC, family_of, family_of_model
from lorakeet.models.modules import original_modules
from tiny.models import FAMILIES as TINY
from tiny.models import tiny_model


@pytest.mark.parametrize("name", TINY)
def test_the_names_of_a_family_are_in_its_model(name: str) -> None:
    model = tiny_model(name)
    family = family_of(model.config)
    assert family.name == name
    paths = [path for path, _ in original_modules(model)]
    assert family.blocks in paths
    inside = [path for path in paths if path.startswith(f"{family.blocks}.")]
    for leaf in (*family.attention, *family.fused):
        assert any(path.endswith(f".{leaf}") for path in inside), leaf


@pytest.mark.parametrize("model_type", [kind for family in FAMILIES for kind in family.model_types])
def test_configuration_keys_exist_in_transformers(model_type: str) -> None:
    config, family = AutoConfig.for_model(model_type), family_of(model_type)
    assert not family.logit_factor or hasattr(config, family.logit_factor)
    scaled = model_type in ("cohere", "cohere2", "cohere2_moe", "granite", "granitemoe", "granitemoeshared", "falcon_h1")
    keys = (family.logit_factor, family.logit_divisor)
    assert any(hasattr(config, key) for key in keys if key) == scaled
    assert hasattr(config, family.soft_cap) == (model_type in ("gemma2", "gemma3_text", "recurrent_gemma"))


def test_a_wrapper_whose_code_leaves_the_factor_out_has_none() -> None:
    aya = "" if Version(transformers.__version__) < Version("5.25") else "logit_scale"
    for kind, factor in (("aya_vision", aya), ("cohere2_vision", ""), ("cohere_compass", ""), ("cohere2", "logit_scale")):
        assert family_of_model(AutoConfig.for_model(kind)).logit_factor == factor


def test_no_model_type_stands_twice() -> None:
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(kinds) == len(set(kinds))


def test_unknown_models_are_generic() -> None:
    assert family_of("something_new") is GENERIC
    assert family_of(object()) is GENERIC
