"""GGUF adapters are read as llama.cpp itself reads them, or refused; what is written for it computes there what PEFT computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakeet.errors import LorakeetError
from lorakeet.formats import gguf
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.files.base_model import BaseModel
from tiny.dense import fold_into
from tiny.fuzz import case_folder, fuzzed
from tiny.gguf_file import write_tiny_gguf
from tiny.llama_cpp import OpenModel
from tiny.peft_oracle import into_peft
from tiny.shared_weights import Shared

IDS = [1, 5, 9, 33, 60, 7, 90, 12]
LEAVES = (*(f"self_attn.{side}_proj" for side in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.{block}.{leaf}" for block in (0, 1) for leaf in LEAVES]
GGUF_NAMES = dict(zip(LEAVES, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True))


@cache
def _kept() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@cache
def stored() -> tuple[Path, Any]:
    """A tiny Llama as .gguf, and the same model in transformers' classes."""
    path = Path(_kept().name) / "base.gguf"
    return path, write_tiny_gguf(path)


@cache
def shared() -> Shared:
    return Shared(stored()[1])


@pytest.fixture(scope="module")
def llama() -> Iterator[OpenModel]:
    with OpenModel(stored()[0]) as opened:
        yield opened


def base() -> BaseModel:
    return BaseModel(Path("tiny"), {"": stored()[1].config.to_dict()})


ROUNDED = {"": 1e-4, "BF16": 0.05, "Q8_0": 0.2}  # of the adapter's effect: llama.cpp rounds activations to the type of the weight


@cache
def plain() -> torch.Tensor:
    """The logits without an adapter."""
    with torch.no_grad():
        return stored()[1](torch.tensor([IDS])).logits[0, -1]


def computed(adapter: Any) -> torch.Tensor:
    """The last token's logits of the model into which the adapter is folded."""
    with torch.no_grad():
        return fold_into(shared().copy(), adapter)(torch.tensor([IDS])).logits[0, -1]


@st.composite
def files(draw: Any) -> dict[str, Any]:
    """A GGUF adapter as another program may write one."""
    return {
        "paths": draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=4, unique=True)),
        "ranks": draw(st.lists(st.integers(1, 4), min_size=4, max_size=4)),
        "alpha": draw(st.sampled_from([None, 0.0, 4.0, 8.0, 0.5, -3.0])),
        "dtype": draw(st.sampled_from([np.float32, np.float32, np.float16])),
        "packed": draw(st.sampled_from([""] * 6 + ["BF16", "Q8_0"])),
        "oddity": draw(st.sampled_from([""] * 9 + [
            "no a", "no b", "other rank", "unknown tensor", "norm", "no type", "model", "no adapter type", "lokr", "other base",
            "bias", "embedding", "head", "block 9",
        ])),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def name_of(path: str) -> str:
    _, _, block, leaf = path.split(".", 3)
    return f"blk.{block}.{GGUF_NAMES[leaf]}.weight"


