"""LoRA on a Stable Diffusion pipeline, the same pictures and settings, by Lorakeet or as diffusers' example script does it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakeet.config import read_run
from lorakeet.formats.detect import read_adapter
from lorakeet.kinds.images.assemble import assemble_images, image_task
from lorakeet.kinds.images.data.folder import read_album
from lorakeet.kinds.images.model.latent_cache import Captions, encode_images
from lorakeet.kinds.images.model.model import load_image_model, put_image_adapter
from lorakeet.kinds.images.task import denoising_errors
from lorakeet.memory.measure import peak_bytes
from lorakeet.train.optimizer import Optimizer

WARM = 2  # steps that are not timed
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {"lorakeet": with_lorakeet, "diffusers": with_diffusers, "judge": judge}[asked["who"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def with_lorakeet(asked: dict[str, Any]) -> dict[str, Any]:
    """`lorakeet finetune`'s own assembly and task; its step without metrics, checkpoints and evaluations. Encoding is timed."""
    from rich.console import Console

    began = time.perf_counter()
    setup = assemble_images(_config(asked), Console(quiet=True))
    task = image_task(setup)
    for picture in setup.train:
        setup.captions.of(picture.row.caption)
    setup.captions.of("")
    prepared = time.perf_counter() - began
    parameters, times = task.parameters(), []
    optimizer = Optimizer(parameters, setup.config.train)
    for step in range(asked["steps"]):
        began = time.perf_counter()
        batches = task.batches(step)
        task.gradients(batches, asked["batch"])
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step(asked["rate"])
        times.append(time.perf_counter() - began)
    peak = peak_bytes()
    folder = Path(asked["out"])
    folder.mkdir(parents=True)
    task.save(folder)
    return {"seconds": times[WARM:], "prepared": prepared, "peak": peak}


def with_diffusers(asked: dict[str, Any]) -> dict[str, Any]:
    """As its train_text_to_image_lora.py: pictures and captions are encoded in every step, the layers are PEFT's."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from PIL import Image

    dtype = getattr(torch, asked["dtype"])
    began = time.perf_counter()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(asked["model"], torch_dtype=dtype)
    unet, vae, encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    noises = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    for part in (unet, vae, encoder):
        part.requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=asked["rank"], lora_alpha=asked["alpha"], init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=asked["rate"], weight_decay=0.0)
    files = sorted(Path(asked["train"]).glob("*.png"))
    side = unet.config.sample_size * pipeline.vae_scale_factor
    prepared = time.perf_counter() - began
    order, times = np.random.default_rng(0), []
    for _ in range(asked["steps"]):
        began = time.perf_counter()
        some = [files[place] for place in order.integers(0, len(files), asked["batch"])]
        pixels = [np.asarray(Image.open(file).convert("RGB").resize((side, side)), np.float32) / 127.5 - 1 for file in some]
        texts = [file.with_suffix(".txt").read_text(encoding="utf-8") for file in some]
        ids = tokenizer(
            texts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(dtype)
        latents = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(0, len(noises), (len(some),))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            noisy = noises.add_noise(latents, noise, timesteps)
            predicted = unet(noisy, timesteps, encoder(ids, return_dict=False)[0], return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    peak = peak_bytes()
    layers = diffusers.utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    folder = Path(asked["out"])
    metadata = {"r": asked["rank"], "lora_alpha": asked["alpha"], "target_modules": TARGETS}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, safe_serialization=True, unet_lora_adapter_metadata=metadata
    )
    return {"seconds": times[WARM:], "prepared": prepared, "peak": peak}


def judge(asked: dict[str, Any]) -> dict[str, Any]:
    """The held-out denoising loss of each adapter (and of the base), at the same timesteps and noises."""
    config = _config(asked)
    model = load_image_model(config.model, say=lambda _: None)
    rows = encode_images(model, read_album(Path(asked["held_out"]), config.images).rows, config.images, say=print)
    captions = Captions(model, config.images, say=print)
    sums, counts = denoising_errors(model, rows, captions, config.diffusion)
    found = {"base": float(sums.sum() / counts.sum())}
    for name, path in asked["adapters"].items():
        put_image_adapter(model, read_adapter(Path(path)), name)
        sums, counts = denoising_errors(model, rows, captions, config.diffusion)
        found[name] = float(sums.sum() / counts.sum())
    return found


def _config(asked: dict[str, Any]) -> Any:
    given = {
        "kind": "image", "model.path": asked["model"], "model.dtype": asked["dtype"], "model.device": "cpu",
        "lora.rank": asked["rank"], "lora.alpha": asked["alpha"], "lora.target_modules": "attention",
        "data.train": asked["train"], "data.held_out": asked["held_out"], "images.smallest": 8, "images.cache": asked["cache"],
        "images.caption_dropout": 0, "train.steps": asked["steps"], "train.batch_size": asked["batch"],
        "diffusion.at_once": asked["batch"],
    }  # fmt: skip
    config = read_run(None, {key: str(value) for key, value in given.items()})
    return replace(config, data=replace(config.data, on_leak="keep"))


if __name__ == "__main__":
    main()
