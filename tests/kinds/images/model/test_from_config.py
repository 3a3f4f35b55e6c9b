"""Image models from configurations alone: shipped, of a folder, and none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.kinds.images.model.from_config import image_model_from_config, shapes_of_images
from lorakeet.kinds.images.model.kinds import PIPELINES
from lorakeet.kinds.images.model.model import load_image_model
from lorakeet.kinds.images.model.shapes import published_images, published_shapes, shapes_in
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec

SD, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize(
    ("name", "unet", "encoders"),
    [(SD, 859_520_964, 123_060_480), (SDXL, 2_567_463_684, 123_060_480 + 694_659_840)],
)
def test_the_published_shapes_have_as_many_numbers_as_is_known(name: str, unet: int, encoders: int) -> None:
    with torch.device("meta"):
        model = image_model_from_config(shapes_of_images(ModelSpec(path=name), print), name=name, dtype=torch.bfloat16)
    counts = {part: sum(parameter.numel() for parameter in module.parameters()) for part, module in model.parts.items()}
    assert counts.pop("unet") == unet and sum(counts.values()) == encoders and name in published_images()
    assert model.denoiser.dtype == torch.bfloat16 and model.vae.dtype == torch.float32 and model.factor == 8


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_an_outline_has_the_parts_and_shapes_of_the_loaded_model(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{kind}_folder")
    spec = ModelSpec(path=str(folder), dtype="float32", device="cpu", quantize=QuantSpec(method="int8"))
    real = load_image_model(spec, say=lambda _: None)
    model = image_model_from_config(shapes_of_images(spec, print), name="x", dtype=torch.float32, quantize=spec.quantize)
    assert {name: tuple(tensor.shape) for name, tensor in model.parts.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in real.parts.state_dict().items()
    }
    ours, theirs = model.describe(["a"]), real.describe(["a"])
    assert ours.states.shape == theirs.states.shape and (ours.pooled is None) == (theirs.pooled is None)
    assert (model.resolution, model.factor, model.prediction) == (real.resolution, real.factor, real.prediction)


def test_betas_that_a_file_leaves_to_its_class_are_there(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """As in the loaded pipeline, whose class model_index.json names; an EDM one has none in either."""
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "sd"))
    index = json.loads((folder / "model_index.json").read_text())
    spec = ModelSpec(path=str(folder), dtype="float32", device="cpu")
    for said, name in (({"_class_name": "PNDMScheduler"}, "LCMScheduler"), ({}, "DDIMScheduler")):
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
        model = image_model_from_config(shapes_of_images(spec, print), name="x", dtype=torch.float32)
        real = load_image_model(spec, say=lambda _: None)
        assert torch.equal(model.noising.signal, real.noising.signal) and type(real.pipeline.scheduler).__name__ == name
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    with pytest.raises(ConfigError, match="EDMEulerScheduler, has no betas"):
        image_model_from_config(shapes_of_images(spec, print), name="x", dtype=torch.float32)


def test_what_has_no_configurations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configurations of an image model[\s\S]*stable-diffusion-v1-5"):
        shapes_of_images(ModelSpec(path=str(tmp_path)), print)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    for part in ("unet", "vae", "scheduler", "text_encoder"):
        (tmp_path / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (tmp_path / part / name).write_text("{}")
    with pytest.raises(ConfigError, match="is a KolorsPipeline; expected StableDiffusionPipeline"):
        shapes_of_images(ModelSpec(path=str(tmp_path)), print)


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
