"""Tables and pages of results escape what stands in them."""

from __future__ import annotations

from lorakeet.api.display import table_of


def test_cells_are_escaped() -> None:
    assert table_of([("a", "b"), ("<i>", 1.5)]) == (
        "<table><tr><th>a</th><th>b</th></tr><tr><td>&lt;i&gt;</td><td>1.5</td></tr></table>"
    )