def rows_as_stored(path: str, B: np.ndarray) -> np.ndarray:
    """llama.cpp rotates neighbours where transformers rotates halves, so that rows of q and k stand in another order."""
    config = stored()[1].config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.rpartition(".")[2])
    if heads is None:
        return B
    return np.ascontiguousarray(B.reshape(heads, 2, B.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(B.shape))


def write_file(case: dict[str, Any], file: Path) -> None:
    import gguf as package

    draw, oddity = np.random.default_rng(case["seed"]), case["oddity"]
    writer = package.GGUFWriter(str(file), "qwen2" if oddity == "other base" else "llama")
    if oddity != "no type":
        writer.add_type("model" if oddity == "model" else package.GGUFType.ADAPTER)
    if oddity != "no adapter type":
        writer.add_string(package.Keys.Adapter.TYPE, "lokr" if oddity == "lokr" else "lora")
    if case["alpha"] is not None:
        writer.add_float32(package.Keys.Adapter.LORA_ALPHA, case["alpha"])
    tensors: dict[str, np.ndarray] = {}
    for number, path in enumerate(case["paths"]):
        out, width = stored()[1].get_submodule(path).weight.shape
        rank = 32 if case["packed"] == "Q8_0" else case["ranks"][number]
        tensors[f"{name_of(path)}.lora_a"] = draw.standard_normal((rank, width)) * 0.2
        tensors[f"{name_of(path)}.lora_b"] = rows_as_stored(path, draw.standard_normal((out, rank)) * 0.2)
    make_odd(tensors, case, draw)
    for name, tensor in tensors.items():
        values = np.ascontiguousarray(tensor.astype(case["dtype"]))
        if case["packed"] and values.shape[-1] % 32 == 0:
            kind = package.GGMLQuantizationType[case["packed"]]
            writer.add_tensor(name, package.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_odd(tensors: dict[str, np.ndarray], case: dict[str, Any], draw: Any) -> None:
    first, oddity = name_of(case["paths"][0]), case["oddity"]
    if oddity in ("no a", "no b"):
        del tensors[f"{first}.lora_{oddity[-1]}"]
    elif oddity == "other rank":
        tensors[f"{first}.lora_a"] = np.concatenate([tensors[f"{first}.lora_a"]] * 2)
    elif oddity == "unknown tensor":
        tensors[f"{first}.lora_c"] = draw.standard_normal((4, 4))
    elif oddity == "norm":
        tensors["blk.0.attn_norm.weight"] = draw.standard_normal(32)
    elif oddity == "bias":
        tensors[f"{first.replace('weight', 'bias')}.lora_a"] = draw.standard_normal((2, 32))
    elif oddity in ("embedding", "head"):
        name = "token_embd.weight" if oddity == "embedding" else "output.weight"
        out, width = stored()[1].get_input_embeddings().weight.shape
        tensors |= {f"{name}.lora_a": draw.standard_normal((2, width)), f"{name}.lora_b": draw.standard_normal((out, 2))}
    elif oddity == "block 9":
        a, b = draw.standard_normal((2, 32)), draw.standard_normal((32, 2))
        tensors |= {"blk.9.attn_v.weight.lora_a": a, "blk.9.attn_v.weight.lora_b": b}


@pytest.mark.slow
@fuzzed(quick=150, many=10_000)
@given(case=files())
def test_llama_cpp_computes_the_same_or_the_file_is_refused(llama: OpenModel, case: dict[str, Any]) -> None:
    with case_folder() as place:
        file = place / "a.gguf"
        write_file(case, file)
        try:
            ours = computed(gguf.read(file, base=base()))
        except LorakeetError:
            event("llama.cpp: refused")
            return
        theirs = llama.logits(IDS, file)
    event("llama.cpp: " + ("not read by it" if theirs is None else "same"))
    assert theirs is not None, "a file that llama.cpp refuses has no function"
    allowed = ROUNDED[case["packed"]] if case["dtype"] == np.float32 else max(0.01, ROUNDED[case["packed"]])
    assert (ours - theirs).abs().max() <= 1e-3 + allowed * (ours - plain()).abs().max()


@st.composite
def folders(draw: Any) -> dict[str, Any]:
    """A PEFT folder with settings that llama.cpp's converter leaves out: rsLoRA, alphas and ranks by pattern."""
    pattern = st.sampled_from(["q_proj", r"layers\.0.*", "mlp.down_proj", r".*v_proj"])
    return {
        "paths": draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=4, unique=True)),
        "config": {
            "r": draw(st.integers(1, 4)), "lora_alpha": draw(st.sampled_from([4, 8, 0.5, -3, 0])),
            "use_rslora": draw(st.booleans()), "rank_pattern": draw(st.dictionaries(pattern, st.integers(1, 3), max_size=2)),
            "alpha_pattern": draw(st.dictionaries(pattern, st.sampled_from([3, 12]), max_size=2)),
        },
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@fuzzed(quick=20, many=5_000)
@given(case=folders())
def test_what_is_written_from_pefts_folder_computes_there_what_peft_computes(llama: OpenModel, case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    with case_folder() as place:
        folder, file = place / "peft", place / "a.gguf"
        folder.mkdir()
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "target_modules": case["paths"]}
        (folder / "adapter_config.json").write_text(json.dumps({**config, **case["config"]}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(shared().copy(), peft.LoraConfig(**{**config, **case["config"]}))
        shapes = {key.replace(".default", ""): value.shape for key, value in model.state_dict().items() if "lora_" in key}
        tensors = {key: torch.randn(shape) * 0.2 for key, shape in shapes.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        try:
            gguf.write(read_adapter(folder, say=lambda line: None), file, base=base())
        except LorakeetError:
            event("from PEFT: refused")
            return
        with torch.no_grad():
            theirs = into_peft(shared().copy(), folder)(torch.tensor([IDS])).logits[0, -1]
        found = llama.logits(IDS, file)
    assert found is not None
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-3)
