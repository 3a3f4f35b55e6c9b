"""adapter_config.json: what is refused by name, what is read over, and what PEFT makes of ours."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter, TokenRows
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.peft import peft as lorakeet_peft
from lorakeet.formats.peft import peft_config
from tiny.adapters import random_pair
from tiny.dense import fold_into
from tiny.models import tiny_model
from tiny.peft_oracle import by_peft, change_config, logits

REFUSED: list[tuple[str, Any]] = [
    ("bias", "all"),
    ("bias", "lora_only"),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("alora_invocation_tokens", [1, 2]),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 3}),
    ("kasa_config", {"beta": 1e-4}),
    ("monteclora_config", {"a": 1}),
    ("megatron_config", {"a": 1}),
    ("ensure_weight_tying", True),
    ("peft_type", "ADALORA"),
    ("a_key_of_tomorrow", 3),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_keys_that_change_the_function_are_refused_by_name(key: str, value: Any, folder: Path) -> None:
    change_config(folder, **{key: value})
    with pytest.raises(ConfigError) as error:
        lorakeet_peft.read(folder)
    assert key in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"a_key_of_tomorrow": None, "another": False, "third": []},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"init_lora_weights": "mica"},
        {"loftq_config": None, "exclude_modules": ["k_proj"], "peft_version": "0.99"},
    ],
)
def test_keys_without_effect_are_read_over(changes: dict[str, Any], folder: Path, plain_folder: Path) -> None:
    change_config(folder, **changes)
    pairs = lorakeet_peft.read(folder).pairs
    assert len(pairs) == 4
    assert all(torch.equal(pair.A, pairs[path].A) for path, pair in lorakeet_peft.read(plain_folder).pairs.items())


def test_dora_with_a_bias_is_refused(folder: Path, tmp_path: Path) -> None:
    change_config(folder, use_dora=True, lora_bias=True)
    with pytest.raises(ConfigError, match="use_dora and lora_bias are both True"):
        lorakeet_peft.read(folder)
    pair = random_pair("linear", torch.ones(8, 8), dora=True, bias=torch.zeros(8))
    with pytest.raises(ConfigError, match="q is a DoRA pair with a bias"):
        lorakeet_peft.write(Adapter({"q": pair}), tmp_path / "new")


def test_all_refusals_come_at_once(folder: Path) -> None:
    change_config(folder, bias="all", use_qalora=True, r=0, lora_alpha="x", rank_pattern={"(": 4}, target_modules=3)
    with pytest.raises(ConfigError, match="6 problems"):
        lorakeet_peft.read(folder)


@pytest.mark.parametrize(("key", "what"), [("lora_alpha", "alpha"), ("r", "rank")])
def test_a_missing_rank_or_alpha_is_no_default(key: str, what: str, folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(ConfigError, match=rf"has no {key}, so the {what} and with it the scale are unknown"):
        lorakeet_peft.read(folder)


def test_every_known_key_of_the_installed_peft_is_known_here(folder: Path) -> None:
    """A new key of PEFT at its default must not stop a plain adapter; this says when there is one to look at."""
    keys = set(json.loads((folder / "adapter_config.json").read_text()))
    assert keys <= peft_config._READ | peft_config._NO_EFFECT | set(peft_config._REFUSED)


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "holds a JSON list")])
def test_configuration_files_that_are_none(text: str | None, message: str, folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(DataError, match=message):
        lorakeet_peft.read(folder)


def test_ranks_of_paths_that_end_alike_stay_apart(tmp_path: Path) -> None:
    """`block.q` ends like `outer.block.q`, and `.` must not match any letter."""
    paths = {"block.q": 4, "outer.block.q": 2, "outer.block_q": 6, "outer.blockxq": 4}
    shapes = {path: random_pair("linear", torch.zeros(8, 8), rank=rank, alpha=3.0 * rank) for path, rank in paths.items()}
    lorakeet_peft.write(Adapter(shapes), tmp_path)
    from peft.utils.other import get_pattern_key

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 12
    for name, default, factor in (("rank_pattern", 4, 1), ("alpha_pattern", 12, 3)):
        for path, rank in paths.items():
            assert config[name].get(get_pattern_key(config[name].keys(), path), default) == rank * factor
    assert {path: pair.rank for path, pair in lorakeet_peft.read(tmp_path).pairs.items()} == paths


def test_alphas_that_disagree_on_one_module_are_refused(folder: Path) -> None:
    path = next(iter(lorakeet_peft.read(folder).pairs))
    leaf = path.rpartition(".")[2]
    change_config(folder, alpha_pattern={leaf: 24, f"^{path}": 24})
    assert lorakeet_peft.read(folder).pairs[path].alpha == 24
    change_config(folder, alpha_pattern={leaf: 24, f"^{path}": 3})
    with pytest.raises(ConfigError, match=rf"keys that disagree on {path}: '{leaf}' says 24, '\^{path}' says 3\. Keep"):
        lorakeet_peft.read(folder)


def test_one_scale_rule_on_disk(tmp_path: Path) -> None:
    weight = torch.zeros(8, 8)
    pairs = {name: random_pair("linear", weight, scale_rule="alpha/sqrt(rank)") for name in "abc"}
    pairs["d"] = random_pair("linear", weight)
    lorakeet_peft.write(Adapter(pairs), tmp_path)
    back = lorakeet_peft.read(tmp_path).pairs
    assert {pair.scale_rule for pair in back.values()} == {"alpha/sqrt(rank)"}
    assert {name: pair.scale for name, pair in back.items()} == {"a": 6, "b": 6, "c": 6, "d": 3}


def test_what_peft_has_no_place_for_is_listed(tmp_path: Path) -> None:
    pair, dora = random_pair("linear", torch.zeros(8, 8)), random_pair("linear", torch.ones(8, 8), dora=True)
    biased = random_pair("linear", torch.zeros(8, 8), bias=torch.zeros(8))
    experts = random_pair("experts", torch.zeros(3, 8, 6))
    rows = TokenRows((1, 2), torch.zeros(3, 8))
    with pytest.raises(ConfigError, match="4 problems") as error:
        lorakeet_peft.write(Adapter({"a": pair, "b": dora, "c": biased, "m.d": experts}, {}, {"a": rows}), tmp_path / "new")
    for part in ("1 pairs are DoRA and 3 are not", "m.d is of kind experts", "a has both", "a has 2 token ids and 3 rows"):
        assert part in str(error.value)
    assert not (tmp_path / "new").exists()


def test_pissa_kept_as_a_difference_loads(tmp_path: Path) -> None:
    """PEFT's converted PiSSA adapter has twice the rank and no longer needs a changed base."""
    import peft

    config = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    wrapped = by_peft(tmp_path / "raw", tiny_model("llama"), randomise=False, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(tmp_path / "start")
        wrapped.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        trained = logits(wrapped)
        wrapped.save_pretrained(tmp_path / "diff", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert peft.__version__.startswith("0.21")
    adapter = lorakeet_peft.read(tmp_path / "diff")
    assert {pair.rank for pair in adapter.pairs.values()} == {8}
    assert (trained - logits(fold_into(tiny_model("llama"), adapter))).abs().max() <= 1e-4
    with pytest.raises(ConfigError, match=r"(?s)init_lora_weights is 'pissa'.*path_initial_model_for_weight_conversion") as error:
        lorakeet_peft.read(tmp_path / "raw")
    assert "differs from the one on disk" in str(error.value)


NUMBERS: list[tuple[str, Any]] = [
    *(
        (name, {"q_proj": value})
        for name in ("rank_pattern", "alpha_pattern")
        for value in (math.inf, math.nan, 10**400, "x", True)
    ),
    *(("rank_pattern", {"q_proj": value}) for value in (0, -1, 2.5)),
    *((name, value) for name in ("lora_alpha", "r") for value in (math.nan, math.inf, -math.inf, 10**400)),
    *((name, 1e39) for name in ("lora_alpha", "lora_dropout")),
    ("alpha_pattern", {"q_proj": -4e38}),
    ("lora_dropout", math.nan),
    ("lora_dropout", "x"),
]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("trainable_token_indices", [-1], "token ids of 0 or more, each once"),
        ("trainable_token_indices", [3, 3], "token ids of 0 or more, each once"),
        ("trainable_token_indices", {"embed_tokens": [3, 4, 3]}, "token ids of 0 or more, each once"),
        ("trainable_token_indices", [2**31], "token ids of 0 or more, each once"),
        ("trainable_token_indices", [True], "token ids of 0 or more, each once"),
        ("layers_to_transform", -1, "the number of a layer"),
        ("layers_to_transform", [0, "1"], "the number of a layer"),
        ("layers_to_transform", True, "the number of a layer"),
        ("exclude_modules", 3, "a list of names or a text"),
        ("layers_pattern", [3], "a list of names or a text"),
    ],
)
def test_lists_of_the_wrong_kind_are_refused_by_name_and_value(key: str, value: Any, words: str, folder: Path) -> None:
    change_config(folder, **{key: value})
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {key} is {re.escape(repr(value))}; expected {words}"):
        lorakeet_peft.read(folder)


