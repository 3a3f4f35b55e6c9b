"""The UNet of Stable Diffusion 1.5 with many adapters, by Lorakeet or by diffusers (PEFT): loading, switching, the next step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness.clock import milliseconds
from torch import nn

from contenders.image_step import SHAPES, random_unet
from lorakeet.core.spec import LoraSpec
from lorakeet.formats.components import with_components
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.diffusion import diffusers as diffusers_files
from lorakeet.kinds.images.model.kinds import KINDS
from lorakeet.kinds.images.model.model import ImageModel, image_plan, put_image_adapter
from lorakeet.models.inject import activate, adapter_of, eject, inject, trained_parameters

SHAPE = "SD 1.5"
FILES = 4  # different adapters on disk; more are loaded under other names
REPEATED = 5
PLACES = 8  # to a side of the latents


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    work: dict[str, Callable[[Path, Sequence[int]], dict[str, Any]]] = {
        "write": write, "lorakeet": with_lorakeet, "diffusers": with_diffusers,
    }  # fmt: skip
    found = work[asked["who"]](Path(asked["files"]), asked["counts"])
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def write(folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """Random adapters as diffusers writes them."""
    folder.mkdir()
    model = _model()
    plan = image_plan(model, LoraSpec(rank=16, alpha=16, target_modules=("attention",)), text_encoder=False)
    for number in range(FILES):
        inject(model.parts, plan, "made", seed=number)
        with torch.no_grad():
            for name, parameter in trained_parameters(model.parts, "made").items():
                if name.endswith(".B"):
                    parameter.normal_(0, 0.01)
        diffusers_files.write(with_components(adapter_of(model.parts, "made")), folder / f"{number}.safetensors")
        eject(model.parts, "made")
    return {"bytes": (folder / "0.safetensors").stat().st_size, "counts": list(counts)}


def with_lorakeet(folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    model = _model()

    def load(file: Path, name: str) -> None:
        put_image_adapter(model, read_adapter(file, say=lambda _: None), name)

    return _timed(model.denoiser, load, partial(activate, model.parts), partial(eject, model.parts), folder, counts)


def with_diffusers(folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """load_lora_adapter and set_adapters of the UNet, which the pipeline's load_lora_weights and set_adapters call."""
    unet = random_unet(SHAPES[SHAPE], torch.bfloat16)

    def load(file: Path, name: str) -> None:
        unet.load_lora_adapter(str(file.parent), weight_name=file.name, adapter_name=name, prefix="unet")
        unet.set_adapters(name)

    return _timed(unet, load, unet.set_adapters, unet.delete_adapters, folder, counts)


def _timed(
    unet: Any,
    load: Callable[[Path, str], None],
    use: Callable[[str], None],
    drop: Callable[[str], None],
    folder: Path,
    counts: Sequence[int],
) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    latents, states = torch.randn(1, 4, PLACES, PLACES).bfloat16(), torch.randn(1, 77, 768).bfloat16()

    def step() -> None:
        with torch.no_grad():
            unet(latents, torch.tensor([500]), encoder_hidden_states=states)

    found: dict[str, Any] = {}
    loaded = 0
    for count in counts:
        while loaded < count:
            load(files[loaded % len(files)], f"a{loaded}")
            loaded += 1
        step()
        times: dict[str, list[float]] = {"load_ms": [], "switch_ms": [], "step_ms": []}
        for number in range(REPEATED):
            times["load_ms"].append(milliseconds(partial(load, files[number % len(files)], f"x{number}")))
            for name in ("a0", f"a{count - 1}"):
                times["switch_ms"].append(milliseconds(partial(use, name)))
                times["step_ms"].append(milliseconds(step))
            drop(f"x{number}")
        found[str(count)] = times
    return found


def _model() -> ImageModel:
    unet = random_unet(SHAPES[SHAPE], torch.bfloat16)
    pipeline = SimpleNamespace(scheduler=None, vae=None, vae_scale_factor=8)
    return ImageModel(SHAPE, KINDS["sd"], pipeline, nn.ModuleDict({"unet": unet}), torch.device("cpu"), torch.bfloat16)


if __name__ == "__main__":
    main()
