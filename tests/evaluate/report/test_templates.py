"""Templates escape what they show, and refuse a name that is not given."""

from __future__ import annotations

import jinja2
import pytest

from lorakeet.evaluate.report.templates import page_templates


def test_texts_are_escaped_and_missing_names_are_errors() -> None:
    pages = page_templates({"page": "<p>{{ said }}</p>"}.__getitem__)
    assert pages.get_template("page").render(said="<script>") == "<p>&lt;script&gt;</p>"
    with pytest.raises(jinja2.UndefinedError):
        pages.get_template("page").render()
