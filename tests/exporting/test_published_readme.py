"""The card of a repository names it, and the base by its id."""

from __future__ import annotations

from lorakeet.exporting.published_readme import published_readme

CARD = "---\nbase_model: /a/folder\nlicense: mit\n---\n# A\n---\nload(\"THIS FOLDER\"), a=THIS_FOLDER\n"


def test_the_base_and_the_repository_are_named() -> None:
    found = published_readme(CARD, "me/x", base="plants/tiny", relation="adapter")
    front, body = found.split("---\n", 2)[1:]
    assert front == "base_model: plants/tiny\nbase_model_relation: adapter\nlicense: mit\n"
    assert body == '# A\n---\nload("me/x"), a=me/x\n'


def test_without_a_base_the_front_stays() -> None:
    found = published_readme(CARD, "me/x", base="", relation="adapter")
    assert found.startswith("---\nbase_model: /a/folder\nlicense: mit\n---\n")
