"""`merge.combine`: the combined adapter is the sum in ΔW space for every kind of pair, and what has no sum is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.core.adapter import Adapter, TokenRows
from lorakeet.errors import ConfigError
from lorakeet.formats.peft import peft
from lorakeet.merging.combine import (
    METHODS,
    CombineSpec,
    Contribution,
    combination,
    combine_changes,
    drop_by_magnitude,
    drop_random,
)
from lorakeet.merging.merged_folder import merge_into
from tiny.adapters import random_adapter, random_pair
from tiny.dense import change
from tiny.models import tiny_model

WEIGHTS = (0.7, -0.4)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("llama", ()),
    "gpt2": ("gpt2", ("c_attn", "wte")),
    "mixtral": ("mixtral", ("q_proj", "gate_up_proj", "down_proj")),
}


def two(family: str, *leaves: str) -> dict[str, Adapter]:
    """Two adapters that differ in rank, alpha and scale rule, of which the second lacks the first one's last matrix."""
    model = tiny_model(family)
    one = random_adapter(model, *leaves)
    other = random_adapter(model, *leaves, seed=4, rank=6, alpha=5.0, scale_rule="alpha/sqrt(rank)")
    lacking = dict(list(other.pairs.items())[:-1])
    return {"one": one, "other": replace(other, pairs=lacking)}


def wanted(adapters: dict[str, Adapter], path: str) -> torch.Tensor:
    found = [w * change(a.pairs[path]) for a, w in zip(adapters.values(), WEIGHTS, strict=True) if path in a.pairs]
    return torch.stack(found).sum(0)


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_exact_in_delta_space(case: str, method: str) -> None:
    adapters = two(CASES[case][0], *CASES[case][1])
    found = combination(adapters, CombineSpec(method, WEIGHTS)).combined()
    assert set(found.adapter.pairs) == set(adapters["one"].pairs)
    for path, pair in found.adapter.pairs.items():
        whole = wanted(adapters, path)
        assert float((change(pair) - whole).norm() / whole.norm()) < 1e-6
    assert found.error == 0.0 or found.error < 1e-6
    some, all_of_them = len(adapters["other"].pairs), len(adapters["one"].pairs)
    said = f"other changes {some} of the {all_of_them} matrices; for the others it counts as no change."
    assert combination(adapters, CombineSpec()).notes == (said,)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_gives_the_best_approximation_and_its_error(case: str) -> None:
    adapters = two(CASES[case][0], *CASES[case][1])
    found = combination(adapters, CombineSpec("linear", WEIGHTS, rank=5)).combined()
    lost = whole = 0.0
    for path, pair in found.adapter.pairs.items():
        exact = wanted(adapters, path)
        error = float((change(pair) - exact).norm() / exact.norm())
        assert pair.rank == min(5, 4 if path not in adapters["other"].pairs else 5)
        values = torch.linalg.svdvals(exact)
        best = float((values[..., 5:].square().sum() / values.square().sum()).sqrt())
        assert error == pytest.approx(best, abs=1e-5) and found.errors[path] == pytest.approx(error, abs=1e-5)
        lost, whole = lost + error**2 * float(exact.norm()) ** 2, whole + float(exact.norm()) ** 2
    assert found.error == pytest.approx((lost / whole) ** 0.5, abs=1e-5) and found.error > 0.05


def test_svd_keeps_the_largest_rank_that_goes_in() -> None:
    found = combination(two("llama"), CombineSpec("svd", WEIGHTS)).combined()
    ranks = {path.rpartition(".")[2]: pair.rank for path, pair in found.adapter.pairs.items()}
    assert ranks["q_proj"] == 6 and found.error > 0.01


def test_convolutions_are_combined() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3, 3)
    adapters = {name: Adapter({"conv": random_pair("conv2d", weight)}) for name in ("a", "b")}
    found = combination(adapters, CombineSpec("linear", WEIGHTS)).combined()
    torch.testing.assert_close(change(found.adapter.pairs["conv"]), wanted(adapters, "conv"), atol=1e-6, rtol=0)
    assert found.adapter.pairs["conv"].A.shape == (8, 3, 3, 3)
    low = combination(adapters, CombineSpec("ties", WEIGHTS, rank=3)).combined().adapter.pairs["conv"]
    assert low.A.shape == (3, 3, 3, 3) and low.B.shape == (8, 3, 1, 1)


