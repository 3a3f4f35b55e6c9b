"""The table of targets of a plan, what moved of it, and what is said in words."""

from __future__ import annotations

from typing import Any

import pytest

from lorakeet.core.plan import ExtraEntry, ModelWeight, Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.kinds import trained_targets
from lorakeet.kinds.trained_targets import (
    Moved,
    remarks_before,
    remarks_of_peft,
    stayed,
    target_rows,
    warnings_after,
)
from lorakeet.models.families import family_of
from lorakeet.models.targets import plan_for
from tiny.models import tiny_model
from tiny.outlines import outline


def planned(model: Any, **settings: Any) -> Plan:
    return plan_for(model, LoraSpec(**{"rank": 4, "alpha": 8.0, **settings}), family_of(model.config))


def moves(plan: Plan, **changes: tuple[bool, ...]) -> dict[str, tuple[bool, ...]]:
    """Everything moved, but for `changes` by the end of their path with `__` for dots."""
    found = {}
    for entry in plan.entries:
        for factor in "AB":
            count = entry.shape[0] if entry.kind == "experts" else 1
            ending = next((end for end in changes if f"{entry.path}.{factor}".endswith(end.replace("__", "."))), "")
            found[f"{entry.path}.{factor}"] = changes[ending] if ending else (True,) * count
    return found


def test_rows_count_the_weights_of_the_plan_by_kind() -> None:
    rows = {row.kind: row for row in target_rows(planned(outline("qwen3_next")))}
    assert {kind: (row.tensors, row.pairs) for kind, row in rows.items()} == {
        "embeddings": (1, 0), "norms, biases, other vectors": (20, 0), "convolution": (3, 0), "DeltaNet": (9, 9),
        "router": (8, 0), "experts": (8, 8), "shared experts": (12, 12), "attention": (4, 4), "head": (1, 0),
    }  # fmt: skip
    assert rows["experts"].experts == 16 and rows["router"].left["a router, adapted by name only"] == 4
    assert target_rows(Plan(())) == ()


def test_a_wrapper_s_vision_tower_has_a_line_of_its_own() -> None:
    rows = {row.kind: row for row in target_rows(planned(outline("gemma3")))}
    assert rows["vision tower"].pairs == 0 and rows["vision tower"].left["outside the text part, adapted by name only"] == 16
    assert rows["attention"].pairs == rows["attention"].tensors == 16


def test_whole_modules_and_new_rows_are_no_pairs() -> None:
    weights = (ModelWeight("head", "head", "x"), ModelWeight("emb", "embeddings", "x"), ModelWeight("up", "MLP", ""))
    extras = (ExtraEntry("emb", "rows", (2, 8), ("<a>",), tied="head"),)
    rows = {row.kind: (row.pairs, row.whole, row.left) for row in target_rows(Plan((), extras, 0, weights))}
    assert rows == {"head": (0, 1, {}), "embeddings": (0, 1, {}), "MLP": (0, 0, {"cut to rank 0": 1})}


def test_what_moved_is_counted_for_a_and_b() -> None:
    plan = planned(tiny_model("llama"))
    found = Moved(moves(plan, layers__0__self_attn__q_proj__B=(False,)))
    rows = {row.kind: (row.pairs, row.moved, row.moved_a) for row in target_rows(plan, found)}
    assert rows["attention"] == (8, 7, 8) and rows["MLP"] == (6, 6, 6)


def test_a_pair_that_stayed_is_named_and_equal_places_share_a_line() -> None:
    plan = planned(tiny_model("llama"))
    found = Moved(moves(plan, up_proj__B=(False,), layers__1__self_attn__q_proj__B=(False,), o_proj__A=(False,)))
    assert stayed(plan, found) == ("model.layers.[0-1].mlp.up_proj", "model.layers.1.self_attn.q_proj")
    assert next(warnings_after(plan, found)) == "Trained, but did not move: model.layers.[0-1].mlp.up_proj."
    assert not stayed(plan, Moved(moves(plan))) and not stayed(plan, Moved({}))


