"""The content of an adapter by name; the laws over verbs are in tests/laws/test_certified_content."""

from __future__ import annotations

from lorakeet.formats.identity import content_differences


def test_what_differs_is_named_and_settings_show_both_values() -> None:
    certified = {"tensor a": "1", "config r": "4", "tensor b": "2"}
    found = content_differences(certified, {"tensor a": "3", "config r": "8", "tensor c": "2"})
    assert found[0] == "config r has changed (4 certified, 8 found)"
    assert found[1:] == ["tensor a has changed", "tensor b is missing", "tensor c is new"]
