"""Tiny pipelines of diffusers, loaded, adapted and asked for predictions."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.components import with_components
from lorakeet.kinds.images.model.denoiser import variant_in
from lorakeet.kinds.images.model.kinds import ENCODERS
from lorakeet.kinds.images.model.model import ImageModel, image_plan, load_image_model, put_image_adapter, stack, with_model_paths
from lorakeet.kinds.images.model.sample import Sampler, draw_latents
from lorakeet.models.inject import activate, adapter_of, eject, inject
from lorakeet.models.modules import find
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.spec import QuantSpec
from tiny.images import diffusers
from tiny.pipelines import save_tiny_sd


def load(folder: Path, **changes: object) -> ImageModel:
    spec = ModelSpec(**{"path": str(folder), "dtype": "float32", "device": "cpu", **changes})  # type: ignore[arg-type]
    return load_image_model(spec, say=lambda _: None)


@pytest.fixture(params=["sd", "sdxl", "sd3", "flux"])
def model(request: pytest.FixtureRequest) -> ImageModel:
    return load(request.getfixturevalue(f"tiny_{request.param}_folder"))


def lora(*targets: str, **changes: object) -> LoraSpec:
    return LoraSpec(**{"rank": 4, "alpha": 12.0, "target_modules": targets, **changes})  # type: ignore[arg-type]


def prediction(model: ImageModel, *captions: str) -> torch.Tensor:
    noisy = torch.randn((len(captions), 4, 8, 8), generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(captions))
    with torch.no_grad():
        return model.predict(noisy, torch.full((len(captions),), 500), model.describe(captions), sizes)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_numbers_are_those_that_diffusers_loads(request: pytest.FixtureRequest, name: str, dtype: str) -> None:
    folder = request.getfixturevalue(f"tiny_{name}_folder")
    model = load(folder, dtype=dtype)
    dtypes = {"default": getattr(torch, dtype), "vae": torch.float32}
    wanted = diffusers().DiffusionPipeline.from_pretrained(folder, dtype=dtypes)
    for part in (*model.parts, "vae"):
        found = dict(getattr(model.pipeline, part).state_dict())
        assert found.keys() == getattr(wanted, part).state_dict().keys()
        for key, tensor in getattr(wanted, part).state_dict().items():
            assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype, (part, key)
    held = [*model.denoiser.named_buffers(), *model.denoiser.named_parameters()]
    assert held and not any(tensor.is_meta for _, tensor in held)


def test_what_is_known_of_a_pipeline(model: ImageModel) -> None:
    flow, name = model.kind.flow, model.kind.name
    assert (model.resolution, model.factor, model.multiple) == (256 if name == "flux" else 16, 2, 4)
    assert model.prediction == ("flow" if flow else "epsilon")
    encoders = {"sd": 1, "sdxl": 2, "sd3": 3, "flux": 2}[name]
    assert list(model.parts) == ["transformer" if flow else "unet", *ENCODERS[:encoders]]
    assert len(model.noising) == 1000 and 0.99 < model.noising.signal[0] < 1 and model.noising.signal[-1] < 0.1
    assert not any(parameter.requires_grad for parameter in (*model.parts.parameters(), *model.vae.parameters()))
    assert model.cut_off(["ab", "a" * 20, "a" * 600]) == (["a" * 600] if flow else ["a" * 20, "a" * 600])
    told = model.describe(["ab", "cd"])
    assert told.states.shape[:2] == (2, {"sd": 12, "sdxl": 12, "sd3": 12 + 256, "flux": 512}[name])
    assert (told.pooled is None) == (name == "sd")
    one = model.describe(["ab"])
    assert torch.equal(stack([one, one]).states[1], one.states[0])


def test_latents_and_pictures_have_the_right_shapes_and_range(model: ImageModel) -> None:
    latents = model.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert latents.shape == (2, 4, 8, 12) and torch.isfinite(latents).all()
    pictures = model.decode(latents)
    assert pictures.shape == (2, 16, 24, 3) and pictures.dtype == torch.uint8


def test_sdxl_gets_zeros_for_the_empty_caption(tiny_sdxl_folder: Path, tiny_sd_folder: Path) -> None:
    told = load(tiny_sdxl_folder).describe(["", "ab"])
    assert told.pooled is not None and not told.states[0].any() and not told.pooled[0].any() and told.states[1].any()
    assert load(tiny_sd_folder).describe([""]).states.any()


@pytest.mark.parametrize("targets", [("attention",), ("attention", "mlp"), ("all-linear", "conv")])
def test_new_pairs_change_nothing_and_filled_ones_do(model: ImageModel, targets: tuple[str, ...]) -> None:
    if model.kind.name == "flux":
        targets = tuple(target for target in targets if target != "conv")  # it has no convolutions
    before = prediction(model, "ab", "cd")
    inject(model.parts, image_plan(model, lora(*targets), text_encoder=True), seed=1)
    assert torch.equal(prediction(model, "ab", "cd"), before) or (prediction(model, "ab", "cd") - before).abs().max() < 1e-5
    with torch.no_grad():
        for name, parameter in model.parts.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(0, 0.05)
    assert (prediction(model, "ab", "cd") - before).abs().max() > 1e-3
    activate(model.parts, None)
    assert torch.equal(prediction(model, "ab", "cd"), before)
    eject(model.parts)
    assert torch.equal(prediction(model, "ab", "cd"), before)


def test_the_presets_name_what_they_should(model: ImageModel) -> None:
    def paths(*targets: str, text_encoder: bool = False) -> list[str]:
        return [entry.path for entry in image_plan(model, lora(*targets), text_encoder=text_encoder).entries]

    attention = paths("attention")
    added = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    known = ("to_q", "to_k", "to_v", "to_out.0", *(added if model.kind.flow else ()))
    assert {path.partition(".attn")[2].partition(".")[2] for path in attention} == set(known)
    wanted = {"net.0.proj", "net.2"}
    mlp = {re.sub(r".*\.ff(_context)?\.", "", path) for path in paths("mlp")}
    assert mlp == (wanted | {"transformer.single_transformer_blocks.0.proj_mlp"} if model.kind.name == "flux" else wanted)
    if not model.kind.flow:
        convolutions = paths("conv")
        assert any(path.endswith("resnets.0.conv1") for path in convolutions)
        assert "unet.conv_in" not in convolutions and "unet.conv_out" not in convolutions
    encoders = [path for path in paths("attention", text_encoder=True) if path.startswith("text_encoder")]
    assert encoders and all(path.endswith("_proj") for path in encoders)
    clip = {"sd": 1, "sdxl": 2, "sd3": 2, "flux": 1}[model.kind.name]
    assert {path.partition(".")[0] for path in encoders} == set(ENCODERS[:clip])


def test_rank_patterns_and_layers(model: ImageModel) -> None:
    plan = image_plan(model, lora("attention", rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 20.0}), text_encoder=False)
    assert {(entry.rank, entry.alpha) for entry in plan.entries} == {(4, 12.0), (2, 12.0), (4, 20.0)}
    with pytest.raises(ConfigError, match="no single list of blocks"):
        image_plan(model, lora("attention", layers="top:1"), text_encoder=False)
    with pytest.raises(ConfigError, match="No module matches target 'to_g'"):
        image_plan(model, lora("to_g"), text_encoder=False)


def test_an_adapter_comes_back_through_the_names_of_disk(model: ImageModel) -> None:
    inject(model.parts, image_plan(model, lora("all-linear"), text_encoder=True), "first")
    with torch.no_grad():
        for name, parameter in model.parts.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(0, 0.05)
    wanted = prediction(model, "ab")
    on_disk = with_components(adapter_of(model.parts, "first"))
    assert any(path.startswith("text_encoder.text_model.encoder") for path in on_disk.pairs)
    assert all(find(model.parts, path) is not None for path in with_model_paths(model, on_disk).pairs)
    eject(model.parts)
    put_image_adapter(model, on_disk, "second")
    assert torch.equal(prediction(model, "ab"), wanted)


def test_an_adapter_of_another_model_is_refused(tiny_sd_folder: Path) -> None:
    model = load(tiny_sd_folder)
    pair = Adapter({"unet.down_blocks.7.attn.to_q": adapter_of_one(model)})
    with pytest.raises(ConfigError, match=r"does not fit|no such module|has no"):
        put_image_adapter(model, pair)


def adapter_of_one(model: ImageModel) -> object:
    inject(model.parts, image_plan(model, lora("to_q"), text_encoder=False), "one")
    return next(iter(adapter_of(model.parts, "one").pairs.values()))


def test_digests_tell_models_apart(tiny_sd_folder: Path, tiny_sdxl_folder: Path) -> None:
    first, second, again = load(tiny_sd_folder), load(tiny_sdxl_folder), load(tiny_sd_folder)
    assert first.encoders_digest == again.encoders_digest != second.encoders_digest
    assert first.autoencoder_digest == again.autoencoder_digest != second.autoencoder_digest
    inject(first.parts, image_plan(first, lora("attention"), text_encoder=True))
    del first.__dict__["encoders_digest"]
    assert first.encoders_digest == again.encoders_digest  # adapters are not part of the base


def test_what_cannot_be_loaded(tmp_path: Path, tiny_sd_folder: Path) -> None:
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"x")
    with pytest.raises(DataError, match="is not a whole safetensors file"):
        load(single)
    with pytest.raises(DataError, match=r"no model_index\.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(ConfigError, match="is a KolorsPipeline; expected StableDiffusionPipeline"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text((tiny_sd_folder / "model_index.json").read_text())
    with pytest.raises(DataError, match=r"unet/config\.json cannot be read: No such file"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.quantize is gguf"):
        load(tiny_sd_folder, quantize=QuantSpec(method="gguf"))


@pytest.mark.parametrize("content", ['[]', '{"sample_size": 8}', '{"_class_name": "NoSuchModel"}', '{"_class_name": 3}', "{"])
def test_a_configuration_that_names_no_model_is_one_message(content: str, tmp_path: Path, tiny_sd_folder: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_sd_folder, folder)
    (folder / "unet" / "config.json").write_text(content)
    said = r"JSON list; expected|is not JSON|_class_name (None|'NoSuchModel'|3); expected .*config\.json"
    with pytest.raises(DataError, match=said):
        load(folder)


def test_an_unknown_size_is_requested(tmp_path: Path, tiny_sd_folder: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_sd_folder, folder)
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": None}))
    model, whole = load(folder), load(tiny_sd_folder)
    with pytest.raises(ConfigError, match=r"sample_size in unet/config\.json .* is None.*images\.resolution \(generate: --size"):
        draw_latents(model, ["ab"], [1], Sampler(steps=1))
    sampler = Sampler(steps=1, size=(16, 16))
    assert torch.equal(draw_latents(model, ["ab"], [1], sampler), draw_latents(whole, ["ab"], [1], sampler))


@pytest.mark.parametrize("renamed", [("unet",), ("text_encoder", "vae"), ("unet", "vae", "text_encoder")])
def test_weights_of_a_variant_alone_are_read(renamed: tuple[str, ...], tmp_path: Path, tiny_sd_folder: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_sd_folder, folder)
    for part in renamed:
        [file] = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    said: list[str] = []
    model = load_image_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"), say=said.append)
    assert any("variant fp16 alone" in line for line in said)
    assert torch.equal(prediction(model, "ab"), prediction(load(tiny_sd_folder), "ab"))
    assert model.autoencoder_digest == load(tiny_sd_folder).autoencoder_digest
    for part in renamed:
        [file] = (folder / part).glob("*.safetensors")
        shutil.copy(file, file.with_name(file.name.replace("fp16", "ema")))
    with pytest.raises(DataError, match="the variants ema, fp16, and none without"):
        load(folder)


def test_shards_that_older_diffusers_numbered_before_the_variant_are_read(tmp_path: Path, tiny_sd_folder: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_sd_folder, folder)
    [file] = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    names = ["diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "diffusion_pytorch_model-00002-of-00002.fp16.safetensors"]
    places = {key: names[place % 2] for place, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key, where in places.items() if where == name}, folder / "unet" / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    file.unlink()
    assert variant_in(folder, ["unet"]) == "fp16"
    assert torch.equal(prediction(load(folder), "ab"), prediction(load(tiny_sd_folder), "ab"))


def test_a_packed_unet_predicts_nearly_the_same_and_trains(tiny_sdxl_folder: Path) -> None:
    dense = load(tiny_sdxl_folder)
    model = load(tiny_sdxl_folder, quantize=QuantSpec(method="int8"))
    wanted, found = prediction(dense, "ab"), prediction(model, "ab")
    assert 0 < (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    plan = image_plan(model, lora("all-linear", "conv"), text_encoder=False)
    assert plan == image_plan(dense, lora("all-linear", "conv"), text_encoder=False)
    inject(model.parts, plan, seed=1)
    assert (prediction(model, "ab") - found).abs().max() < 1e-5


def test_other_predictions(tmp_path: Path) -> None:
    assert load(save_tiny_sd(tmp_path / "v", prediction="v_prediction")).prediction == "v_prediction"
    with pytest.raises(ConfigError, match="predicts 'sample'"):
        load(save_tiny_sd(tmp_path / "x", prediction="sample"))


def on_device(model: ImageModel) -> set[str]:
    parts = {**dict(model.parts.items()), "vae": model.vae}
    return {name for name, part in parts.items() if not next(part.parameters()).is_meta}


def test_parts_are_spilled_while_others_compute(model: ImageModel) -> None:
    """Put aside to `meta`, where numbers are lost: what computes is there, and what does not is not."""
    denoiser, encoders = model.kind.denoiser, set(model.parts) - {model.kind.denoiser}
    staged = replace(model, idle_device=torch.device("meta"))
    assert on_device(model) == {denoiser, *encoders, "vae"}
    staged.stage()
    assert on_device(staged) == set()
    latents = staged.encode(torch.zeros(1, 3, 16, 16))
    assert on_device(staged) == {"vae"} and latents.shape == (1, 4, 8, 8)
    told = staged.describe(["ab"])
    assert on_device(staged) == encoders
    with torch.no_grad():
        staged.predict(latents, torch.tensor([500]), told, torch.tensor([[16.0, 16, 0, 0, 16, 16]]))
    assert on_device(staged) == {denoiser}
    drawn = draw_latents(staged, ["ab"], [1], Sampler(steps=1, guidance=1.0, size=(16, 16)))
    assert on_device(staged) == {denoiser, "vae"}
    staged.decode(drawn)
    assert on_device(staged) == {"vae"}
    staged.stage(denoiser, *encoders)
    inject(staged.parts, image_plan(staged, lora("attention"), text_encoder=True))
    staged.describe(["ab"])
    assert on_device(staged) == {denoiser, *encoders}, "what is trained together stays"


def test_of_a_hub_id_no_part_is_fetched_that_is_not_used(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def download(name: str, **given: object) -> str:
        asked.append({"name": name, **given})
        return str(tiny_sd_folder)

    pipelines = diffusers().DiffusionPipeline
    index = pipelines.load_config(tiny_sd_folder)
    monkeypatch.setattr(pipelines, "download", download)
    monkeypatch.setattr(pipelines, "load_config", lambda name, **_: index)
    model = load(Path("somebody/sd"), revision="main")
    [given] = asked
    assert given["name"] == "somebody/sd" and given["revision"] == "main" and given["use_safetensors"] is True
    assert "safety_checker" in given and given["safety_checker"] is None
    assert torch.equal(prediction(model, "ab"), prediction(load(tiny_sd_folder), "ab"))
