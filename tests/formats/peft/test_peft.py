"""Reading and writing PEFT's folders, against the installed PEFT in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.errors import DataError
from lorakeet.formats.peft import peft as lorakeet_peft
from lorakeet.models.inject import attach
from tiny.adapters import random_adapter, random_pair
from tiny.dense import fold_into
from tiny.models import tiny_model
from tiny.peft_oracle import EXPERTS, TOLERANCE, TinyConvNet, by_peft, change_config, into_peft, logits

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": ALL}),
    "rslora": ("llama", {}, {"target_modules": ALL, "use_rslora": True}),
    "patterns": (
        "llama",
        {},
        {"target_modules": ALL, "rank_pattern": {r"layers\.1\..*_proj": 6, "q_proj": 2}, "alpha_pattern": {"self_attn.*": 20}},
    ),
    "rslora patterns": ("llama", {}, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "dora": ("llama", {}, {"target_modules": ALL, "use_dora": True}),
    "bias": ("qwen2", {}, {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}),
    "embedding": ("llama", {}, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "gemma embedding": ("gemma2", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "whole head": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "token rows": ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 90]}),
    "named token rows": ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 9, 90]}}),
    "tied token rows": ("qwen3", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 90]}),
    "some layers": ("llama", {}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 dora": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "bare experts": ("mixtral", {}, {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
    "down experts": ("mixtral", {}, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "expert ranks": (
        "qwen3_moe",
        {},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "alpha_pattern": {"experts.down_proj": 20}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_writes(case: str, tmp_path: Path) -> None:
    family, changes, config = CASES[case]
    theirs = logits(by_peft(tmp_path, tiny_model(family, **changes), task_type="CAUSAL_LM", **config))
    base = tiny_model(family, **changes)
    before = logits(base)
    ours = logits(fold_into(base, lorakeet_peft.read(tmp_path)))
    assert (theirs - before).abs().max() > 1e-2
    assert (theirs - ours).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_write(case: str, tmp_path: Path) -> None:
    family, changes, config = CASES[case]
    theirs = logits(by_peft(tmp_path / "theirs", tiny_model(family, **changes), task_type="CAUSAL_LM", **config))
    lorakeet_peft.write(lorakeet_peft.read(tmp_path / "theirs"), tmp_path / "ours")
    back = logits(into_peft(tiny_model(family, **changes), tmp_path / "ours"))
    assert (theirs - back).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_live_logits_equal_pefts(case: str, tmp_path: Path) -> None:
    family, changes, config = CASES[case]
    theirs = logits(by_peft(tmp_path, tiny_model(family, **changes), task_type="CAUSAL_LM", **config))
    live = tiny_model(family, **changes)
    attach(live, lorakeet_peft.read(tmp_path))
    assert (theirs - logits(live)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_in_both_directions(dora: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    theirs = by_peft(tmp_path / "theirs", TinyConvNet().eval(), target_modules=["conv", "head"], use_dora=dora)
    adapter = lorakeet_peft.read(tmp_path / "theirs")
    assert {path: pair.kind for path, pair in adapter.pairs.items()} == {"conv": "conv2d", "head": "linear"}
    assert (adapter.pairs["conv"].magnitude is not None) is dora
    ours = fold_into(TinyConvNet().eval(), adapter)
    lorakeet_peft.write(adapter, tmp_path / "ours")
    back = into_peft(TinyConvNet().eval(), tmp_path / "ours")
    with torch.no_grad():
        assert (theirs(x) - ours(x)).abs().max() <= TOLERANCE
        assert (theirs(x) - back(x)).abs().max() <= TOLERANCE
        assert (theirs(x) - TinyConvNet()(x)).abs().max() > 1e-3


def everything() -> Adapter:
    """One adapter with every part that PEFT's layout can hold together."""
    model = tiny_model("gpt2")
    pairs = dict(random_adapter(model, "c_attn", "c_proj", "wpe", rank=4).pairs)
    pairs["lm_head"] = random_pair("linear", model.lm_head.weight, rank=2, alpha=5.5)
    pairs["conv"] = random_pair("conv2d", torch.zeros(8, 3, 3, 3))
    pairs["block.experts.down_proj"] = random_pair("experts", torch.zeros(3, 8, 6))
    pairs["block.experts.gate_up_proj"] = random_pair("experts", torch.zeros(3, 12, 8))
    extras = {"score.weight": torch.randn(2, 32).bfloat16(), "transformer.wpe.weight": torch.randn(128, 32)}
    rows = {"transformer.wte": TokenRows((96, 97), torch.randn(2, 32), ("<a>", "é"), "lm_head")}
    return Adapter(pairs, extras, rows, "some/base", {"task_type": "CAUSAL_LM", "run": "r1"})


