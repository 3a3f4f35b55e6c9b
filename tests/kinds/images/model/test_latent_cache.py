"""What is encoded once is read again, and is encoded anew when anything that it depends on changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError, DataError
from lorakeet.kinds.images.data.folder import crop_to_cover, open_pixels, read_album
from lorakeet.kinds.images.model.latent_cache import Captions, Sizes, as_pixels, encode_images
from lorakeet.kinds.images.model.model import ImageModel, load_image_model
from lorakeet.kinds.images.spec import ImageSpec
from lorakeet.models.spec import ModelSpec
from tiny.pictures import album, drawn


@pytest.fixture
def model(tiny_sd_folder: Path) -> ImageModel:
    return load_image_model(ModelSpec(path=str(tiny_sd_folder), dtype="float32", device="cpu"), say=lambda _: None)


@pytest.fixture
def spec(tmp_path: Path) -> ImageSpec:
    return ImageSpec(cache=str(tmp_path / "cache"), flip=True, crops=2)


def rows(tmp_path: Path, count: int = 3, size: tuple[int, int] = (32, 32)) -> tuple:  # type: ignore[type-arg]
    return read_album(album(tmp_path / f"photos-{size[0]}x{size[1]}", count, size=size), ImageSpec()).rows


def test_variants_are_crops_and_mirrors(tmp_path: Path, model: ImageModel, spec: ImageSpec) -> None:
    found = encode_images(model, rows(tmp_path, size=(32, 48)), spec, say=print)
    assert [tuple(one.latents.shape) for one in found] == [(4, 4, 6, 10)] * 3  # 12 × 20 pixels of at most 16²
    assert found[0].sizes[:, :2].tolist() == [[32, 48]] * 4 and found[0].sizes[0, 4:].tolist() == [12, 20]
    plain = encode_images(model, rows(tmp_path, 1, size=(32, 32)), spec, say=print)[0]
    small = torch.flip(as_pixels([drawn(0)[0]]), (3,))
    mirrored = torch.nn.functional.avg_pool2d(small, 2)
    assert torch.nn.functional.cosine_similarity(model.encode(mirrored).flatten(), plain.latents[1].flatten(), dim=0) > 0.9


@pytest.mark.parametrize(("size", "scaled"), [((32, 128), (16, 64)), ((17, 20), (16, 19)), ((48, 33), (23, 16))])
def test_sdxl_gets_the_crop_of_the_mirrored_picture(
    tmp_path: Path, model: ImageModel, spec: ImageSpec, size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    squares = replace(spec, crops=4, buckets=False, smallest=8)
    [row] = read_album(album(tmp_path / "photos", 1, size=size), squares).rows
    [found] = encode_images(model, [row], squares, say=print)
    whole, _ = crop_to_cover(open_pixels(row.path)[0], scaled)
    for variant, told in enumerate(found.sizes.int().tolist()):
        side = whole[:, ::-1] if variant % 2 else whole
        piece = side[told[2] : told[2] + 16, told[3] : told[3] + 16].copy()
        assert torch.allclose(found.latents[variant], model.encode(as_pixels([piece]))[0], atol=1e-5)
    assert (found.sizes[::2, 3] != found.sizes[1::2, 3]).any() == (scaled[1] > 16)


def test_the_cache_is_used_and_depends_on_everything(tmp_path: Path, model: ImageModel, spec: ImageSpec) -> None:
    pictures = rows(tmp_path)
    first = encode_images(model, pictures, spec, say=print)
    for picture in pictures:
        picture.path.write_bytes(b"gone")
    again = encode_images(model, pictures, spec, say=print)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(first, again, strict=True))
    with pytest.raises(DataError, match="could be read when the run started"):
        encode_images(model, pictures, replace(spec, flip=False), say=print)
    with torch.no_grad():
        model.vae.encoder.conv_in.weight.mul_(2)
    del model.__dict__["autoencoder_digest"]
    with pytest.raises(DataError, match="could be read when the run started"):
        encode_images(model, pictures, spec, say=print)


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path: Path, model: ImageModel, spec: ImageSpec) -> None:
    pictures = rows(tmp_path, 1)
    first = encode_images(model, pictures, spec, say=print)
    [file] = (tmp_path / "cache" / "latents").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    said: list[str] = []
    again = encode_images(model, pictures, spec, say=said.append)
    assert "is made again" in said[0] and torch.equal(first[0].latents, again[0].latents)


def test_captions_are_described_once(model: ImageModel, spec: ImageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Captions(model, spec, say=print).of("red box")
    assert torch.equal(first.states, model.describe(["red box"]).states)
    monkeypatch.setattr(type(model), "describe", None)
    assert torch.equal(Captions(model, spec, say=print).of("red box").states, first.states)


def test_the_empty_caption_of_sdxl_is_kept_apart(tiny_sdxl_folder: Path, spec: ImageSpec, tmp_path: Path) -> None:
    """Zeros or not is a word of the pipeline's configuration; the encoders' numbers are the same."""
    other = tmp_path / "other"
    shutil.copytree(tiny_sdxl_folder, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    zeros, read = (
        Captions(load_image_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=print), spec, say=print)
        for folder in (tiny_sdxl_folder, other)
    )
    assert not zeros.of("").states.any() and read.of("").states.any()


def test_sizes_fit_the_model(model: ImageModel) -> None:
    assert Sizes.of(model, ImageSpec(buckets=False)).allowed == [(16, 16)]
    assert all(height % 4 == 0 and width % 4 == 0 for height, width in Sizes.of(model, ImageSpec(resolution=32)).allowed)
    with pytest.raises(ConfigError, match=r"images\.resolution is 18.*multiple of 4"):
        Sizes.of(model, ImageSpec(resolution=18))
    with pytest.raises(ConfigError, match=r"images\.bucket_step is 32.*at most 16×16 pixels.*Lower it to at most 16"):
        Sizes.of(model, ImageSpec(bucket_step=32))
    assert Sizes.of(model, ImageSpec(bucket_step=16)).allowed == [(16, 16)]
    assert Sizes.of(model, ImageSpec(bucket_step=32, buckets=False)).allowed == [(16, 16)]