@pytest.mark.parametrize("key", ["exclude_modules", "modules_to_save", "layers_pattern"])
def test_slow_expressions_are_refused_under_every_key(key: str) -> None:
    value = "(a+)+$" if key == "exclude_modules" else ["(a+)+$"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "layers_to_transform": [0], key: value}
    config = peft_config.parse_config(settings, "x")
    with pytest.raises(ConfigError, match=rf"{key} is '\(a\+\)\+\$', which may take for ever"):
        config.targets("a.layers.0.q")


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_numbers_that_are_none_are_refused_by_name_and_value(key: str, value: Any, folder: Path) -> None:
    change_config(folder, **{key: value})
    shown = repr(value["q_proj"] if isinstance(value, dict) else value)
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: {key} (is|says) {re.escape(shown)}.*; expected a"):
        lorakeet_peft.read(folder)


SLOW = ["(a+)+$", "(.*a)*b", "(a|a)+$", "(a?){40}b", "(?x)(a+ )+", "a?" * 501]


@pytest.mark.parametrize("key", SLOW)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_keys_that_could_take_for_ever_are_refused(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"x: {name} has the key {re.escape(repr(key[:80]))}, which (may|is)"):
        peft_config.parse_config({"r": 4, "lora_alpha": 8, name: {key: 2}}, "x")


