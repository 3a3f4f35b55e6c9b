"""`verbs.early.studio_options`: what is missing is named with its remedy before the studio opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import PackageMissing
from lorakeet.verbs.early import studio_options
from lorakeet.verbs.options import StudioOptions


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = StudioOptions(runs=tmp_path / "runs", port=0)
    studio_options.require_studio(options)
    monkeypatch.setattr(studio_options, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(PackageMissing) as caught:
        studio_options.require_studio(options)
    assert caught.value.values == {"packages": ["uvicorn"]}
    assert caught.value.remedies[0].command == "pip install 'lorakeet[studio]'"
