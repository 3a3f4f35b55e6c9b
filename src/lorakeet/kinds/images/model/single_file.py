"""Stable Diffusion in a single file with the tensor names of Stability's own code (LDM): its version and configuration.

    model.diffusion_model.…   UNet      first_stage_model.…   autoencoder
    cond_stage_model.…        text encoder of SD 1.x and 2.x      conditioner.embedders.{0,1}.…   those of SDXL

diffusers' `from_single_file` reads the weights. It would fetch configurations and tokenizer from a hub; here they come from
`model.config`, or ship with Lorakeet, with CLIP's tokenizer from an installed package or the hub.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.formats.files.safetensors_file import SafeFile, open_safetensors
from lorakeet.kinds.images.model.denoiser import DenoiserFiles
from lorakeet.kinds.images.model.diffusers_import import diffusers, new_denoiser, quiet_diffusers
from lorakeet.kinds.images.model.shapes import Shapes, published_shapes, shapes_in
from lorakeet.models.files.foreign_code import no_foreign_code, read_native
from lorakeet.models.spec import ModelSpec

SD1, SD2 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_BY_CONTEXT = {768: SD1, 1024: SD2, 2048: SDXL}  # width of the text that the UNet attends to
_UNET = "model.diffusion_model."
_FIRST = f"{_UNET}input_blocks.0.0.weight"
_OTHERS = {"joint_blocks.0.": "SD3", "double_blocks.0.": "FLUX", "conditioner.embedders.0.model.": "SDXL refiner"}
_TRANSFORMERS = {  # hub id of a pipeline, its class, and that of its transformer
    "SD3": ("stabilityai/stable-diffusion-3-medium-diffusers", "StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "FLUX": ("black-forest-labs/FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel"),
}
_VOCABULARIES = {"open_clip": "open_clip_torch", "clip": "openai-clip"}  # packages with CLIP's vocabulary, by module
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # of the file's lines after the first
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LIBRARY = {"text_encoder": "transformers", "text_encoder_2": "transformers"}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint with a checked header, and the configurations of its parts; `config` is the value of `model.config`."""

    file: SafeFile
    shapes: Shapes
    config: str | None


def open_single(spec: ModelSpec, say: Callable[[str], None]) -> SingleFile | None:
    """Returns the single file `spec.path`, or None if it is not one. ConfigError or DataError if it cannot be used."""
    path = Path(spec.path).expanduser()
    if not path.is_file():
        if spec.config:
            raise ConfigError(f"model.config is for single files, but model.path '{spec.path}' is none; leave it out.")
        return None
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ConfigError(f"{path} holds pickled weights, which can run code when they are opened; expected .safetensors.")
    file = open_safetensors(path)
    _check_parts(file)
    if spec.config:
        return SingleFile(file, shapes_in(spec.config, spec.revision, say), spec.config)
    name = _published(file)
    shapes, why = _with_prediction(published_shapes(name), file)
    say(f"{path.name} has the shape of {name}, whose configurations come with Lorakeet; it predicts {why}.")
    return SingleFile(file, shapes, None)