@pytest.mark.parametrize("key", ["a?" * 30 + "a" * 30, "(a|a)" * 30 + "b", ".*.*.*.*.*b"])
def test_what_python_s_matcher_takes_for_ever_for_ends(key: str) -> None:
    """With an answer, or by its time."""
    config = peft_config.parse_config({"r": 4, "lora_alpha": 8, "rank_pattern": {key: 2}}, "x")
    try:
        assert config.rank_of("a." * 40 + "a" * 29) == 4
    except ConfigError as error:
        assert "the regular expressions of rank_pattern take too long" in str(error)


def test_a_slow_text_of_target_modules_is_refused_where_it_is_needed() -> None:
    config = peft_config.parse_config({"r": 4, "lora_alpha": 8, "target_modules": "(a+)+$"}, "x")
    with pytest.raises(ConfigError, match=r"target_modules is '\(a\+\)\+\$', which may take for ever"):
        config.targets("a" * 60 + "b")
    assert peft_config.parse_config({"r": 4, "lora_alpha": 8, "target_modules": r".*\.(q|v)_proj"}, "x").targets("a.q_proj")


@pytest.mark.parametrize(
    "key",
    [
        "q_proj", r"layers.\d+.self_attn.q_proj", "model.layers.(0|1).self_attn.q_proj", "^model.*",
        r"^model\.layers\.0\.self_attn\.q_proj",
        r"(?:model\.)?layers\.[0-9]{1,2}\..*\.(?:q|k|v|o)_proj", r"(?P<block>model\.layers\.\d+)\.[^.)]+\.q_pro[j]",
        r"(?!.*vision).*q_proj", r"model(\.\w\w\w\w\w\w){1}\.0.*", r"(mo){1}del[.]lay.+?\.q_proj",
    ],
)  # fmt: skip
def test_ordinary_regular_expressions_are_matched_as_by_peft(key: str) -> None:
    config = peft_config.parse_config({"r": 4, "lora_alpha": 8, "rank_pattern": {key: 2}, "alpha_pattern": {key: 3}}, "x")
    path = "model.layers.0.self_attn.q_proj"
    assert (config.rank_of(path), config.alpha_of(path)) == (2, 3)
    assert (config.rank_of("head"), config.alpha_of("head")) == (4, 8)
