"""A file is read as its own program reads it, or refused: random adapters here, in PEFT, diffusers and mlx-lm."""

from __future__ import annotations

import json
import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakeet.errors import LorakeetError
from lorakeet.formats.detect import read_adapter
from lorakeet.models.inject import attach
from tiny.dense import fold_into
from tiny.fuzz import case_folder, fuzzed
from tiny.images import load_into, tiny_unet
from tiny.mlx_llama import mlx_llama, mlx_logits
from tiny.models import tiny_model
from tiny.peft_oracle import IDS, logits
from tiny.shared_weights import Shared, same_mlx

PREFIX = "base_model.model."
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
PATHS = [f"model.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
PATHS += ["model.embed_tokens", "lm_head"]
ENDS = ["q_proj", "v_proj", "down_proj", "self_attn.q_proj", "layers.1.self_attn.v_proj", "lm_head", "proj", *PATHS]
REGEXES = [r".*\.(q|v)_proj", r".*layers\.1\..*", r"model\.layers\.0\.self_attn\.q_proj", r".*proj", "q_proj", r".*(embed|lm).*"]


@cache
def base(tied: bool) -> Shared:
    return Shared(tiny_model("llama", tie_word_embeddings=tied, **SMALL))


def names(*more: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(st.sampled_from(ENDS), max_size=4, unique=True), st.sampled_from(REGEXES), *map(st.just, more))


ROWS = st.one_of(
    st.none(),
    st.lists(st.integers(-1, 95), min_size=1, max_size=3),
    st.fixed_dictionaries({}, optional={
        name: st.lists(st.integers(0, 20), min_size=1, max_size=2) for name in ("embed_tokens", "lm_head", "model.embed_tokens")
    }),
)  # fmt: skip
ODDITIES = ["plain", "plain bias", "base_layer", "embedding", "norm", "no prefix", "no B"]
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "target_modules": names("all-linear", "dummy-target-modules", None, [*ENDS]),
    "exclude_modules": names(None),
    "layers_to_transform": st.sampled_from([None, 0, 1, [], [0], [1], [0, 1], [5]]),
    "layers_pattern": st.sampled_from([None, "layers", ["layers"], ["blocks", "layers"], "blocks", [], ""]),
    "modules_to_save": st.sampled_from([None, [], ["lm_head"], ["embed_tokens"], ["q_proj"], ["self_attn"]]),
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "lora_bias": st.booleans(),
    "fan_in_fan_out": st.booleans(),
    "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", "layers.0.*", "lm_head"]), st.integers(1, 3), max_size=2),
    "alpha_pattern": st.dictionaries(st.sampled_from(["q_proj", r"layers\.0.*", "proj"]), st.sampled_from([3, 8]), max_size=2),
    "trainable_token_indices": ROWS,
    "init_lora_weights": st.sampled_from([True, "gaussian"]),
}


@st.composite
def peft_cases(draw: Any) -> dict[str, Any]:
    """A configuration that goes with some pairs, with up to three settings drawn anew, and the tensors' names."""
    paths = draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=4, unique=True))
    config = {"r": draw(st.integers(1, 3)), "lora_alpha": draw(st.sampled_from([4, 7.5, 0, -2, 1]))}
    config["target_modules"] = sorted({path.rpartition(".")[2] for path in paths})
    for key in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True)):
        config[key] = draw(FIELDS[key])
    rows: list[str] = []
    if config.get("trainable_token_indices"):
        rows = draw(st.lists(st.sampled_from(["model.embed_tokens", "lm_head"]), unique=True))
    oddity = draw(st.sampled_from([""] * 8 + ODDITIES))
    return {"config": config, "paths": paths, "rows": rows, "oddity": oddity, "seed": draw(st.integers(0, 99))}


def rank_in(config: dict[str, Any], path: str) -> int:
    from lorakeet.formats.peft.peft_config import parse_config

    try:
        return parse_config({**config, "trainable_token_indices": None}, "x").rank_of(path)
    except LorakeetError:
        return int(config["r"])


