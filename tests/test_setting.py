"""A setting is a dataclass field with a default and its help."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lorakeet.setting import setting


def test_a_setting_has_its_default_and_its_help() -> None:
    @dataclass(frozen=True)
    class Spec:
        rows: int | None = setting(None, "Use at most this many rows.")

    assert Spec().rows is None and Spec(4).rows == 4
    assert [dict(each.metadata) for each in fields(Spec)] == [{"help": "Use at most this many rows."}]