def load_single(single: SingleFile, dtype: torch.dtype, unet: Callable[[], nn.Module], say: Callable[[str], None]) -> Any:
    """Loads the pipeline of the file with diffusers' `from_single_file`, but with the UNet of `unet`.

    The autoencoder is in fp32, whatever `dtype` is. Raises DataError if the file lacks a tensor, EnvironmentProblem if there is
    no tokenizer.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    given: dict[str, Any] = {}
    owner = getattr(diffusers(), single.shapes["_class_name"])
    if single.shapes["_class_name"] == "StableDiffusionPipeline":
        given |= {"safety_checker": None, "feature_extractor": None}
    _check_tensors(single)
    with TemporaryDirectory(prefix="lorakeet-") as folder:
        config = single.config
        if config is None:
            given |= {name: _tokenizer(single.shapes, name, say) for name in _tokenizer_names(single.shapes)}
            config = _write_configurations(single.shapes, Path(folder))
        try:
            with quiet_diffusers(), no_foreign_code(config):
                given["unet"] = unet()
                pipeline = owner.from_single_file(str(single.file.path), config=config, torch_dtype=torch.float32, **given)
        except SingleFileComponentError as error:
            raise DataError(f"{single.file.path} cannot be read as a {single.shapes['_class_name']}: {error}") from error
    encoders = [getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2") if name in single.shapes]
    _refuse_lost(single, [name for part in encoders for name, tensor in part.state_dict().items() if tensor.is_meta])
    for part in encoders:
        part.to(dtype)
    return pipeline


def single_denoiser_files(single: SingleFile) -> DenoiserFiles:
    """Returns the UNet's tensors in the file, by diffusers' names; reads none."""
    from diffusers.loaders import single_file_utils

    convert: Any = single_file_utils.convert_ldm_unet_checkpoint
    names = {name: name for name in single.file.tensors if name.startswith(_UNET)}
    with quiet_diffusers():
        found = convert(names, dict(single.shapes["unet"]))  # moves values, whatever they are
    tensors = {name: (single.file, stored) for name, stored in found.items() if stored is not None}
    return DenoiserFiles(single.file.path, single.shapes["unet"], tensors)


def _check_parts(file: SafeFile) -> None:
    """Raises ConfigError unless `file` is a whole Stable Diffusion with LDM's names."""
    names = list(file.tensors)
    for mark, kind in _OTHERS.items():
        if any(name.removeprefix(_UNET).startswith(mark) for name in names):
            raise ConfigError(
                f"{file.path} is a single file of {kind}; single files are read of Stable Diffusion 1.x, 2.x and SDXL. Name a "
                f"folder in diffusers' layout (with model_index.json) or a hub id.{_made_a_folder(file, kind)}"
            )
    wanted = {"UNet": (_UNET,), "autoencoder": ("first_stage_model.",), "text encoder": ("cond_stage_model.", "conditioner.")}
    missing = [part for part, heads in wanted.items() if not any(name.startswith(heads) for name in names)]
    if missing:
        begins = ", ".join(sorted({name.partition(".")[0] for name in names})[:6]) or "nothing"
        raise ConfigError(
            f"{file.path} has no {' and no '.join(missing)}: its tensors begin with {begins}. Expected a whole checkpoint of "
            f"Stable Diffusion ({_UNET}…, first_stage_model.…, cond_stage_model.… or conditioner.…). Adapters go with --adapter."
        )
    channels = file.tensors[_FIRST].shape[1] if _FIRST in file.tensors else 4
    if channels != 4:
        raise ConfigError(f"{file.path} is an inpainting or editing model: its UNet reads {channels} channels; expected 4.")


def _made_a_folder(file: SafeFile, kind: str) -> str:
    """Returns the commands that convert a file of SD3 or FLUX, whose q, k and v are one matrix, to a folder; empty for others."""
    if kind not in _TRANSFORMERS:
        return ""
    hub, pipeline, transformer = _TRANSFORMERS[kind]
    code = (
        f"import torch, diffusers as d; t = d.{transformer}.from_single_file('{file.path}', config='PARTS', "
        f"subfolder='transformer', dtype=torch.bfloat16); d.{pipeline}.from_pretrained('PARTS', transformer=t, "
        "dtype=torch.bfloat16).save_pretrained('FOLDER')"
    )
    return (
        f" To make one: hf download {hub} --include model_index.json --include '*/*' --exclude 'transformer/*.safetensors' "
        f'--local-dir PARTS, and then: python -c "{code}"'
    )


def _published(file: SafeFile) -> str:
    """Returns the hub id of the published pipeline with the shape of the file's UNet; ConfigError if there is none."""
    marks = (name for name in file.tensors if name.startswith(_UNET) and name.endswith("attn2.to_k.weight"))
    width = next((file.tensors[name].shape[1] for name in marks), 0)
    if width not in _BY_CONTEXT:
        raise ConfigError(
            f"{file.path} has a UNet that attends to texts of width {width}; known are {', '.join(map(str, _BY_CONTEXT))} "
            "(SD 1.x, 2.x, SDXL). Name the folder of its configurations in diffusers' layout with model.config."
        )
    return _BY_CONTEXT[width]


def _with_prediction(shapes: dict[str, Any], file: SafeFile) -> tuple[Shapes, str]:
    """Returns `shapes` with the prediction type of the file, and a description of it.

    The file says it by the header's key `modelspec.prediction_type` (Stability's ModelSpec), or by an empty tensor v_pred, and by
    ztsnr for a schedule that ends in pure noise (fine-tunes of SDXL). Sampling then starts at that noise, with the spacing
    "trailing" (arXiv 2305.08891, and diffusers' documentation); "leading" would start at a step that still has signal.
    """
    scheduler = dict(shapes["scheduler"])
    stated = file.metadata.get("modelspec.prediction_type", "")
    if "v_pred" in file.tensors or stated.startswith("v"):
        scheduler["prediction_type"] = "v_prediction"
    elif stated.startswith("eps"):
        scheduler["prediction_type"] = "epsilon"
    else:
        note = "" if shapes["_class_name"].endswith("XLPipeline") or scheduler["prediction_type"] == "epsilon" else (
            "; a -base model, which predicts epsilon at 512 pixels, needs model.config"
        )  # fmt: skip
        return shapes, f"{scheduler['prediction_type']} as that one does{note}"
    if "ztsnr" in file.tensors:
        name = scheduler["_class_name"]
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        scheduler["_class_name"] = "DDIMScheduler" if name == "PNDMScheduler" else name
    return {**shapes, "scheduler": scheduler}, f"{scheduler['prediction_type']}, as the file says"