def tensors_of(config: dict[str, Any], paths: list[str], oddity: str, rows: list[str], seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        weight, rank, at = base(False).model.get_submodule(path).weight, rank_in(config, path), PREFIX + path
        if path.endswith("embed_tokens"):
            found[f"{at}.lora_embedding_A"] = torch.randn(rank, weight.shape[0])
            found[f"{at}.lora_embedding_B"] = torch.randn(weight.shape[1], rank)
            continue
        found[f"{at}.lora_A.weight"] = torch.randn(rank, weight.shape[1])
        found[f"{at}.lora_B.weight"] = torch.randn(weight.shape[0], rank)
        if config.get("use_dora"):
            found[f"{at}.lora_magnitude_vector"] = 1 + torch.rand(weight.shape[0])
        if config.get("lora_bias"):
            found[f"{at}.lora_B.bias"] = torch.randn(weight.shape[0])
    tokens = config.get("trainable_token_indices")
    for path in rows:
        ids = tokens if isinstance(tokens, list) else next((tokens[name] for name in tokens or {} if path.endswith(name)), [0])
        found[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = torch.randn(len(ids), 8)
    odd = PREFIX + paths[0]
    weight = base(False).model.get_submodule(paths[0]).weight
    if oddity in ("plain", "base_layer"):
        found[f"{odd}{'.base_layer' if oddity == 'base_layer' else ''}.weight"] = torch.randn(weight.shape)
    elif oddity == "plain bias":
        found[f"{odd}.bias"] = torch.randn(weight.shape[0])
    elif oddity == "embedding":
        found[f"{odd}.lora_embedding_A"] = torch.randn(2, weight.shape[0])
        found[f"{odd}.lora_embedding_B"] = torch.randn(weight.shape[1], 2)
    elif oddity == "norm":
        found[f"{PREFIX}model.norm.weight"] = torch.rand(8)
    elif oddity == "no prefix":
        found[f"{paths[0]}.lora_A.weight"] = torch.randn(2, weight.shape[1])
    elif oddity == "no B":
        found.pop(f"{odd}.lora_B.weight", None)
    return found


def in_peft(folder: Path, tied: bool) -> torch.Tensor | None:
    """The logits of PEFT's model; None if PEFT cannot read the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return logits(peft.PeftModel.from_pretrained(base(tied).copy(own_weights=True), folder).eval())
        except Exception:  # whatever it raises, it has no function to differ from
            return None


def here(folder: Path, tied: bool) -> torch.Tensor | str:
    """The logits of the live adapter, or the refusal."""
    model = base(tied).copy()
    try:
        attach(model, read_adapter(folder, say=lambda line: None))
    except LorakeetError as error:
        return str(error)
    return logits(model)


@pytest.mark.slow
@fuzzed(quick=150, many=20_000)
@given(case=peft_cases(), tied=st.booleans())
def test_peft_computes_the_same_or_the_folder_is_refused(case: dict[str, Any], tied: bool) -> None:
    with case_folder() as folder:
        full = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
        (folder / "adapter_config.json").write_text(json.dumps({**full, **case["config"]}))
        save_file(tensors_of(**case), folder / "adapter_model.safetensors")
        theirs, ours = in_peft(folder, tied), here(folder, tied)
        record("peft", theirs, ours)
        if theirs is not None and not isinstance(ours, str):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


SPELLINGS = ("lora_A lora_B", "lora.down lora.up", "processor", "bare processor")


SMALLEST = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}


@cache
def unet() -> Shared:
    """A UNet that keeps its first block alone: PEFT walks through all modules for each, and no case runs the whole."""
    found = tiny_unet(**SMALLEST)
    found.up_blocks, found.mid_block = torch.nn.ModuleList(), None
    return Shared(found)


@cache
def layers_of_unet() -> list[str]:
    ends = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1")
    return [path for path, _ in unet().model.named_modules() if path.endswith(ends)][:16]


def key_of(path: str, spelling: str, side: int) -> str:
    """The name of A (side 0) or B of the module at `path`."""
    if "processor" in spelling and ".to_" in path:
        head, _, leaf = path.removesuffix(".0").rpartition(".")
        return f"unet.{head}.processor.{leaf}_lora.{('down', 'up')[side]}.weight"
    pair = ("lora_A", "lora_B") if spelling == SPELLINGS[0] else ("lora.down", "lora.up")
    return f"unet.{path}.{pair[side]}.weight"


@st.composite
def diffusers_cases(draw: Any) -> dict[str, Any]:
    """Names and shapes of the tensors of a file, and its metadata."""
    paths = draw(st.lists(st.sampled_from(layers_of_unet()), min_size=1, max_size=4, unique=True))
    usual = draw(st.sampled_from(SPELLINGS))
    mixed = draw(st.sampled_from([False] * 4 + [True]))
    any_two = st.tuples(st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
    own = {path: draw(any_two) if mixed else (usual, usual) for path in paths}
    twice = draw(st.sampled_from([()] * 8 + [(0,), (1,), (0, 1)]))
    other = draw(st.sampled_from(SPELLINGS))
    return {
        "names": [(path, key_of(path, spelling, side), side) for path, both in own.items() for side, spelling in enumerate(both)]
        + [(paths[0], key_of(paths[0], other, side), side) for side in twice],
        "ranks": {path: draw(st.integers(1, 3)) for path in paths},
        "alphas": draw(st.sampled_from(["none"] * 6 + ["all", "some"])),
        "metadata": draw(st.sampled_from([None, None, {"r": 2, "lora_alpha": 6}, {"r": 2, "lora_alpha": 6, "use_rslora": True},
                                          {"r": 2, "lora_alpha": 3, "target_modules": ["to_q"]},
                                          {"r": 2, "lora_alpha": 3, "use_dora": True}])),
        "dora": draw(st.sampled_from(["none"] * 6 + ["all", "all", "some"])),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def write_diffusers(case: dict[str, Any], file: Path) -> None:
    torch.manual_seed(case["seed"])
    tensors: dict[str, torch.Tensor] = {}
    for path, name, side in case["names"]:
        weight, rank = unet().model.get_submodule(path).weight, 2 if case["metadata"] else case["ranks"][path]
        inner = weight.shape[2:]
        shape = (rank, weight.shape[1], *inner) if side == 0 else (weight.shape[0], rank, *[1] * len(inner))
        tensors[name] = torch.randn(shape) * 0.3
        if case["alphas"] == "all" or (case["alphas"] == "some" and path == case["names"][0][0]):
            tensors[f"unet.{path}.alpha"] = torch.tensor(5.0)
        if case["dora"] == "all" or (case["dora"] == "some" and path == case["names"][0][0]):
            tensors[f"unet.{path}.lora_magnitude_vector"] = 1 + torch.rand(weight.shape[0], *[1] * len(inner))
    config = case["metadata"] and {"peft_type": "LORA", "target_modules": list(case["ranks"]), **case["metadata"]}
    note = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})} if config else {}
    save_file(tensors, file, metadata={"format": "pt", **note})


@pytest.mark.slow
@fuzzed(quick=150, many=5_000)
@given(case=diffusers_cases())
def test_diffusers_computes_the_same_or_the_file_is_refused(case: dict[str, Any]) -> None:
    with case_folder() as folder:
        file = folder / "pytorch_lora_weights.safetensors"
        write_diffusers(case, file)
        theirs = in_diffusers(file)
        ours: Any
        try:
            ours = fold_into(torch.nn.ModuleDict({"unet": unet().copy()}), read_adapter(file, say=lambda line: None))["unet"]
        except LorakeetError as error:
            ours = str(error)
        record("diffusers", theirs, ours)
        if theirs is not None and not isinstance(ours, str):
            require_same_layers(ours, theirs)


def in_diffusers(file: Path) -> Any:
    """diffusers' UNet with the file; None if diffusers cannot read it."""
    loaded = unet().copy()
    try:
        load_into(file, loaded)
    except Exception:  # whatever it raises, it has no function to differ from
        return None
    return loaded if all("lora" in key for key in load_file(file)) else None  # as load_lora_weights checks


def require_same_layers(ours: Any, theirs: Any) -> None:
    """Every layer of the UNet gives the same numbers for the same input, whichever of both changed it."""
    for path, before in layers_in_unet().items():
        layer, other = ours.get_submodule(path), theirs.get_submodule(path)
        if layer.weight is before.weight and type(other) is type(before):
            continue
        x = torch.randn(2, before.weight.shape[1], *[4] * (before.weight.dim() - 2), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), other(x), rtol=1e-3, atol=1e-3, msg=lambda text, path=path: f"{path}: {text}")


@cache
def layers_in_unet() -> dict[str, Any]:
    return {path: one for path, one in unet().model.named_modules() if isinstance(one, (torch.nn.Linear, torch.nn.Conv2d))}


MLX_PATHS = [f"model.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


@st.composite
def mlx_cases(draw: Any) -> dict[str, Any]:
    """An mlx-lm configuration and the pairs of its file, which go together unless up to two things are drawn anew."""
    paths = draw(st.lists(st.sampled_from(MLX_PATHS), min_size=1, max_size=4, unique=True))
    keys = sorted({path.split(".", 3)[3] for path in paths})
    rank, kind = draw(st.integers(1, 3)), draw(st.sampled_from(["lora", "lora", "dora"]))
    scale = draw(st.sampled_from([2, 0.5, -1]))
    case: dict[str, Any] = {"paths": paths, "keys": keys, "rank": rank, "kind": kind, "m": kind == "dora", "scale": scale}
    changes: dict[str, st.SearchStrategy[Any]] = {
        "num_layers": st.sampled_from([1, 2, 5, -1, 0, None]),
        "keys": st.sampled_from([None, [], ["self_attn.q_proj"], ["model.layers.0.mlp.down_proj"], "self_attn.q_proj", 3]),
        "rank": st.integers(1, 3),
        "kind": st.sampled_from(["lora", "dora", "full", "LoRA", None]),
        "m": st.sampled_from([True, False, "some"]),
        "scale": st.sampled_from([math.nan, math.inf, -math.inf, "2", True, None, 10**400, 1e39]),
    }
    for key in draw(st.lists(st.sampled_from(sorted(changes)), max_size=2, unique=True)):
        case[key] = draw(changes[key])
    return {"num_layers": -1, **case, "seed": draw(st.integers(0, 99))}


def write_mlx(case: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(case["seed"])
    tensors: dict[str, torch.Tensor] = {}
    for number, path in enumerate(case["paths"]):
        out, width = tiny_llama_of_mlx().model.get_submodule(path).weight.shape
        tensors[f"{path}.lora_a"] = torch.randn(width, case["rank"])
        tensors[f"{path}.lora_b"] = torch.randn(case["rank"], out) * 0.1
        if case["m"] is True or (case["m"] == "some" and not number):
            tensors[f"{path}.m"] = 1 + torch.rand(out)
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": case["rank"], "scale": case["scale"], "dropout": 0.0, "keys": case["keys"]}
    config = {"fine_tune_type": case["kind"], "num_layers": case["num_layers"], "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@cache
def tiny_llama_of_mlx() -> Shared:
    return Shared(tiny_model("llama"))


@cache
def mlx_base() -> Any:
    return mlx_llama()


@pytest.mark.slow
@fuzzed(quick=150, many=5_000)
@given(case=mlx_cases())
def test_mlx_lm_computes_the_same_or_the_folder_is_refused(case: dict[str, Any]) -> None:
    pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.utils import load_adapters

    with case_folder() as folder:
        write_mlx(case, folder)
        theirs: torch.Tensor | None
        ours: torch.Tensor | str
        try:
            theirs = torch.from_numpy(mlx_logits(load_adapters(same_mlx(mlx_base()), str(folder)), IDS.numpy()).copy())
            theirs = theirs if bool(theirs.isfinite().all()) else None
        except Exception:
            theirs = None
        try:
            model = tiny_llama_of_mlx().copy()
            attach(model, read_adapter(folder, say=lambda line: None))
            ours = logits(model)
        except LorakeetError as error:
            ours = str(error)
        record("mlx", theirs, ours)
        assert theirs is not None or isinstance(ours, str) or bool(ours.isfinite().all())
        if theirs is not None and not isinstance(ours, str):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def record(where: str, theirs: Any, ours: Any) -> None:
    """Counts what became of the case, for `--hypothesis-show-statistics`."""
    what = "refused" if isinstance(ours, str) else "not read by its own program" if theirs is None else "same"
    event(f"{where}: {what}")
