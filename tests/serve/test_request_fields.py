"""Fields of a request: types are checked, null is left out, and what is unknown is refused with the nearest name."""

from __future__ import annotations

from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.serve.request_fields import Fields


def test_values_and_defaults() -> None:
    fields = Fields({"a": "x", "n": 2, "f": 1.5, "yes": True, "list": ["p", "q"], "one": "p", "none": None, "inner": {"k": 1}})
    assert (fields.text("a"), fields.text("z", "d"), fields.number("f", 0), fields.number("none", 7)) == ("x", "d", 1.5, 7)
    assert (fields.whole("n"), fields.whole("none", 4), fields.flag("yes"), fields.flag("none", True)) == (2, 4, True, True)
    assert (fields.texts("list"), fields.texts("one"), fields.texts("none")) == (("p", "q"), ("p",), ())
    assert fields.inner("inner").whole("k") == 1 and fields.inner("none").data == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.text("n"), "n in the request is a number; expected a string"),
        (lambda f: f.text("z"), "z is missing in the request"),
        (lambda f: f.number("yes", 0), "yes in the request is true or false; expected a number"),
        (lambda f: f.number("huge", 0), "huge in the request is a number of 401 digits"),
        (lambda f: f.whole("f"), "expected a whole number"),
        (lambda f: f.flag("n"), "expected true or false"),
        (lambda f: f.texts("mixed"), "a string or a list of strings"),
        (lambda f: f.inner("n"), "n of the request must be a JSON object, not a number"),
        (lambda f: Fields([1]), "must be a JSON object, not a list"),
        (lambda f: f.refuse({"n", "f", "yes"}, {"mixed", "huge"}, {"penalty": 0}), "penalty is 1, which this server does not"),
        (lambda f: Fields({"images": ["x" * 999]}).refuse((), (), {"images": []}), "images is .{100}…, which this"),
        (lambda f: f.refuse({"n", "fs", "yes", "penalty"}, {"mixed", "huge"}, {}), r"f in the request is not known here\."),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(Fields({"n": 2, "f": 1.5, "yes": True, "mixed": ["p", 3], "penalty": 1, "huge": 10**400}))


def test_neutral_values_pass() -> None:
    Fields({"n": 1, "penalty": 0, "user": "me", "other": None}).refuse({"n"}, {"user"}, {"penalty": 0})
