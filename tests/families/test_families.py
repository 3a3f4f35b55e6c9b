"""Every family of language models ends in right numbers or in a refusal: a small random model of each, column by column.

The usual tests try the families of QUICK. `make families` (LORAKEET_FAMILIES=1) tries all that transformers has, and writes
results.json, from which `make docs` makes docs/reference/models.md.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from lorakeet.errors import DataError
from lorakeet.models.files.validate import require_text_model
from tiny import family_columns
from tiny.family_columns import COLUMNS, Outcome, tried, whole_class_of
from tiny.simulated_card import Card
from tiny.small_configs import VARIANTS, parts_of, small_config, type_of

RESULTS = Path(__file__).with_name("results.json")
ALL = os.environ.get("LORAKEET_FAMILIES", "") not in ("", "0")
KNOWN = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})
# Those with the most that is their own: sinks and transposed experts; experts without gates; a vision tower; a hybrid whose files
# name its experts otherwise.
QUICK = ("gpt_oss", "nemotron_h", "gemma3", "granitemoehybrid")
# Those that people train, where the configuration's own sizes are a whole model's.
LARGE = (
    "qwen3_next", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "gemma3n_text", "gpt_oss", "qwen3_moe", "mistral3", "mistral4",
    "lfm2", "nemotron_h", "falcon_h1", "smollm3", "phi3", "phi4_multimodal", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "deepseek_v3", "deepseek_v32", "kimi_linear", "llama4", "ernie4_5_moe", "olmo3", "seed_oss", "exaone4", "minimax_m2",
    "mistral_large4",
)  # fmt: skip
RIGHT = ("passed", "refused", "not tried")


# Parts of configurations of which no module is built: sizes alone, or parts that no Auto class for text builds.
WITHOUT_MODULES = {
    "dbrx": {"attn_config", "ffn_config"},
    "gemma4_unified": {"vision_config", "audio_config"},  # sizes of its embedders; it has no towers
    "idefics": {"perceiver_config"},  # only of the sizes with a resampler
    "moshi": {"audio_encoder_config", "depth_decoder_config"},
    "mpt": {"attn_config"},
}


@pytest.fixture(autouse=True)
def quiet_and_alone() -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def wrong(found: dict[str, Outcome]) -> list[str]:
    return [f"{column}: {one.outcome}: {one.detail}" for column, one in found.items() if one.outcome not in RIGHT]


@pytest.mark.parametrize(
    "kind", (*QUICK, "gemma4", "qwen3_5", "llama4", "mllama", "nemotron_h_omni", *WITHOUT_MODULES)
)
def test_a_small_model_has_every_part_that_its_configuration_has(kind: str) -> None:
    """As released: towers, projectors and the language model."""
    assert without_modules(kind) == WITHOUT_MODULES.get(kind, set())


@pytest.mark.families
@pytest.mark.parametrize("kinds", [KNOWN] if ALL else ())
def test_every_small_model_has_every_part_that_its_configuration_has(kinds: list[str]) -> None:
    found = {}
    for kind in kinds:
        with suppress(Exception):  # what cannot be built is "not tried" in results.json
            found[kind] = without_modules(kind)
    assert {kind: parts for kind, parts in found.items() if parts} == WITHOUT_MODULES and len(found) > 200


def without_modules(kind: str) -> set[str]:
    """The parts of a small configuration that are missing, or of which its small model has no module."""
    config = small_config(kind)
    with torch.device("meta"):
        model = whole_class_of(config).from_config(config)
    built = {type(module.config) for module in model.modules() if hasattr(module, "config")}
    return {name for name, part in parts_of(config) if type(part) not in built}


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK)
def test_a_family_passes_every_column_that_it_is_not_refused(kind: str, tmp_path: Path) -> None:
    found = tried(kind, tmp_path, [column for column in COLUMNS if column not in ("bf16", "NF4", "GPU")])
    assert not wrong(found), "\n".join(wrong(found))
    assert all(found[column].outcome == "passed" for column in ("train", "gradients", "PEFT", "merge", "plan")), found


@pytest.mark.slow
def test_a_merge_is_held_to_what_the_family_s_own_code_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linear attention makes 1e-5 of a rounded weight, so this family's merge is 1e-5 to 3e-5 off; so is PEFT's own merge."""
    family_columns.saved("bailing_hybrid", tmp_path)
    family_columns.train(tmp_path)
    family_columns.merge(tmp_path)
    merged = family_columns.in_transformers(tmp_path / "merged").state_dict()
    by_peft = family_columns.in_peft(tmp_path).merge_and_unload().state_dict()
    assert merged.keys() == by_peft.keys()
    for name, weight in by_peft.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-7, msg=name)
    monkeypatch.setattr(family_columns, "EXACT", 1e-6)
    shutil.rmtree(tmp_path / "merged")
    assert "where the model's own code in fp32 is" in family_columns.merge(tmp_path)
    live = torch.load(tmp_path / "logits.pt")
    torch.save(live * (1 + 3e-4), tmp_path / "logits.pt")
    shutil.rmtree(tmp_path / "merged")
    with pytest.raises(AssertionError, match=r"0\.0003 of the largest logit, own noise"):
        family_columns.merge(tmp_path)


