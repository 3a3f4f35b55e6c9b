"""Every listed module is an adapter format, and `convert --to` offers each of them."""

from __future__ import annotations

from typing import get_args

import pytest

from lorakeet.formats.adapter_format import AdapterFormat
from lorakeet.formats.detect import FORMATS, format_of
from lorakeet.workflows.convert import Target


def test_the_names_are_the_choices_of_convert() -> None:
    assert sorted(one.NAME for one in FORMATS) == sorted(get_args(Target))


@pytest.mark.parametrize("module", FORMATS, ids=lambda one: str(one.NAME))
def test_a_format_is_a_folder_or_a_file(module: AdapterFormat) -> None:
    assert format_of(module.NAME) is module
    assert bool(module.WEIGHTS) != bool(module.SUFFIX)
    assert not module.owns("conv.weight")
