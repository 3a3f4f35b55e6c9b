"""Reading and writing PEFT's folders, against the installed PEFT in both directions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.core.adapter import Adapter, FlatPairs, Pair, TokenRows
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.files import loaded_file
from lorakeet.formats.files.loaded_file import load_safetensors, open_header
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.formats.peft import peft as lorakeet_peft
from lorakeet.formats.peft import peft_config
from lorakeet.formats.peft.peft_config import CONFIG_NAME
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
def test_what_peft_writes_is_read_attached_and_written_back(case: str, tmp_path: Path) -> None:
    """Folded into the weights, on a live model, and in PEFT again: the logits of PEFT's own model."""
    family, changes, config = CASES[case]
    theirs = logits(by_peft(tmp_path / "theirs", tiny_model(family, **changes), task_type="CAUSAL_LM", **config))
    base, live, adapter = tiny_model(family, **changes), tiny_model(family, **changes), lorakeet_peft.read(tmp_path / "theirs")
    assert (theirs - logits(base)).abs().max() > 1e-2
    assert (theirs - logits(fold_into(base, adapter))).abs().max() <= TOLERANCE
    attach(live, adapter)
    assert (theirs - logits(live)).abs().max() <= TOLERANCE
    lorakeet_peft.write(adapter, tmp_path / "ours")
    assert (theirs - logits(into_peft(tiny_model(family, **changes), tmp_path / "ours"))).abs().max() <= TOLERANCE


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
        ({"target_modules": ["q_proj"]}, r"leaves out \d+ of the \d+ modules that have a pair .*v_proj.* PEFT ignores"),
        ({"target_modules": r".*\.q_proj"}, "leaves out"),
        ({"target_modules": None}, "leaves out"),
        ({"target_modules": "dummy-target-modules"}, "leaves out"),
        ({"exclude_modules": ["v_proj"]}, "leaves out"),
        ({"exclude_modules": r".*layers\.1.*"}, "leaves out"),
        ({"layers_to_transform": 0}, "leaves out"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, "leaves out"),
        ({"modules_to_save": ["v_proj"]}, "leaves out"),
    ],
)
def test_configuration_and_tensors_must_agree(changes: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, **changes)
    with pytest.raises(DataError, match=message):
        lorakeet_peft.read(folder)


@pytest.mark.parametrize("word", ["all-linear", "All-Linear"])
def test_all_linear_leaves_embeddings_out_however_it_is_written(word: str, tmp_path: Path) -> None:
    pairs = {"model.embed_tokens": Pair(torch.ones(2, 8), torch.ones(4, 2), 2.0, "embedding")}
    lorakeet_peft.write(Adapter(pairs), tmp_path)
    assert set(lorakeet_peft.read(tmp_path).pairs) == set(pairs)
    change_config(tmp_path, target_modules=word)
    with pytest.raises(DataError, match="leaves out"):
        lorakeet_peft.read(tmp_path)


def test_settings_that_leave_no_pair_out(folder: Path) -> None:
    expected = set(lorakeet_peft.read(folder).pairs)
    for changes in (
        {"target_modules": "all-linear"}, {"target_modules": r".*_proj"}, {"layers_to_transform": [0, 1]},
        {"exclude_modules": []}, {"layers_pattern": ["layers"], "layers_to_transform": [1, 0]},
        {"exclude_modules": ["lm_head", "layers"]},
    ):  # fmt: skip
        change_config(folder, **changes)
        assert set(lorakeet_peft.read(folder).pairs) == expected


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"weight": torch.zeros(32, 32)}, r"q_proj\.weight is a whole tensor of a module that has a pair .*; PEFT ignores"),
        ({"bias": torch.zeros(32)}, r"q_proj\.bias is a whole tensor of a module"),
        ({"lora_embedding_A": torch.zeros(4, 32), "lora_embedding_B": torch.zeros(32, 4)}, r"lora_B\.weight beside"),
    ],
)
def test_what_peft_ignores_beside_a_pair_is_refused(added: dict[str, torch.Tensor], message: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors | {f"{Q}.{name}": tensor for name, tensor in added.items()})
    with pytest.raises(DataError, match=message):
        lorakeet_peft.read(folder)


