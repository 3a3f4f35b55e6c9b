"""Tables and pages of results escape what stands in them."""

from __future__ import annotations

import re

import pytest

import lorakeet as lk
from lorakeet.api.display import ShownCertificate, table_of
from lorakeet.evaluate.certificate import Certificate, Check, Unchecked
from tiny.models import tiny_model


def test_cells_are_escaped() -> None:
    assert table_of([("a", "b"), ("<i>", 1.5)]) == (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>&lt;i&gt;</td><td>1.5</td></tr></table>"
    )


@pytest.mark.slow
def test_a_plan_is_a_table_of_phases(tiny_llama_folder: object) -> None:
    plan = lk.load(str(tiny_llama_folder), budget="4GiB").plan(lk.Lora(rank=4), tokens=32)
    page = plan._repr_html_()
    head, *body = re.findall(r"<tr>(.*?)</tr>", page)
    assert "<th>runtime</th>" in head and head.endswith("<th>together</th>")
    assert len(body) == len(plan.result.planned.forecast.phases) and "export (a command of its own)" in page
    peak = f"{plan.peak / 2**30:.2f} GiB</b> of a budget of 4.00" if plan.peak >= 2**30 else f"{plan.peak / 2**20:.0f} MiB</b>"
    assert peak in page and "14 pairs" in page and "<summary>Time, targets" in page


def test_attached_pairs_are_a_table() -> None:
    plan = lk.attach(tiny_model("llama"), lk.Lora(rank=4, target_modules=("q_proj",)))
    assert str(plan).splitlines()[0].split() == ["weights", "shape", "rank", "scale", "trained", "parameters"]
    assert "layers.[0-1].self_attn.q_proj" in str(plan) and "2 pairs" in str(plan).splitlines()[-1]
    assert plan._repr_html_().count("<tr>") == 2 and repr(plan) == plan.summary()


def test_a_certificate_is_a_table_of_its_checks() -> None:
    check = Check("logits", "saved", "<live>", {"largest": 0.5, "agreement": 1.0}, {"largest": 0.1, "agreement": 0.9},
                  passed=False, n=3, floors=("agreement",))  # fmt: skip
    shown = ShownCertificate.of(Certificate("runs/a", (check,), unchecked=(Unchecked("a", "b", "c"),)))
    page = shown._repr_html_()
    assert "<b>Failed</b>" in page and "<td>≤ 0.1</td>" in page and "<td>≥ 0.9</td>" in page and "&lt;live&gt;" in page
    assert "<li>not checked: b of a, since c</li>" in page
    assert str(shown).startswith("runs/a: Failed\nFAIL  logits") and not shown.passed
