"""Configurations of pipelines: shipped, of a folder, and what has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.models.image.kinds import PIPELINES
from lorakeet.models.image.shapes import published_images, published_shapes, shapes_in


def test_shipped_ones_are_whole_and_need_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(published_images()) >= 3
    for name in published_images():
        shapes = shapes_in(name.upper(), None, print)
        kind = PIPELINES[shapes["_class_name"]]
        assert shapes == published_shapes(name) and {kind.denoiser, "vae", "scheduler", "text_encoder"} <= set(shapes)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_those_of_a_folder(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{kind}_folder")
    shapes = shapes_in(str(folder), None, print)
    found = PIPELINES[shapes["_class_name"]]
    assert found.name == kind and shapes["vae"]["latent_channels"] == 4
    encoders = [name for name in shapes if name.startswith("text_encoder")]
    assert len(encoders) == {"sd": 1, "sdxl": 2, "sd3": 3, "flux": 2}[kind]
    assert any(shapes[name]["_class_name"] == "T5EncoderModel" for name in encoders) == found.flow


def test_what_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configurations of an image model[\s\S]*stable-diffusion-v1-5"):
        shapes_in(str(tmp_path), None, print)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with pytest.raises(ConfigError, match="is a KolorsPipeline; expected StableDiffusionPipeline"):
        shapes_in(str(tmp_path), None, print)
