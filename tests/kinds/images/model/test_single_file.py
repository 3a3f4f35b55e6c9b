"""Stable Diffusion in a single file: told apart by its tensors, loaded with local configurations, the same function."""

from __future__ import annotations

import gzip
import re
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.kinds.images.model.denoiser import load_denoiser
from lorakeet.kinds.images.model.diffusers_import import new_denoiser, quiet_diffusers
from lorakeet.kinds.images.model.from_config import shapes_of_images
from lorakeet.kinds.images.model.model import ImageModel, load_image_model
from lorakeet.kinds.images.model.noise import noising_of
from lorakeet.kinds.images.model.single_file import clip_vocabulary, load_single, open_single, single_denoiser_files
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from tiny.images import diffusers
from tiny.ldm import save_ldm
from tiny.originals import original_layout

MERGES = 49152 - 256 - 2


def spec_of(path: Path, config: Path | None = None, **changes: Any) -> ModelSpec:
    settings = {"path": str(path), "config": config and str(config), "dtype": "float32", "device": "cpu", **changes}
    return ModelSpec(**settings)


def load(path: Path, config: Path | None = None, **changes: Any) -> ImageModel:
    return load_image_model(spec_of(path, config, **changes), say=lambda _: None)


def prediction(model: ImageModel) -> torch.Tensor:
    noisy = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(noisy, torch.tensor([500]), model.describe(["ab"]), torch.tensor([[16.0, 16, 0, 0, 16, 16]]))


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pipeline's folder, and the same weights in one file."""
    folder: Path = request.getfixturevalue(f"tiny_{request.param}_folder")
    pipeline = diffusers().DiffusionPipeline.from_pretrained(folder)
    return folder, save_ldm(pipeline, tmp_path_factory.mktemp("single") / "model.safetensors")


def test_a_file_computes_what_its_folder_computes(pair: tuple[Path, Path]) -> None:
    folder, file = pair
    wanted, found = load(folder), load(file, folder)
    same = prediction(wanted)
    assert (prediction(found) - same).abs().max() < 1e-5 * same.abs().max() and same.abs().max() > 0.1
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = wanted.encode(pixels)
    assert (found.encode(pixels) - latents).abs().max() < 1e-5 * latents.abs().max()
    assert (found.decode(latents).int() - wanted.decode(latents).int()).abs().max() <= 1
    assert found.autoencoder_digest == wanted.autoencoder_digest
    assert (found.denoiser_digest, found.encoders_digest) == (wanted.denoiser_digest, wanted.encoders_digest)
    shapes, same = (shapes_of_images(spec, print) for spec in (spec_of(file, folder), spec_of(folder)))
    assert shapes == same


def test_its_unet_is_packed_from_the_file(pair: tuple[Path, Path]) -> None:
    folder, file = pair
    packed = QuantSpec(method="int8")
    wanted = prediction(load(folder, quantize=packed))
    assert (prediction(load(file, folder, quantize=packed)) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    single = open_single(spec_of(file, folder), print)
    assert single is not None
    files = single_denoiser_files(single)
    assert {tuple(source.tensors[name].shape) for source, name in files.tensors.values()} == {
        tuple(tensor.shape) for tensor in load(folder).denoiser.state_dict().values()
    }


def header(path: Path, width: int, *, metadata: dict[str, str] | None = None, **extra: torch.Tensor) -> Path:
    """A file whose header is that of a Stable Diffusion with texts of `width`."""
    names = ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "first_stage_model.x",
             "conditioner.embedders.1.model.x")  # fmt: skip
    save_file({**{name: torch.zeros(2, width) for name in names}, **extra}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("width", "metadata", "extra", "expected"),
    [
        (768, None, (), ("StableDiffusionPipeline", 64, "epsilon", None)),
        (1024, None, (), ("StableDiffusionPipeline", 96, "v_prediction", None)),
        (1024, {"modelspec.prediction_type": "epsilon"}, (), ("StableDiffusionPipeline", 96, "epsilon", None)),
        (2048, None, (), ("StableDiffusionXLPipeline", 128, "epsilon", None)),
        (2048, None, ("v_pred", "ztsnr"), ("StableDiffusionXLPipeline", 128, "v_prediction", True)),
    ],
)
def test_which_one_it_is(
    tmp_path: Path, width: int, metadata: dict[str, str] | None, extra: tuple[str, ...], expected: tuple[Any, ...]
) -> None:
    file = header(tmp_path / "x.safetensors", width, metadata=metadata, **{name: torch.zeros(0) for name in extra})
    said: list[str] = []
    single = open_single(spec_of(file), said.append)
    assert single is not None and single.config is None
    scheduler = single.shapes["scheduler"]
    found = (single.shapes["_class_name"], single.shapes["unet"]["sample_size"], scheduler["prediction_type"])
    assert (*found, scheduler.get("rescale_betas_zero_snr")) == expected
    assert ("model.config" in said[0]) == (width == 1024 and metadata is None)


@pytest.mark.parametrize("width", [1024, 2048])
def test_samples_of_a_model_that_ends_in_pure_noise_begin_at_pure_noise(tmp_path: Path, width: int) -> None:
    marks = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}
    single = open_single(spec_of(header(tmp_path / "x.safetensors", width, **marks)), lambda _: None)
    assert single is not None
    config = single.shapes["scheduler"]
    scheduler = getattr(diffusers(), config["_class_name"]).from_config(config)
    with quiet_diffusers():  # numpy warns of how it reads tensors
        scheduler.set_timesteps(30)
    assert int(scheduler.timesteps[0]) == 999 and noising_of(config, flow=False).signal[999] < 1e-6
    plain = open_single(spec_of(header(tmp_path / "y.safetensors", width, v_pred=torch.zeros(0))), lambda _: None)
    assert plain is not None and plain.shapes["scheduler"].get("timestep_spacing", "leading") == "leading"


