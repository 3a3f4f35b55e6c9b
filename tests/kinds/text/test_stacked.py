"""An adapter on top of another one: ranks add up, the earlier terms stay, and the sum is what both compute together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.formats.peft import peft
from lorakeet.kinds.text.stacked import check_earlier, earlier_facts, start_on_top, with_stacked
from lorakeet.models.inject import adapter_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel

QUERY, VALUE = (f"model.layers.{layer}.self_attn.{name}" for layer, name in ((0, "q_proj"), (1, "v_proj")))


def pair(rank: int, alpha: float, out: int = 64, into: int = 64, rule: str = "alpha/rank") -> Pair:
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return Pair(*values, alpha, scale_rule=rule)  # type: ignore[arg-type]


@pytest.fixture()
def earlier(tmp_path: Path) -> Path:
    folder = tmp_path / "earlier"
    folder.mkdir()
    peft.write(Adapter({QUERY: pair(4, 8.0), VALUE: pair(3, 6.0)}, base="model"), folder)
    return folder


@pytest.fixture()
def text(tiny_llama_folder: Path) -> TextModel:
    return load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu"))


@pytest.mark.parametrize("rule", ["alpha/rank", "alpha/sqrt(rank)"])
def test_ranks_add_up_and_the_new_pairs_have_their_own_scale(rule: str, earlier: Path, text: TextModel) -> None:
    own = LoraSpec(rank=2, alpha=5.0, scale_rule=rule, rank_pattern={"v_proj": 6}, on_top_of=str(earlier))  # type: ignore[arg-type]
    found = with_stacked(RunConfig(lora=own))
    plan = {entry.path: entry for entry in plan_for(text.model, found.lora, text.family).entries}
    alone = {entry.path: entry for entry in plan_for(text.model, own, text.family).entries}
    more = {path: entry.rank - alone[path].rank for path, entry in plan.items()}
    assert {path: count for path, count in more.items() if count} == {QUERY: 4, VALUE: 3}
    for path, entry in plan.items():
        assert entry.scale == pytest.approx(alone[path].scale, rel=1e-12)
    assert with_stacked(found) == found  # as a resumed run reads them


def on_top_of(earlier: Path) -> RunConfig:
    return RunConfig(lora=LoraSpec(on_top_of=str(earlier)))


def test_the_terms_that_stay_are_named_by_their_dimension(earlier: Path) -> None:
    kept = earlier_facts(on_top_of(earlier)).kept_terms
    assert kept[f"{QUERY}.A"] == (0, 4) and kept[f"{QUERY}.B"] == (1, 4)


def test_facts_follow_the_files(earlier: Path) -> None:
    before = earlier_facts(on_top_of(earlier))
    assert earlier_facts(on_top_of(earlier)) is before
    peft.write(Adapter({QUERY: pair(5, 8.0)}, base="model"), earlier)
    after = earlier_facts(on_top_of(earlier))
    assert after.digest != before.digest and after.pairs == {QUERY: (5, "linear")}


def test_nothing_changes_without_an_earlier_one() -> None:
    assert with_stacked(RunConfig()) == RunConfig()


def test_the_start_is_the_earlier_adapter(text: TextModel) -> None:
    lora = LoraSpec(rank=2, alpha=5.0, target_modules=("q_proj",), rank_pattern={"q_proj": 6}, alpha_pattern={"q_proj": 15.0})
    plan = plan_for(text.model, lora, text.family)
    text = initialise_adapter(text, plan, seed=0)
    adapter = Adapter({entry.path: pair(4, 8.0, *entry.shape) for entry in plan.entries})
    start_on_top(text, plan, adapter, "default")
    live = adapter_of(text.model, "default")
    for path, each in adapter.pairs.items():
        torch.testing.assert_close(live.pairs[path].delta(), each.delta(), rtol=1e-5, atol=1e-5)
        found = live.pairs[path]
        assert torch.equal(found.A[:4], each.A) and found.A[4:].any() and not found.B[:, 4:].any()
    assert check_earlier(live, adapter).passed
    with torch.no_grad():
        live.pairs[QUERY].B[0, 0] += 0.01
    assert not check_earlier(live, adapter).passed
    with torch.no_grad():
        live.pairs[QUERY].B[0, 0] -= 0.01
        live.pairs[QUERY].A[0, 0] += 1e-6
    assert not check_earlier(live, adapter).passed


def test_a_module_without_a_new_pair_is_named(text: TextModel) -> None:
    plan = plan_for(text.model, LoraSpec(rank=2, target_modules=("v_proj",)), text.family)
    text = initialise_adapter(text, plan, seed=0)
    shape = next(entry.shape for entry in plan_for(text.model, LoraSpec(target_modules=("q_proj",)), text.family).entries)
    with pytest.raises(ConfigError, match=r"1 modules that lora's targets leave out, model\.layers\.0\.self_attn\.q_proj"):
        start_on_top(text, plan, Adapter({QUERY: pair(4, 8.0, *shape)}), "default")


@pytest.mark.parametrize(("changed", "said"), [
    ({"magnitude": torch.ones(64)}, "DoRA adapter, which is no sum"),
    ({"bias": torch.ones(64)}, "pairs have biases"),
])  # fmt: skip
def test_an_adapter_that_is_no_sum_of_pairs_is_refused(changed: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    one = pair(4, 8.0)
    folder = tmp_path / "other"
    folder.mkdir()
    peft.write(Adapter({QUERY: Pair(one.A, one.B, one.alpha, **changed)}, base="model"), folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        with_stacked(RunConfig(lora=LoraSpec(on_top_of=str(folder))))
