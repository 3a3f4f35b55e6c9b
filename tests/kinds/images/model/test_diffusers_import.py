"""diffusers, imported on demand and quiet only for a while."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from lorakeet.errors import EnvironmentProblem
from lorakeet.kinds.images.model.diffusers_import import diffusers, new_denoiser, quiet_diffusers
from tiny.images import UNET


def test_it_is_quiet_for_a_block_and_then_as_before() -> None:
    logging = diffusers().utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_diffusers():
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_denoiser_of_a_configuration() -> None:
    with quiet_diffusers():
        model = new_denoiser({"_class_name": "UNet2DConditionModel", **UNET})
    assert type(model).__name__ == "UNet2DConditionModel" and model.config.sample_size == 8


def test_where_it_is_missing_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'lorakeet\[images\]'"):
        diffusers()
