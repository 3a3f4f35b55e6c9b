"""Records with the template's columns are classified as rows of training are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from api.conftest import Shared
from lorakeet.api.classify import classified
from lorakeet.errors import ConfigError, DataError


def test_columns_of_the_template(shared: Shared) -> None:
    spec = replace(shared.run.config.data, template="{name}: {text}")
    with shared.model.computing_with(shared.run.adapter) as text:
        by_record = classified(text, [{"name": "A", "text": "fern GOOD"}], spec, shared.run.labels, micro_tokens=256)
        by_text = classified(text, ["A: fern GOOD"], shared.run.config.data, shared.run.labels, micro_tokens=256)
        assert by_record == by_text
        with pytest.raises(DataError, match="no column 'name'"):
            classified(text, ["fern"], spec, shared.run.labels, micro_tokens=256)
        with pytest.raises(ConfigError, match="no labels; classify is for runs on labelled rows"):
            classified(text, ["fern"], spec, (), micro_tokens=256)
        assert classified(text, [], spec, shared.run.labels, micro_tokens=256) == []
