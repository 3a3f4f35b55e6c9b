"""Prompts that do not name the labels are said, with a template that does: a base cannot know them."""

from __future__ import annotations

from lorakeet.data.label_names import unnamed_labels_note
from lorakeet.data.rows import Row, Turn


def rows(template: str) -> list[Row]:
    return [
        Row((Turn("user", template.format(n), False), Turn("assistant", "ab"[n % 2], True)), "ab"[n % 2], None, f"r:{n}")
        for n in range(20)
    ]


def test_a_template_that_names_them_is_offered() -> None:
    said = unnamed_labels_note(rows("Number {}"), ("net work", "bill"), "{text}", few_shot=True)
    assert said.startswith("The prompts do not name all 2 labels, so the base cannot know them") and "few-shot base sees" in said
    assert said.endswith(r"set data.template, for instance '{text}\nAnswer with one of: net work, bill'.")
    assert "few-shot" not in unnamed_labels_note(rows("Number {}"), ("net", "bill"), "{text}", few_shot=False)
    many = tuple(f"label {number}" for number in range(9))
    assert many[7] + ", …'." in unnamed_labels_note(rows("Number {}"), many, "{text}", few_shot=False)


def test_names_are_whole_words_in_every_prompt() -> None:
    labels = ("net", "bill")
    assert unnamed_labels_note(rows("NET or Bill? Number {}"), labels, "{text}", few_shot=True) == ""
    assert unnamed_labels_note(rows("nets or bill? Number {}"), labels, "{text}", few_shot=True) != ""
    some = [*rows("net or bill? {}")[:3], *rows("net? {}")[:3]]
    assert unnamed_labels_note(some, labels, "{text}", few_shot=True) != ""
    assert unnamed_labels_note(rows("Number {}"), (), "{text}", few_shot=True) == "", "rows without labels"