@pytest.mark.parametrize("method", ["magnitude", "ties", "dare", "della"])
@pytest.mark.parametrize("case", CASES)
def test_a_pruned_change_at_full_rank_is_the_one_that_is_folded(case: str, method: str, tmp_path: Path) -> None:
    """The two ways out, an adapter and a model, agree where the rank is large enough to lose nothing."""
    family, leaves = CASES[case]
    adapters = two(family, *leaves)
    spec = CombineSpec(method, (0.7, 0.4), rank=512, density=0.4, seed=5)
    found = combination(adapters, spec).combined()
    assert found.error < 1e-5
    tiny_model(family).save_pretrained(tmp_path / "base")
    plan = combination(adapters, spec)
    merge_into(tmp_path / "base", plan.outline(), tmp_path / "dense", change=plan.change)
    merge_into(tmp_path / "base", found.adapter, tmp_path / "folded")
    dense, folded = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "folded"))
    base = dict(tiny_model(family).named_parameters(remove_duplicate=False))
    moved = 0
    for (name, one), (_, other) in zip(
        dense.named_parameters(remove_duplicate=False), folded.named_parameters(remove_duplicate=False), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
        moved += int(not torch.equal(one, base[name]))
    assert moved == len(found.adapter.pairs)


def test_the_true_scale_survives_the_disk(tmp_path: Path) -> None:
    adapters = two("llama")
    found = combination(adapters, CombineSpec("linear", WEIGHTS, rank=5)).combined().adapter
    peft.write(found, tmp_path / "adapter")
    again = peft.read(tmp_path / "adapter")
    for path, pair in found.pairs.items():
        torch.testing.assert_close(change(again.pairs[path]), change(pair))


def test_biases_are_summed_with_their_scales() -> None:
    adapters = {
        name: Adapter({"a.q_proj": random_pair("linear", torch.randn(6, 5), rank=2, bias=torch.ones(6))}) for name in ("a", "b")
    }
    pair = combination(adapters, CombineSpec("linear", WEIGHTS)).combined().adapter.pairs["a.q_proj"]
    assert pair.bias is not None
    torch.testing.assert_close(pair.bias * pair.scale, torch.full((6,), 6 * 0.3))
    with pytest.raises(ConfigError, match=r"a has biases in its pairs \(first a\.q_proj\), which ties cannot combine"):
        combination({"a": adapters["a"]}, CombineSpec("ties")).combined()


def test_equal_extras_and_rows_stay(tmp_path: Path) -> None:
    rows = TokenRows((3,), torch.ones(1, 32))
    parts = {"extras": {"model.norm.weight": torch.ones(32)}, "token_rows": {"model.embed_tokens": rows}}
    adapters = {name: replace(adapter, **parts) for name, adapter in two("llama").items()}
    found = combination(adapters, CombineSpec()).combined().adapter
    assert set(found.extras) == {"model.norm.weight"} and found.token_rows["model.embed_tokens"] == rows
    under = replace(two("llama")["one"], extras={"model.layers.0.mlp.up_proj.weight": torch.ones(2)})
    assert combination({"a": under, "b": two("llama")["other"]}, CombineSpec()).combined().adapter.extras


TYPE = {"model_type": "glm4_moe"}


@pytest.mark.parametrize(
    ("other", "kept"), [({}, TYPE), ({"model_type": "olmoe", "a": "b"}, {"a": "b"}), (TYPE | {"a": "b"}, TYPE | {"a": "b"})]
)
def test_metadata_that_is_not_contradicted_stays(other: dict[str, str], kept: dict[str, str]) -> None:
    first, second = two("llama").values()
    adapters = {"a": replace(first, metadata=TYPE | {"a": "b"}), "b": replace(second, metadata=other)}
    plan = combination(adapters, CombineSpec())
    assert plan.combined().adapter.metadata == kept == plan.outline().metadata


def test_everything_that_has_no_sum_is_listed() -> None:
    one, other = two("llama").values()
    path = "model.layers.0.self_attn.q_proj"
    odd = replace(
        other,
        pairs={**other.pairs, path: random_pair("linear", torch.randn(7, 9))},
        extras={"model.norm.weight": torch.ones(32), "lm_head.weight": torch.ones(2)},
        token_rows={"model.embed_tokens": TokenRows((1,), torch.ones(1, 32))},
    )
    dora = random_adapter(tiny_model("llama"), "v_proj", dora=True)
    whole = replace(one, extras={"model.norm.weight": torch.zeros(32)})
    with pytest.raises(ConfigError) as raised:
        combination({"one": whole, "odd": odd, "dora": dora}, CombineSpec())
    said = str(raised.value)
    for words in (
        "These adapters cannot be combined (5 problems)",
        f"{path} is linear (32, 32) in one and linear (7, 9) in odd",
        "dora is a DoRA adapter (2 pairs, first model.layers.0.self_attn.v_proj)",
        "one, odd trained model.norm.weight whole, dora did not",
        "odd trained lm_head.weight whole, one, dora did not",
        "The trained token rows of model.embed_tokens differ",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (CombineSpec("tied"), "method is 'tied'; expected one of linear, .*Did you mean 'ties'"),
        (CombineSpec(rank=0), "rank is 0; expected 1 or more"),
        (CombineSpec("cat", rank=4), "cat keeps every factor, so rank 4 has no meaning"),
        (CombineSpec("dare", density=0.0), "density is 0.0; expected more than 0"),
        (CombineSpec(weights=(1.0,)), "There are 1 weights for 2 adapters"),
        (CombineSpec(weights=(1.0, float("nan"))), "The weights 1.0, nan are not all numbers"),
    ],
)
def test_settings_without_meaning_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combination(two("llama"), spec).combined()


