"""`export.card`: the run's own figures stand in it, the front matter is YAML, and nothing is claimed that is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from lorakeet.errors import visible
from lorakeet.evaluate.certificate import Certificate, Unchecked, tolerance_check
from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report.report import Report, SystemResult
from lorakeet.evaluate.verdict import Phrase, Verdict
from lorakeet.exporting.card import CardFacts, card, licence_of

FACTS = CardFacts(
    title="reviews",
    base_model="org/model",
    files={"model.gguf": "the model"},
    usage=["llama-server -m model.gguf"],
    library="gguf",
    licence="apache-2.0",
    datasets=("hub:org/reviews#train", "private.jsonl"),
    notes=("A note.",),
)
ACCURACY = Estimate(0.8125, 0.75, 0.86, 64, "wilson")
REPORT = Report(
    "A run",
    facts={"Rows": "90 training | 10 held-out", "Run folder": "runs/a"},
    verdict=Verdict((Phrase("The adapter is better", "+0.10, 95 % 0.02 to 0.18"),), "better"),
    systems=(SystemResult("adapter", "adapter", {"accuracy": ACCURACY}),),
    warnings=("There are no test rows.",),
)


def front_of(text: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(text.split("---")[1])
    return found


def test_figures_files_and_checks() -> None:
    check = tolerance_check("logits", {"mean_kl": 0.0}, tolerance={"mean_kl": 1e-6}, between=("live", "file"), n=9)
    text = card(FACTS, REPORT, Certificate("x", (check,)))
    assert "**The adapter is better (+0.10, 95 % 0.02 to 0.18).**" in text
    assert "| adapter | 81.2 % [75.0, 86.0 %] | 64 |" in text
    assert "90 training \\| 10 held-out" in text and "runs/a" not in text
    assert "All checks passed." in text and "- There are no test rows." in text and "- A note." in text
    front = front_of(text)
    assert front["base_model"] == "org/model" and front["license"] == "apache-2.0" and front["datasets"] == ["org/reviews"]


def test_what_is_not_known_is_not_stated() -> None:
    text = card(CardFacts("a", "b", {}, ["c"]), None, None)
    assert set(front_of(text)) == {"base_model", "base_model_relation", "pipeline_tag", "tags"}
    assert "does not say its licence" in text and "How good it is" not in text and "trained?" not in text


def test_a_base_is_named_to_a_hub_only_if_it_is_there(tmp_path: Path) -> None:
    for name in (str(tmp_path), str(tmp_path / "gone"), "model.gguf", "package:nothing/model.gguf"):
        text = card(replace(FACTS, base_model=name), None, None)
        assert not {"base_model", "base_model_relation"} & set(front_of(text)) and str(tmp_path) not in text


def test_a_failed_check_is_said() -> None:
    check = tolerance_check("logits", {"mean_kl": 1.0}, tolerance={"mean_kl": 1e-6}, between=("live", "file"))
    assert "do not use it" in card(FACTS, None, Certificate("x", (check,)))
    own = tolerance_check("x", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    missing = Unchecked("http://x", "the stored weights", "a server does not tell them")
    text = card(FACTS, None, Certificate("x", (own, replace(check, name="run-merged/: logits")), unchecked=(missing,)))
    assert "The own checks passed; run-merged/ failed." in text and "do not use it" not in text
    assert "- not checked: the stored weights of http://x, since a server does not tell them" in text


def test_the_licence_of_a_base(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == ""
    readme = tmp_path / "README.md"
    nothing = ("# no front", "---\n[broken\n---", "---\n- a\n---")
    for text, licence in (("---\nlicense: mit\n---\n# A", "mit"), *((text, "") for text in nothing)):
        readme.write_text(text)
        assert licence_of(tmp_path) == licence


HOSTILE = (  # as labels, templates or names
    "<img src=x onerror=alert(1)>", "<!-- hidden", "[click](http://x)", "![](http://x)", "**good**", "_good_", "~~no~~", "$x$",
    "`code` ``` more", "a | b", "# head", "- item", "1. item", "> said", "=", "+ plus", "    four", "&lt;b&gt;", "a_b", "C++",
    "<=50K", "line\n\n# two", "{text}\n***", "\\", "c:\\|d", "--- x: y ---", "\x1b[31mred",
)  # fmt: skip


def full_card(given: str) -> str:
    """A card that has the text at every place."""
    facts = replace(FACTS, title=given, base_model=f"org/{given}", files={given: given}, usage=[given], notes=(given,),
                    settings={given: given}, base_form=given, licence=given)  # fmt: skip
    comparison = Comparison(given, given, "accuracy", ACCURACY, 0.5, "test", True, "better")
    report = replace(REPORT, verdict=Verdict((Phrase(given, ""),), "better"), warnings=(given,), facts={given: given},
                     systems=(SystemResult(given, "adapter", {"accuracy": ACCURACY}),), comparisons=(comparison,))  # fmt: skip
    return card(facts, report, Certificate("x", (), unchecked=(Unchecked(given, given, given),)))


def parsed(text: str) -> tuple[list[str], list[str]]:
    """The kinds of the tokens of a card's Markdown, and what a reader sees of each."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    _, _, body = text.split("---\n", 2)
    every = [part for token in reader.parse(body) for part in (token, *(token.children or ()))]
    return [part.type for part in every if part.type not in ("text", "text_special")], [
        "".join(part.content for part in token.children) for token in reader.parse(body) if token.children
    ]


@pytest.mark.parametrize("given", HOSTILE)
def test_what_a_label_a_template_or_a_name_holds_is_text_alone(given: str, tmp_path: Path) -> None:
    text = full_card(given)
    kinds, shown = parsed(text)
    assert kinds == parsed(full_card("plain"))[0]
    said = visible(" ".join(given.splitlines()).strip())
    assert {said, f"{said}: {said}"} <= set(shown) and any(line.endswith(f" ({said}) with Lorakeet.") for line in shown)
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == given