def test_experts_that_stayed_are_named_with_their_tokens() -> None:
    plan = planned(tiny_model("mixtral"))
    tokens = {"model.layers.0.mlp.experts": [5, 0, 7, 0], "model.layers.1.mlp.experts": [1, 2, 3, 4]}
    still = moves(plan, layers__0__mlp__experts__down_proj__B=(True, False, True, False))
    assert stayed(plan, Moved(still, tokens)) == (
        "model.layers.0.mlp.experts.down_proj: 2 of 4 experts (1, 3), which saw 0 tokens",
    )
    still = moves(plan, layers__1__mlp__experts__down_proj__B=(False, False, True, False))
    assert "(0, 1, 3), which saw 1 to 4 tokens" in stayed(plan, Moved(still, tokens))[0]
    row = next(row for row in target_rows(plan, Moved(still, tokens)) if row.kind == "experts")
    assert row.tokens is not None and (row.tokens.experts, row.tokens.unseen, row.tokens.most) == (8, 2, 7)
    assert row.moved == 4  # tensors: some expert of each moved


def test_experts_that_pass_their_tokens_through_are_not_said_to_have_stayed() -> None:
    """LongCat-Flash's last experts have pairs that no token uses: tokens are counted of the others alone."""
    plan = planned(tiny_model("mixtral"))
    tokens = {"model.layers.0.mlp.experts": [5, 0, 7]}
    still = moves(plan, layers__0__mlp__experts__gate_up_proj__B=(True, True, True, False))
    assert not stayed(plan, Moved(still, tokens))
    still = moves(plan, layers__0__mlp__experts__gate_up_proj__B=(True, False, True, False))
    assert stayed(plan, Moved(still, tokens)) == (
        "model.layers.0.mlp.experts.gate_up_proj: 1 of 3 experts (1), which saw 0 tokens",
    )


def test_new_rows_that_stayed_are_named() -> None:
    extras = (ExtraEntry("emb", "rows", (2, 8), ("<a>",)), ExtraEntry("head", "module", (8,)))
    assert stayed(Plan((), extras), Moved({"emb.values": (True,), "head.weight": (False,), "head.bias": (False,)})) == ("head",)


@pytest.mark.parametrize(("name", "why"), [("dbrx", "DbrxExpertGLU"), ("jetmoe", "JetMoeParallelExperts")])
def test_experts_without_pairs_are_said_before_training(name: str, why: str) -> None:
    """DBRX's were left out without a word."""
    assert f"The experts get no pair and stay as they are: no pair fits a {why}." in remarks_before(planned(outline(name)))


def test_pairs_on_routers_are_said_and_what_the_user_left_out_is_not() -> None:
    assert any("8 router tensors get a pair" in line for line in remarks_before(planned(outline("jetmoe"))))
    assert not list(remarks_before(planned(tiny_model("mixtral"), exclude_modules=(r".*experts.*",))))
    assert not list(remarks_before(planned(tiny_model("llama"))))


def test_what_peft_refuses_is_said_before_training() -> None:
    """Mamba's out_proj, if it is named."""
    model = outline("mamba2")
    (said,) = remarks_of_peft(model.config, planned(model, target_modules=("in_proj", "out_proj")), type(model))
    assert said.startswith("PEFT 0.21") and "will not read this adapter: it refuses" in said and "out_proj" in said
    assert not list(remarks_of_peft(model.config, planned(model), type(model)))


def test_a_peft_that_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one from before it had pairs on parameters; the run goes on."""

    def fails(*_: object) -> str:
        raise ImportError("cannot import name 'ParamWrapper' from 'peft.tuners.lora'")

    monkeypatch.setattr(trained_targets, "unread_by_peft", fails)
    monkeypatch.setattr(trained_targets, "peft_version", lambda: "0.13.2")
    [said] = remarks_of_peft(None, Plan(()))
    assert said.startswith("PEFT 0.13.2 cannot be imported here (ImportError: cannot import name 'ParamWrapper'")
