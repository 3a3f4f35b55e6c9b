"""A frozen latent diffusion model in diffusers' parts (Stable Diffusion 1.x, 2.x, SDXL): UNet, autoencoder, text encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.formats.sd_names import with_components
from lorakeet.models.families import DIFFUSION
from lorakeet.models.frozen import frozen_digests
from lorakeet.models.image_packed import METHODS, load_packed_denoiser
from lorakeet.models.inject import attach
from lorakeet.models.modules import find
from lorakeet.models.placement import device_for, dtype_for
from lorakeet.models.quiet import quiet_transformers
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for

PIPELINES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of n captions: states (n, tokens, width), and for SDXL the pooled vectors (n, width)."""

    states: Tensor
    pooled: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.states.to(device, dtype), pooled)


def stack(parts: Sequence[Conditioning]) -> Conditioning:
    """Several conditionings as one, in order."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class ImageModel:
    """The parts of a pipeline. `parts` holds what adapters can be put on: unet, text_encoder and, in SDXL, text_encoder_2.

    The autoencoder stays in fp32 whatever `dtype` is: SDXL's overflows in fp16, and it runs once for each picture only.
    """

    name: str
    kind: str  # sd or sdxl
    pipeline: Any
    parts: nn.ModuleDict
    device: torch.device
    dtype: torch.dtype

    @property
    def unet(self) -> Any:
        return self.parts["unet"]

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def prediction(self) -> str:
        """What the UNet predicts, as the scheduler says: epsilon or v_prediction."""
        return str(self.pipeline.scheduler.config.prediction_type)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of each training timestep (timesteps,), fp32 on the CPU: the share of the signal in a noisy latent."""
        scheduler = diffusers().DDPMScheduler.from_config(self.pipeline.scheduler.config)
        return cast(Tensor, scheduler.alphas_cumprod).float()

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the UNet was made for."""
        return int(self.unet.config.sample_size) * self.factor

    @property
    def factor(self) -> int:
        """Pixels to one side of a latent's place."""
        return int(self.pipeline.vae_scale_factor)

    @cached_property
    def autoencoder_digest(self) -> str:
        """SHA-256 over the autoencoder's numbers and scaling: latents are the same where it is."""
        config = self.vae.config
        return _digest(self.vae, f"{config.scaling_factor} {getattr(config, 'shift_factor', None)}")

    @cached_property
    def encoders_digest(self) -> str:
        """SHA-256 over the text encoders' numbers and tokenizers: embeddings are the same where it is."""
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in self._tokenizers()]
        encoders = nn.ModuleDict({name: part for name, part in self.parts.items() if name in ENCODERS})
        return _digest(encoders, repr(vocabularies))

    @cached_property
    def denoiser_digest(self) -> str:
        """SHA-256 over the UNet's frozen numbers: what the base draws is the same where it is."""
        return _digest(self.unet, self.prediction)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, height, width) in [−1, 1] to latents (n, channels, height/factor, width/factor), fp32.

        The mean of the autoencoder's distribution, not a sample of it: the same picture always has the same latent. One picture
        at a time, as in `decode`: at 1024² the autoencoder holds gigabytes for each.
        """
        with torch.no_grad():
            wide = pixels.to(self.device, torch.float32)
            mean = torch.cat([self.vae.encode(wide[place : place + 1]).latent_dist.mean for place in range(len(wide))])
        config = self.vae.config
        return cast(Tensor, (mean - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures (n, height, width, 3), uint8 on the CPU."""
        config = self.vae.config
        wide = latents.to(self.device, torch.float32) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        found = []
        with torch.no_grad():
            for part in wide.split(1):
                pixels = self.vae.decode(part, return_dict=False)[0]
                found.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return torch.cat(found).permute(0, 2, 3, 1).cpu()

    def describe(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of `captions`, with gradient where one is asked for; what is longer than CLIP's limit is cut off.

        SDXL was trained with zeros for the empty caption, and its pipeline says so.
        """
        with quiet_diffusers():
            found = self.pipeline.encode_prompt(
                list(captions), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        states, pooled = found[0], found[2] if self.kind == "sdxl" else None
        if pooled is not None and self.pipeline.config.force_zeros_for_empty_prompt and "" in captions:
            told = torch.tensor([float(caption != "") for caption in captions], device=states.device, dtype=states.dtype)
            states, pooled = states * told.view(-1, 1, 1), pooled * told.view(-1, 1)
        return Conditioning(states, pooled)

    def cut_off(self, captions: Sequence[str]) -> list[str]:
        """Those of `captions` that are longer than a tokenizer's limit."""
        limits = [(tokenizer, int(tokenizer.model_max_length)) for tokenizer in self._tokenizers()]
        with quiet_diffusers():
            return [text for text in captions if any(len(tokenizer(text).input_ids) > limit for tokenizer, limit in limits)]

    def predict(self, noisy: Tensor, timesteps: Tensor, told: Conditioning, sizes: Tensor) -> Tensor:
        """The UNet's prediction (n, channels, h, w), fp32, of `noisy` latents at `timesteps` (n,).

        sizes (n, 6): original height and width, top and left of the crop, target height and width, which SDXL is told.
        """
        told = told.to(self.device, self.dtype)
        added = None
        if self.kind == "sdxl":
            added = {"text_embeds": told.pooled, "time_ids": sizes.to(self.device, self.dtype)}
        found = self.unet(
            noisy.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=told.states,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return cast(Tensor, found.float())

    def _tokenizers(self) -> list[Any]:
        names = ("tokenizer", "tokenizer_2")
        return [tokenizer for name in names if (tokenizer := getattr(self.pipeline, name, None)) is not None]


def load_image_model(spec: ModelSpec, *, say: Callable[[str], None] = print) -> ImageModel:
    """The pipeline in the folder, or under the hub id, `spec.path`, frozen, on its device.

    ConfigError for what is no Stable Diffusion and for settings that it cannot have; EnvironmentProblem where diffusers or the
    files are missing.
    """
    for message in spec.validate():
        raise ConfigError(message)
    if spec.quantize.method not in ("none", *METHODS):
        raise ConfigError(f"model.quantize is {spec.quantize.method}; the layers of an image model can be {', '.join(METHODS)}.")
    if spec.quantize.int8_products:
        raise ConfigError("model.quantize.int8_products is for text models; leave it out where pictures are trained on.")
    device = device_for(spec.device)
    dtype = dtype_for(spec.dtype, device)
    kind, pipeline_class, extra = _class_of(spec)
    say(f"Loading {spec.path} ({pipeline_class}, {str(dtype).removeprefix('torch.')}) with diffusers.")
    with quiet_diffusers(), _as_problem(spec):
        if spec.quantize.method != "none":
            extra["unet"] = load_packed_denoiser(_folder_of(spec) / "unet", new_denoiser, dtype, spec.quantize, say=say)
        pipeline = getattr(diffusers(), pipeline_class).from_pretrained(
            spec.path, revision=spec.revision, torch_dtype=dtype, use_safetensors=True, **extra
        )
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.float()
    names = [name for name in ("unet", *ENCODERS) if getattr(pipeline, name, None) is not None]
    parts = nn.ModuleDict({name: getattr(pipeline, name) for name in names})
    for part in (pipeline.vae, parts):
        part.requires_grad_(False).eval()
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(f"{spec.path} predicts '{prediction}'; expected epsilon or v_prediction.")
    return ImageModel(spec.path, kind, pipeline, parts, device, dtype)


def new_denoiser(config: Mapping[str, Any]) -> Any:
    """The denoiser that the content of its config.json describes, on the current default device, its weights random."""
    return getattr(diffusers(), config["_class_name"]).from_config(dict(config))


def image_plan(model: ImageModel, spec: LoraSpec, *, text_encoder: bool) -> Plan:
    """What `spec` means for the UNet and, where asked for, for the text encoders.

    Besides module names: attention, mlp (the feed-forward layers), all-linear, and conv (all convolutions but the first and the
    last one). The last block of SDXL's first text encoder is left out: its output is not used. ConfigError with every problem.
    """
    if spec.layers != "all":
        raise ConfigError(f"lora.layers is '{spec.layers}', but a UNet has no single list of blocks; use lora.exclude_modules.")
    chosen = {name: part for name, part in model.parts.items() if name == "unet" or text_encoder}
    plan = plan_for(nn.ModuleDict(chosen), spec, DIFFUSION)
    return replace(plan, entries=tuple(entry for entry in plan.entries if not _unused(model, entry.path)))


def _unused(model: ImageModel, path: str) -> bool:
    """Whether the module at `path` is in the last block of SDXL's first text encoder: the states are taken before it."""
    if model.kind != "sdxl" or not path.startswith("text_encoder."):
        return False
    blocks = int(cast(Any, model.parts["text_encoder"]).config.num_hidden_layers)
    return f".layers.{blocks - 1}." in path


def put_image_adapter(model: ImageModel, adapter: Adapter, name: str = "default") -> None:
    """Puts a finished adapter of any format on the model under `name`, active; ConfigError where it does not fit."""
    attach(model.parts, fitted(model, adapter), name)


def fitted(model: ImageModel, adapter: Adapter) -> Adapter:
    """The adapter with the paths that its modules have in `model`: newer text encoders have no part `text_model`."""

    def own(path: str) -> str:
        shorter = path.replace(".text_model.", ".", 1)
        return shorter if find(model.parts, path) is None and find(model.parts, shorter) is not None else path

    full = with_components(adapter)
    return replace(full, pairs={own(path): pair for path, pair in full.pairs.items()})


def diffusers() -> Any:
    """The package diffusers. EnvironmentProblem where it is not installed."""
    with quiet_transformers():
        try:
            import diffusers as package
        except ImportError as error:
            raise EnvironmentProblem(
                f"Image models need diffusers, which is not installed ({error}). Install it: pip install 'lorakeet[images]'"
            ) from error
    return package


def _folder_of(spec: ModelSpec) -> Path:
    """The folder of the pipeline, fetched first where `spec.path` is a hub id."""
    path = Path(spec.path).expanduser()
    if path.is_dir():
        return path
    return Path(diffusers().DiffusionPipeline.download(spec.path, revision=spec.revision, use_safetensors=True))


def _class_of(spec: ModelSpec) -> tuple[str, str, dict[str, Any]]:
    """(kind, name of diffusers' class, further arguments of its loader)."""
    path = Path(spec.path).expanduser()
    if path.is_file():
        raise ConfigError(
            f"model.path {spec.path} is a single file; expected a folder in diffusers' layout (with model_index.json) or a hub "
            "id. diffusers' from_single_file(…).save_pretrained(FOLDER) makes one."
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise DataError(f"{path} has no model_index.json, so it is no pipeline of diffusers'; expected unet/, vae/, … in it.")
    with quiet_diffusers(), _as_problem(spec):
        index = diffusers().DiffusionPipeline.load_config(spec.path, revision=spec.revision)
    name = index.get("_class_name", "")
    if name not in PIPELINES:
        raise ConfigError(f"{spec.path} is a {name or 'pipeline without a name'}; expected {' or '.join(PIPELINES)}.")
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return PIPELINES[name], name, checker if PIPELINES[name] == "sd" else {}


@contextmanager
def _as_problem(spec: ModelSpec) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:  # what diffusers raises for files that lack or are broken
        raise EnvironmentProblem(
            f"model.path '{spec.path}' cannot be loaded: {error}. Expected a folder that diffusers saved, or a hub id that this "
            "machine can reach; pickled weights are not opened."
        ) from error


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silences what transformers and diffusers say besides errors; afterwards their settings are as they were."""
    logging = diffusers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _digest(module: nn.Module, note: str) -> str:
    found = hashlib.sha256(note.encode())
    for name, digest in sorted(frozen_digests(module).items()):
        found.update(f"\n{name} {digest}".encode())
    return found.hexdigest()