def test_what_is_no_such_file(tmp_path: Path, tiny_sd_folder: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2)}, file)
    with pytest.raises(ConfigError, match=r"has no UNet and no autoencoder and no text encoder: .* begin with lora_unet_x"):
        open_single(spec_of(file), print)
    save_file({"conditioner.embedders.0.model.x": torch.zeros(2)}, file)
    with pytest.raises(ConfigError, match=r"is a single file of SDXL refiner.*or a hub id\.$"):
        open_single(spec_of(file), print)
    with pytest.raises(ConfigError, match="attends to texts of width 99"):
        open_single(spec_of(header(file, 99)), print)
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 9, 1, 1)}
    with pytest.raises(ConfigError, match="reads 9 channels"):
        open_single(spec_of(header(file, 768, **first)), print)
    (tmp_path / "x.ckpt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="pickled weights"):
        open_single(spec_of(tmp_path / "x.ckpt"), print)
    with pytest.raises(ConfigError, match=r"model\.config is for single files"):
        load(tiny_sd_folder, tiny_sd_folder)


@pytest.mark.parametrize("kind", ["SD3", "FLUX"])
def test_a_transformer_in_one_file_is_refused_with_the_commands_that_make_it_a_folder(
    kind: str, tmp_path: Path, tiny_sd3_folder: Path, tiny_flux_folder: Path
) -> None:
    """Those of SD3 are run here; diffusers reads files of FLUX at FLUX's own width only."""
    folder = tiny_sd3_folder if kind == "SD3" else tiny_flux_folder
    family: Any = kind.lower()
    state = diffusers().DiffusionPipeline.from_pretrained(folder).transformer.state_dict()
    found = original_layout(state, family)
    file = tmp_path / "x.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in found.items()}, file)
    with pytest.raises(ConfigError, match=f"is a single file of {kind}; .*hf download .* --local-dir PARTS") as refused:
        open_single(spec_of(file), print)
    code = re.search(r'python -c "(.*)"', str(refused.value))
    assert code is not None and str(file) in code[1]
    compile(code[1], "<command>", "exec")
    if kind == "SD3":
        exec(code[1].replace("'PARTS'", repr(str(folder))).replace("'FOLDER'", repr(str(tmp_path / "made"))), {})
        made = diffusers().DiffusionPipeline.from_pretrained(tmp_path / "made").transformer.state_dict()
        assert made.keys() == state.keys()
        assert all(torch.equal(made[name].bfloat16(), tensor.bfloat16()) for name, tensor in state.items())
        assert load(tmp_path / "made").kind.name == "sd3"


def test_a_tensor_that_is_missing_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = pair
    tensors = load_file(file)
    del tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"lacks 1 tensors .*, such as unet\.mid_block\.resnets\.0\.conv1\.weight \("):
        load(tmp_path / "x.safetensors", folder)


def vocabulary_package(folder: Path, merges: int = MERGES) -> None:
    """The package open_clip, with a vocabulary file of as many merges as CLIP's."""
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "__init__.py").write_text("raise AssertionError('is found, not imported')")
    letters = ByteLevel.alphabet()
    pairs = (f"{first} {second}</w>" for first in letters for second in letters if (first, second) != ("a", "b"))
    lines = ["#version", "a b</w>", *islice(pairs, merges - 1)]
    (folder / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join([*lines, "z z"]).encode()))


@pytest.mark.slow
def test_without_configurations_the_shipped_ones_and_a_packages_vocabulary_count(
    tiny_sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = diffusers().DiffusionPipeline.from_pretrained(tiny_sdxl_folder)
    file = save_ldm(pipeline, tmp_path / "model.safetensors")
    vocabulary_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = open_single(spec_of(file, tiny_sdxl_folder), print)
    assert given is not None
    shapes = {**given.shapes, "tokenizer": {"pad_token": "<|endoftext|>"}, "tokenizer_2": {"pad_token": "!"}}
    said: list[str] = []
    unet = partial(load_denoiser, single_denoiser_files(given), new_denoiser, torch.float32, QuantSpec())
    found = load_single(type(given)(given.file, shapes, None), torch.float32, unet, said.append)
    assert "vocabulary in the package open_clip_torch" in said[0] and type(found).__name__ == "StableDiffusionXLPipeline"
    for name, parameter in pipeline.unet.state_dict().items():
        assert torch.equal(found.unet.state_dict()[name], parameter)
    assert found.tokenizer("ab").input_ids == [49406, 512, 49407] and len(found.tokenizer) == 49408
    assert (found.tokenizer.pad_token, found.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    assert "open_clip" not in sys.modules


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    vocabulary_package(tmp_path, 10)
    with pytest.raises(DataError, match="has 11 merges"):
        clip_vocabulary(tmp_path / "open_clip" / "bpe_simple_vocab_16e6.txt.gz")


def test_without_any_tokenizer_the_message_says_how_to_give_one(tiny_sd_folder: Path, tmp_path: Path) -> None:
    pipeline = diffusers().DiffusionPipeline.from_pretrained(tiny_sd_folder)
    file = save_ldm(pipeline, tmp_path / "model.safetensors")
    given = open_single(spec_of(file, tiny_sd_folder), print)
    assert given is not None
    shapes = {**given.shapes, "tokenizer": {"pad_token": "<|endoftext|>"}}
    with pytest.raises(EnvironmentProblem, match=r"--model\.config DIR"):
        load_single(type(given)(given.file, shapes, None), torch.float32, nn.Identity, lambda _: None)
    with safe_open(file, "pt") as opened:
        assert "cond_stage_model.transformer.text_model.final_layer_norm.bias" in opened.keys()  # noqa: SIM118