@pytest.mark.slow
def test_a_run_on_the_simulated_card_is_held_to_the_cpu_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card computes by one part in a hundred otherwise is a wrong number, and a certificate that fails there is named."""
    family_columns.saved("biogpt", tmp_path)  # with dropout
    assert family_columns.simulated_gpu(tmp_path).endswith(", attention varlen")
    assert '"hidden_dropout_prob": 0.1' in (tmp_path / "model" / "config.json").read_text()
    computed = Card.computed

    def off(card: Card, func: Any, *given: Any) -> Any:
        made = computed(card, func, *given)
        return made * 1.01 if func._schema.name in ("aten::addmm", "aten::mm") else made

    monkeypatch.setattr(Card, "computed", off)
    for name in ("by_cpu", "by_card", "without_dropout"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(AssertionError, match=r"on the card, .* on the CPU|certificate fails on the card"):
        family_columns.simulated_gpu(tmp_path)


@pytest.mark.families
@pytest.mark.parametrize("kind", LARGE if ALL else ())
def test_a_model_of_full_size_is_planned(kind: str, tmp_path: Path) -> None:
    """Of many equal blocks few are rehearsed, which no small model shows."""
    found = family_columns.planned_at_full_size(kind, tmp_path)
    assert found.outcome == "passed", found


@pytest.mark.families
@pytest.mark.parametrize("kind", (*KNOWN, *VARIANTS) if ALL else ())
def test_every_family_ends_in_right_numbers_or_a_refusal(kind: str, tmp_path: Path) -> None:
    try:
        require_text_model("config.json", CONFIG_MAPPING[type_of(kind)]())
        found = tried(kind, tmp_path)
    except DataError as error:
        found = {"train": Outcome("refused", str(error))}
    except Exception as error:  # of a configuration that has no defaults
        found = {"build": Outcome("not tried", f"{type(error).__name__}: {error}"[:200])}
    keep(kind, found)
    assert not wrong({column: one for column, one in found.items() if column != "build"}), "\n".join(wrong(found))


LENGTHS = ("(longrope)", "(dynamic)", "(yarn)", "(alibi)", "(temperatures)")  # variants with other arithmetic by a token's place
IN_COMPANY = (
    "bigbird_pegasus", "blenderbot", "deepseek_v4", "git", "mpt", "nemotron_h",
    *(kind for kind in VARIANTS if kind.endswith(LENGTHS)),
)  # fmt: skip


@pytest.mark.families
@pytest.mark.parametrize("kind", (*KNOWN, *VARIANTS) if ALL else ())
def test_replies_of_every_family_do_not_depend_on_their_company(kind: str, tmp_path: Path) -> None:
    found = tried(kind, tmp_path, ["company"])
    assert not wrong({column: one for column, one in found.items() if column != "build"}), "\n".join(wrong(found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_COMPANY)
def test_replies_do_not_depend_on_their_company(kind: str, tmp_path: Path) -> None:
    """Padding reaches top-k, sparse blocks, tables of biases, or rotary frequencies in these."""
    assert tried(kind, tmp_path, ["company"])["company"].outcome == "passed"


def keep(kind: str, found: dict[str, Outcome]) -> None:
    """Writes the outcomes of one family to results.json, which several processes share."""
    with open(RESULTS, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        told = json.loads(file.read() or '{"families": {}}')
        told |= {"transformers": transformers.__version__, "known": KNOWN}
        told["families"][kind] = {column: asdict(one) for column, one in found.items()}
        file.truncate(0)
        file.write(json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
