"""torch's private operators are called as their schemas are, in the torch that is installed and in the oldest allowed one.

A private operator may change with any release. What the oldest release says stands in private_operators.json, taken from its
package; a call that fits both and every release between needs no branch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.requirements import Requirement

from structure.tree import ROOT, SOURCE, source_files

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("private_operators.json").read_text(encoding="utf-8"))
WINDOW = ("window_size_left", "window_size_right")


class Call(NamedTuple):
    """How the code calls an operator: arguments by position, by name, and how many results it takes (at least)."""

    positional: int
    named: tuple[str, ...] = ()
    results: int = 1


CALLS = {
    "aten::_flash_attention_forward": Call(10, ("scale", *WINDOW), 2),
    "aten::_flash_attention_backward": Call(14, ("scale", *WINDOW), 3),
    "aten::_efficient_attention_forward": Call(11, ("scale", "window_size"), 2),
    "aten::_efficient_attention_backward": Call(16, ("scale", "window_size"), 4),
    "aten::_scaled_dot_product_flash_attention_for_cpu": Call(5, ("scale",), 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": Call(8, ("scale",), 3),
    "aten::_softmax_backward_data": Call(4),
    "aten::_embedding_bag_per_sample_weights_backward": Call(6),
    "aten::_int_mm": Call(2),
}
COUNTED = {"_local_scalar_dense", "_grouped_mm", "_linalg_svd", "_linalg_eigh"}  # memory/ledger knows them and calls none
OF_A_BUILD = {"mkldnn"}  # operators that not every build of torch has: kernels/onednn tries them before it uses them


def fits(schema: Any, call: Call) -> str:
    """Why a call does not fit a schema; empty if it does."""
    places = [argument for argument in schema.arguments if not argument.kwarg_only]
    names = {argument.name for argument in schema.arguments}
    if call.positional > len(places):
        return f"takes {len(places)} arguments by position, and gets {call.positional}"
    if unknown := {*call.named} - names:
        return f"has no argument {min(unknown)}"
    given = {argument.name for argument in places[: call.positional]}
    if twice := given & {*call.named}:
        return f"gets {min(twice)} twice"
    missing = [each.name for each in schema.arguments if each.name not in given | {*call.named} and not each.has_default_value()]
    if missing:
        return f"wants {missing[0]} as well"
    return "" if len(schema.returns) >= call.results else f"gives {len(schema.returns)} results, and {call.results} are taken"


def installed(name: str) -> Any:
    operator, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, operator), overload or "default")._schema


@pytest.mark.parametrize("name", CALLS)
def test_calls_fit_the_installed_torch(name: str) -> None:
    assert not (why := fits(installed(name), CALLS[name])), f"{name} of torch {torch.__version__} {why}: {installed(name)}"


@pytest.mark.parametrize("name", CALLS)
def test_calls_fit_the_oldest_torch(name: str) -> None:
    schema = torch._C.parse_schema(RECORDED["schemas"][name])
    assert schema.name == name.partition(".")[0]
    assert not (why := fits(schema, CALLS[name])), f"{name} of torch {RECORDED['torch']} {why}: {schema}"


def test_the_recorded_torch_is_the_oldest_allowed_one() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    need = Requirement(re.findall(r'"(torch[><=][^"]+)"', text)[0])
    assert RECORDED["torch"].startswith("2.11.") and need.specifier.contains(RECORDED["torch"])
    assert not need.specifier.contains("2.10.9")


def test_every_private_operator_that_is_called_is_here() -> None:
    known = {name.removeprefix("aten::").partition(".")[0] for name in CALLS}
    found: dict[str, set[str]] = {}
    for path in source_files():
        text = (SOURCE / path.relative_to(SOURCE)).read_text(encoding="utf-8")
        for namespace, name in re.findall(r"torch\.ops\.(\w+)\.(_[a-z]\w*)", text):
            found.setdefault(namespace, set()).add(name)
        for name in re.findall(r"\btorch\.(_(?:foreach|int|grouped|weight|scaled|efficient|flash)\w+)\(", text):
            found.setdefault("aten", set()).add(name)
    assert found.pop("aten") == known | COUNTED and {*found} <= OF_A_BUILD
    assert not COUNTED & known


def test_a_call_that_does_not_fit_is_found() -> None:
    schema = torch._C.parse_schema("aten::_x(Tensor a, int b, *, float? scale=None) -> (Tensor, Tensor)")
    assert fits(schema, Call(2, ("scale",), 2)) == ""
    assert "takes 2 arguments by position" in fits(schema, Call(3)) and "wants b as well" in fits(schema, Call(1))
    assert "no argument window" in fits(schema, Call(2, ("window",))) and "gives 2 results" in fits(schema, Call(2, (), 3))
    assert "gets b twice" in fits(schema, Call(2, ("b",)))