def _write_configurations(shapes: Shapes, folder: Path) -> str:
    """Writes `shapes` as a pipeline's folder without weights, for `from_single_file`."""
    names = _tokenizer_names(shapes)
    index: dict[str, Any] = {"_class_name": shapes["_class_name"], **{name: ["transformers", "CLIPTokenizer"] for name in names}}
    for part, config in shapes.items():
        if isinstance(config, Mapping) and "_class_name" in config:
            index[part] = [_LIBRARY.get(part, "diffusers"), config["_class_name"]]
            (folder / part).mkdir()
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / name).write_text(json.dumps(config), encoding="utf-8")
    if "text_encoder_2" not in shapes:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return str(folder)


def _check_tensors(single: SingleFile) -> None:
    """Raises DataError for tensors of UNet and autoencoder that the file lacks or has in another shape, before reading any."""
    from diffusers.loaders import single_file_utils

    convert: Any = single_file_utils.convert_ldm_vae_checkpoint
    stored = {name: torch.empty(one.shape, device="meta") for name, one in single.file.tensors.items()}
    with quiet_diffusers():
        vae = {name: tuple(one.shape) for name, one in convert(stored, dict(single.shapes["vae"])).items()}
    unet = {name: file.tensors[there].shape for name, (file, there) in single_denoiser_files(single).tensors.items()}
    lost = []
    for part, found in (("unet", unet), ("vae", vae)):
        with torch.device("meta"), quiet_diffusers():
            wanted = new_denoiser({"_class_name": "AutoencoderKL", **single.shapes[part]}).state_dict()
        lost += [f"{part}.{name} {tuple(one.shape)}" for name, one in wanted.items() if found.get(name) != tuple(one.shape)]
    _refuse_lost(single, lost)


def _refuse_lost(single: SingleFile, lost: list[str]) -> None:
    if lost:
        raise DataError(
            f"{single.file.path} lacks {len(lost)} tensors of its pipeline, or has them in another shape, such as "
            f"{', '.join(lost[:3])}. Fetch it again, or name the configurations of a model of another shape with model.config."
        )


def _tokenizer_names(shapes: Shapes) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in ("text_encoder", "text_encoder_2") if name in shapes]


def _tokenizer(shapes: Shapes, name: str, say: Callable[[str], None]) -> Any:
    """Returns CLIP's tokenizer, from an installed package with its vocabulary, or from the hub or its cache."""
    from transformers import CLIPTokenizer

    pad = shapes[name]["pad_token"]
    for module, package in _VOCABULARIES.items():
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (path := Path(folder) / _VOCABULARY).is_file():
                vocabulary, merges = clip_vocabulary(path)
                say(f"{name}: CLIP's vocabulary in the package {package}.")
                return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)
    hub = SDXL if "text_encoder_2" in shapes else SD2 if pad == "!" else SD1
    say(f"Fetching the tokenizer of {hub} from the model hub.")
    try:
        found = read_native(CLIPTokenizer, hub, subfolder=name)
        if len(found) < _MERGES:  # without files, transformers returns an empty one
            raise OSError(f"the tokenizer that was found has {len(found)} tokens")
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"A single file has no tokenizer, and CLIP's is not on this machine nor can it be fetched: {error}. Give a folder "
            "with the pipeline's configurations and tokenizer (no weights: hf download "
            f"{hub} --include '*.json' --include '*.txt' --local-dir DIR) as --model.config DIR, or install the vocabulary: "
            "pip install --no-deps open_clip_torch"
        ) from error
    return found


def clip_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns CLIP's tokens with their ids, and its merges in order, from OpenAI's file; DataError for another file."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read as CLIP's vocabulary: {error}. Install its package again.") from error
    merges = [(parts[0], parts[1]) for line in lines if len(parts := line.split()) == 2]
    if len(merges) != _MERGES:
        raise DataError(f"{path} has {len(merges)} merges; CLIP's vocabulary has {_MERGES}. Install its package again.")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), _START, _END]
    return {token: number for number, token in enumerate(tokens)}, merges