def test_extras_that_differ_are_named() -> None:
    one, other = two("llama").values()
    adapters = {
        "one": replace(one, extras={"model.norm.weight": torch.zeros(32)}),
        "other": replace(other, extras={"model.norm.weight": torch.ones(32)}),
    }
    with pytest.raises(ConfigError, match=r"model\.norm\.weight was trained whole and differs between one, other"):
        combination(adapters, CombineSpec()).combined()


def parts(*changes: Any, weights: tuple[float, ...] = (), seed: int = 0) -> list[Contribution]:
    weights = weights or (1 / len(changes),) * len(changes)
    return [
        Contribution(lambda change=change: torch.tensor(change).float().clone(), weight, seed + number)
        for number, (change, weight) in enumerate(zip(changes, weights, strict=True))
    ]


def random_parts(count: int, weights: tuple[float, ...], seed: int = 0) -> list[Contribution]:
    torch.manual_seed(1)
    return parts(*(torch.randn(40, 60).tolist() for _ in range(count)), weights=weights, seed=seed)


def test_ties_by_hand() -> None:
    """Trim half of each, elect the sign of the sum, average those that agree (arXiv 2306.01708, figure 1)."""
    one, other = [[4.0, -3.0, 0.1, 0.2]], [[-1.0, -5.0, 6.0, 0.5]]
    found = combine_changes(METHODS["ties"], parts(one, other), density=0.5)
    assert found.tolist() == [[4.0, -4.0, 6.0, 0.0]]


def test_an_adapter_that_leaves_the_matrix_alone_has_no_vote() -> None:
    found = combine_changes(METHODS["ties"], parts([[3.0]], weights=(0.5,)), density=1.0, total=1.0)
    assert found.tolist() == [[3.0]]


def test_magnitude_keeps_the_largest_of_each() -> None:
    found = combine_changes(METHODS["magnitude"], parts([[4.0, 1.0], [-3.0, 2.0]], [[0.0, 8.0], [1.0, 2.0]]), density=0.5)
    assert found.tolist() == [[2.0, 4.0], [-1.5, 1.0]]


@pytest.mark.parametrize("name", METHODS)
def test_where_nothing_is_dropped_and_all_agree_every_method_is_the_weighted_sum(name: str) -> None:
    torch.manual_seed(0)
    changes = [torch.rand(5, 7).tolist(), torch.rand(5, 7).tolist()]
    found = combine_changes(METHODS[name], parts(*changes, weights=(0.7, 0.6)), density=1.0)
    torch.testing.assert_close(found, 0.7 * torch.tensor(changes[0]) + 0.6 * torch.tensor(changes[1]))


@pytest.mark.parametrize("prune", [drop_random, drop_by_magnitude])
def test_random_pruning_keeps_the_share_and_the_expectation(prune: Any) -> None:
    torch.manual_seed(0)
    change = torch.randn(30, 50)
    draws = torch.stack([prune(change, 0.3, torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert float((draws != 0).float().mean()) == pytest.approx(0.3, abs=0.003)
    standard_error = draws.std(0) / 20
    assert float(((draws.mean(0) - change) / standard_error).abs().mean()) < 1.0  # 0.8 for a normal deviate


@pytest.mark.parametrize("name", ["dare", "della"])
def test_chance_is_seeded(name: str) -> None:
    first, second, other = (
        combine_changes(METHODS[name], random_parts(2, (0.5, 0.5), seed), density=0.5) for seed in (0, 0, 10)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