def test_write_read_write_gives_the_same_adapter_and_bytes(tmp_path: Path) -> None:
    adapter = everything()
    lorakeet_peft.write(adapter, tmp_path / "one")
    back = lorakeet_peft.read(tmp_path / "one")
    lorakeet_peft.write(back, tmp_path / "two")
    shuffled = Adapter(dict(reversed(adapter.pairs.items())), dict(reversed(adapter.extras.items())), adapter.token_rows,
                       adapter.base, dict(reversed(adapter.metadata.items())))  # fmt: skip
    lorakeet_peft.write(shuffled, tmp_path / "three")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (back.base, back.metadata) == (adapter.base, adapter.metadata)
    assert set(back.pairs) == set(adapter.pairs)
    for path, pair in adapter.pairs.items():
        other = back.pairs[path]
        assert (other.kind, other.alpha, other.scale_rule) == (pair.kind, pair.alpha, pair.scale_rule)
        assert torch.equal(other.A, pair.A) and torch.equal(other.B, pair.B)
    assert all(torch.equal(back.extras[path], tensor) for path, tensor in adapter.extras.items())
    rows = back.token_rows["transformer.wte"]
    assert (rows.ids, rows.tokens, rows.tied) == ((96, 97), ("<a>", "é"), "lm_head")


def test_writing_again_replaces(tmp_path: Path) -> None:
    lorakeet_peft.write(everything(), tmp_path)
    lorakeet_peft.write(Adapter({"q": random_pair("linear", torch.zeros(8, 8))}), tmp_path)
    assert set(lorakeet_peft.read(tmp_path).pairs) == {"q"}
    assert len(list(tmp_path.iterdir())) == 2


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
V = "base_model.model.model.layers.1.self_attn.v_proj"


def test_every_broken_tensor_is_listed(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors[f"{Q}.lora_B.weight"]
        tensors[f"{V}.lora_A.weight"] = torch.zeros(2, 32)
        tensors[f"{Q.replace('.0.', '.1.')}.lora_A.weight"][1, 1] = float("nan")
        tensors["model.x.lora_A.weight"] = torch.zeros(4, 4)
        tensors[f"{V}.lora_diag"] = torch.zeros(4)
        tensors[f"{V.replace('v_proj', 'k_proj')}.base_layer.weight"] = torch.zeros(4)
        return tensors

    change_tensors(folder, spoil)
    with pytest.raises(DataError, match="6 problems") as error:
        lorakeet_peft.read(folder)
    for part in (
        "model.layers.0.self_attn.q_proj has lora_A.weight but no lora_B.weight",
        "model.layers.1.self_attn.v_proj has A (2, 32) and B (16, 4): their ranks 2 and 4 differ",
        "layers.1.self_attn.q_proj.lora_A.weight has NaN or infinite values",
        "model.x.lora_A.weight is no tensor of PEFT, whose names begin with 'base_model.model.'",
        "v_proj.lora_diag (4,) is a kind of adapter tensor that is not known here",
        "k_proj has no pair",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, "has rank 4 on disk, but adapter_config.json says 2"),
        ({"use_dora": True}, "has no DoRA magnitude, and use_dora is True"),
        ({"lora_bias": True}, "has no lora_B.bias, and lora_bias is True"),
        ({"trainable_token_indices": [3]}, "no tensor holds the trained rows"),
    ],
)
def test_configuration_and_tensors_must_agree(changes: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, **changes)
    with pytest.raises(DataError, match=message):
        lorakeet_peft.read(folder)


def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    class Explodes:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Explodes()}, folder / "adapter_model.bin")
    with pytest.raises(DataError, match=r"adapter_model\.bin is a pickle file"):
        lorakeet_peft.read(folder)
    assert not (tmp_path / "ran").exists()


def test_bf16_adapters_are_held_in_fp32(folder: Path) -> None:
    change_tensors(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    pairs = lorakeet_peft.read(folder).pairs
    assert {pair.A.dtype for pair in pairs.values()} | {pair.B.dtype for pair in pairs.values()} == {torch.float32}


def test_only_the_listed_modules_are_adapted_by_peft(tmp_path: Path) -> None:
    """An adapter on one layer of two, which PEFT's short names could not tell apart."""
    adapter = random_adapter(tiny_model("llama"), "q_proj", "v_proj")
    first = Adapter({path: pair for path, pair in adapter.pairs.items() if ".0." in path})
    lorakeet_peft.write(first, tmp_path)
    loaded = into_peft(tiny_model("llama"), tmp_path)
    adapted = {name.partition(".lora_A")[0] for name, _ in loaded.named_parameters() if ".lora_A." in name}
    assert adapted == {f"base_model.model.{path}" for path in first.pairs}
    assert isinstance(first.pairs["model.layers.0.self_attn.q_proj"], Pair)


def test_extras_and_rows_without_any_pair_load_in_peft(tmp_path: Path) -> None:
    adapter = Adapter({}, {"lm_head.weight": torch.randn(96, 32)}, {"model.embed_tokens": TokenRows((3, 9), torch.randn(2, 32))})
    lorakeet_peft.write(adapter, tmp_path)
    theirs = logits(into_peft(tiny_model("llama"), tmp_path))
    assert (theirs - logits(fold_into(tiny_model("llama"), adapter))).abs().max() <= TOLERANCE