def test_ids_in_a_list_are_of_one_embedding(tmp_path: Path) -> None:
    rows = {name: TokenRows((1, 3), torch.zeros(2, 8)) for name in ("model.embed_tokens", "lm_head")}
    lorakeet_peft.write(Adapter({}, token_rows=rows), tmp_path)
    assert set(lorakeet_peft.read(tmp_path).token_rows) == set(rows)
    change_config(tmp_path, trainable_token_indices=[1, 3])
    with pytest.raises(DataError, match="ids in a list are of the embedding alone"):
        lorakeet_peft.read(tmp_path)


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


LAYOUT_CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "linear": ("llama", (), {}),
    "dora": ("llama", (), {"dora": True}),
    "rslora": ("llama", ("q_proj",), {"scale_rule": "alpha/sqrt(rank)"}),
    "conv1d": ("gpt2", (), {}),
    "embedding": ("llama", ("embed_tokens", "q_proj"), {}),
}


@pytest.fixture(autouse=True)
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was worked out since nothing is remembered: headers, configurations, and adapters tensor by tensor."""
    found: list[str] = []
    for place, name in ((loaded_file, "check_header"), (peft_config, "parse_config"), (lorakeet_peft, "_read")):
        real = getattr(place, name)

        def counted(*given: Any, real: Any = real, name: str = name) -> Any:
            found.append(name)
            return real(*given)

        monkeypatch.setattr(place, name, counted)
    for known in (loaded_file._HEADERS, loaded_file._NAMED, peft_config._KNOWN, lorakeet_peft.LAYOUTS):
        known.clear()
    return found


def saved(folder: Path, seed: int, case: str = "linear") -> Path:
    family, leaves, options = LAYOUT_CASES[case]
    lorakeet_peft.write(random_adapter(tiny_model(family), *leaves, seed=seed, **options), folder)
    return folder


def assert_same(one: Adapter, other: Adapter) -> None:
    assert list(one.pairs) == list(other.pairs) and one.parameters == other.parameters
    for path, pair in one.pairs.items():
        twin = other.pairs[path]
        assert (pair.alpha, pair.kind, pair.scale_rule) == (twin.alpha, twin.kind, twin.scale_rule)
        for a, b in ((pair.A, twin.A), (pair.B, twin.B), (pair.magnitude, twin.magnitude), (pair.bias, twin.bias)):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype is torch.float32 and a.is_contiguous() and torch.equal(a, b))
    assert (one.base, one.metadata, one.extras) == (other.base, other.metadata, other.extras)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_the_second_is_what_it_would_be_as_the_first(case: str, mapped: bool, tmp_path: Path, looked: list[str]) -> None:
    folders = [saved(tmp_path / str(seed), seed, case) for seed in range(3)]
    adapters = [lorakeet_peft.read(folder, opened=lambda path: load_safetensors(path, mapped=mapped)) for folder in folders]
    assert looked == ["parse_config", "check_header", "_read"]
    outlines = {id(adapter.pairs.outline) for adapter in adapters if isinstance(adapter.pairs, FlatPairs)}
    assert len(outlines) == 1
    for folder, adapter in zip(folders, adapters, strict=True):
        assert_same(adapter, lorakeet_peft.read(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype, tmp_path: Path, looked: list[str]) -> None:
    for seed in range(2):
        tensors = load_file(saved(tmp_path / str(seed), seed) / lorakeet_peft.MODEL_NAME)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / str(seed) / lorakeet_peft.MODEL_NAME)
        adapter = lorakeet_peft.read(tmp_path / str(seed), opened=load_safetensors)
        assert isinstance(adapter.pairs, FlatPairs)
        assert_same(adapter, lorakeet_peft.read(tmp_path / str(seed)))
    assert looked.count("_read") == 3, "once, and twice for comparison"


def test_biases_are_filled_in(tmp_path: Path, looked: list[str]) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        pairs = {f"a.{n}": random_pair("linear", torch.ones(7, 5), bias=torch.randn(7)) for n in range(2)}
        lorakeet_peft.write(Adapter(pairs), tmp_path / str(seed))
        assert_same(lorakeet_peft.read(tmp_path / str(seed), opened=load_safetensors), lorakeet_peft.read(tmp_path / str(seed)))
    assert looked.count("_read") == 3


def test_an_outline_tells_of_its_numbers_what_they_will_be(tmp_path: Path, looked: list[str]) -> None:
    outline = lorakeet_peft.read(saved(tmp_path / "a", 1), opened=open_header)
    adapter = lorakeet_peft.read(saved(tmp_path / "b", 2), opened=load_safetensors)
    assert looked.count("_read") == 1
    assert isinstance(outline.pairs, FlatPairs) and isinstance(adapter.pairs, FlatPairs)
    assert outline.pairs.outline is adapter.pairs.outline and outline.parameters == adapter.parameters
    assert all(pair.A.is_meta and pair.A.shape == adapter.pairs[path].A.shape for path, pair in outline.pairs.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_in_a_known_recipe_is_named(value: float, tmp_path: Path) -> None:
    good, bad = saved(tmp_path / "good", 1), saved(tmp_path / "bad", 2)
    lorakeet_peft.read(good, opened=load_safetensors)
    tensors = load_file(bad / lorakeet_peft.MODEL_NAME)
    name = sorted(tensors)[5]
    tensors[name][0, 1] = value
    save_file(tensors, bad / lorakeet_peft.MODEL_NAME, metadata={"format": "pt"})
    for mapped in (False, True):
        with pytest.raises(DataError, match="NaN or infinite") as error:
            lorakeet_peft.read(bad, opened=lambda path, mapped=mapped: load_safetensors(path, mapped=mapped))  # type: ignore[misc]
        assert name in str(error.value) and str(bad) in str(error.value) and str(error.value).count("NaN") == 1
    assert_same(lorakeet_peft.read(good, opened=load_safetensors), lorakeet_peft.read(good))


def test_another_shape_name_or_length_in_a_known_recipe_is_refused(tmp_path: Path, looked: list[str]) -> None:
    lorakeet_peft.read(saved(tmp_path / "good", 1), opened=load_safetensors)
    file = saved(tmp_path / "bad", 2) / lorakeet_peft.MODEL_NAME
    whole, tensors = file.read_bytes(), load_file(file)
    name = sorted(tensors)[4]
    save_file({**tensors, name: tensors[name].t().contiguous()}, file)
    with pytest.raises(DataError, match="rank"):
        lorakeet_peft.read(tmp_path / "bad", opened=load_safetensors)
    save_file({(f"{key}x" if key == name else key): tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(DataError, match=r"has .* but no"):
        lorakeet_peft.read(tmp_path / "bad", opened=load_safetensors)
    file.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="it was cut off"):
        lorakeet_peft.read(tmp_path / "bad", opened=load_safetensors)
    file.write_bytes(whole)
    lorakeet_peft.read(tmp_path / "bad", opened=load_safetensors)
    assert looked.count("check_header") == 4 and looked.count("_read") == 3, "the last is of the known recipe again"


def test_another_byte_of_the_configuration_counts(tmp_path: Path, looked: list[str]) -> None:
    first = lorakeet_peft.read(saved(tmp_path / "a", 1), opened=load_safetensors)
    config = saved(tmp_path / "b", 1) / CONFIG_NAME
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 12', '"lora_alpha": 13'))
    second = lorakeet_peft.read(tmp_path / "b", opened=load_safetensors)
    assert {pair.alpha for pair in first.pairs.values()} == {12.0} and {pair.alpha for pair in second.pairs.values()} == {13.0}
    assert looked == ["parse_config", "check_header", "_read", "parse_config", "_read"]
    for wrong, said in (('"lora_alpha": null', "lora_alpha is None"), ('"lora_alpha": 12, "strange": 3', "the key strange")):
        config.write_text(text.replace('"lora_alpha": 12', wrong))
        for _ in range(2):
            with pytest.raises(ConfigError, match=said) as error:
                lorakeet_peft.read(tmp_path / "b", opened=load_safetensors)
            assert str(config) in str(error.value)
    config.write_text(text.replace('"r": 4', '"r": 5'))
    with pytest.raises(DataError, match="on disk, but adapter_config"):
        lorakeet_peft.read(tmp_path / "b", opened=load_safetensors)


def test_what_is_more_than_pairs_is_read_tensor_by_tensor(tmp_path: Path, looked: list[str]) -> None:
    pair = random_pair("linear", torch.ones(7, 5))
    more: dict[str, dict[str, Any]] = {
        "extras": {"extras": {"score.weight": torch.ones(2, 3)}},
        "rows": {"token_rows": {"embed": TokenRows((3, 4), torch.ones(2, 6))}},
    }
    for name, parts in more.items():
        lorakeet_peft.write(Adapter({"a": pair}, **parts), tmp_path / name)
    lorakeet_peft.write(random_adapter(tiny_model("mixtral"), "q_proj", "gate_up_proj", "down_proj"), tmp_path / "experts")
    conv = random_pair("conv2d", torch.ones(7, 5, 3, 3), dora=True)
    lorakeet_peft.write(Adapter({"a": conv}), tmp_path / "conv")
    for name in (*more, "experts", "conv"):
        looked.clear()
        for _ in range(2):
            adapter, plain = lorakeet_peft.read(tmp_path / name, opened=load_safetensors), lorakeet_peft.read(tmp_path / name)
            assert_same(adapter, plain) if not adapter.extras else None
            assert adapter.extras.keys() == plain.extras.keys() and adapter.token_rows.keys() == plain.token_rows.keys()
        assert looked.count("_read") == 4 and len(lorakeet_peft.LAYOUTS) == 0


def test_mixed_dtypes_are_read_tensor_by_tensor(tmp_path: Path, looked: list[str]) -> None:
    file = saved(tmp_path / "a", 1) / lorakeet_peft.MODEL_NAME
    tensors = load_file(file)
    save_file({name: tensor.bfloat16() if "lora_A" in name else tensor for name, tensor in tensors.items()}, file)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        lorakeet_peft.read(folder, opened=open_header)
        assert_same(lorakeet_peft.read(folder, opened=load_safetensors), lorakeet_peft.read(folder))
    assert looked.count("_read") == 5, "the outline once"


def test_experts_are_the_fast_axis_of_b(tmp_path: Path) -> None:
    """Against the change that PEFT itself computes for each nested parameter."""
    theirs = by_peft(tmp_path, tiny_model("mixtral"), target_modules=[], target_parameters=EXPERTS)
    adapter = lorakeet_peft.read(tmp_path)
    block = theirs.base_model.model.model.layers[1].mlp.experts
    assert (block.parameter_name, block.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    for wrapper in (block, block.base_layer):
        ours = adapter.pairs[f"model.layers.1.mlp.experts.{wrapper.parameter_name}"]
        assert ours.A.shape[:2] == (4, 4) and ours.alpha == 12
        assert torch.allclose(wrapper.get_delta_weight("default"), ours.delta(), atol=1e-6)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_a_single_parameter_is_not_nested(parameter: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    path = f"model.layers.0.mlp.experts.{parameter}"
    lorakeet_peft.write(Adapter({path: random_pair("experts", model.get_parameter(path))}), tmp_path)
    names = set(open_safetensors(tmp_path / "adapter_model.safetensors").tensors)
    assert names == {f"base_model.model.model.layers.0.mlp.experts.lora_{ab}.weight" for ab in "AB"}
    assert set(lorakeet_peft.read(tmp_path).pairs) == {path}


def test_nesting_that_cannot_be_distinguished_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path, tiny_model("mixtral"), target_modules=[], target_parameters=EXPERTS)
    change_config(tmp_path, target_parameters=[EXPERTS[0]])
    with pytest.raises(DataError, match="has 2 pairs on its parameters, and target_parameters names 1"):
        lorakeet_peft.read(tmp_path)


def test_a_rank_that_does_not_divide_the_rows_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path, tiny_model("mixtral"), target_modules=[], target_parameters=EXPERTS)
    change_config(tmp_path, r=5)
    with pytest.raises(DataError, match=r"has A \(16, 32\) and B \(96, 16\); expected \(experts·5, in\)"):
        lorakeet_peft.read(tmp_path)
