from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.values import decode, encode, from_text, put_text, to_text


@dataclass(frozen=True)
class Leaf:
    size: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    named: dict[str, Leaf] = field(default_factory=dict)
    top: Leaf | None = None
    grid: tuple[tuple[int, ...], ...] = ()


def test_round_trip_with_infinity_and_nothing() -> None:
    tree = Tree((Leaf(1.5), Leaf(math.inf, "b")), {"x": Leaf(-math.inf)}, None, ((1, 2), (3,)))
    assert from_text(Tree, to_text(tree), where="tree.json") == tree
    assert math.isnan(decode(Leaf, encode(Leaf(math.nan))).size)


def test_text_is_strict_json() -> None:
    json.loads(to_text(Leaf(math.nan)), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"size": 1.0, "knd": "a"}, "Did you mean 'kind'?"),
        ({"kind": "a"}, "lacks the key 'size'"),
        ({"size": "large"}, "'large'; expected a number"),
        ({"size": True}, "True; expected a number"),
        ({"size": 1, "kind": "c"}, "expected one of 'a', 'b'"),
        ([1], "expected dict"),
        ({"size": 10**400}, "has 401 digits; expected a number that fp64 can hold"),
    ],
)
def test_wrong_data_is_named(data: object, words: str) -> None:
    with pytest.raises(DataError, match="Leaf") as caught:
        decode(Leaf, data)
    assert words in str(caught.value)


def test_broken_text_names_the_line() -> None:
    with pytest.raises(DataError, match=r"report\.json is not JSON: line 2"):
        from_text(Leaf, '{"size":\n oops}', where="report.json")


def test_numbers_and_texts_that_could_be_written_nowhere_are_refused() -> None:
    for digits in (10**400, 2**63):
        with pytest.raises(DataError, match=r"x has \d+ digits; expected a whole number below 2\^63"):
            from_text(int, str(digits), where="x")
    with pytest.raises(DataError, match=r"report\.json is not JSON: .*surrogates not allowed"):
        from_text(dict[str, str], '{"size": "\\ud800"}', where="report.json")
    assert from_text(dict[str, str], '{"size": "\\ud83d\\ude00"}', where="report.json") == {"size": "😀"}


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path) -> None:
    put_text(tmp_path / "a.json", "one")
    with pytest.raises(UnicodeEncodeError):
        put_text(tmp_path / "a.json", "two \ud800")  # no UTF-8
    assert (tmp_path / "a.json").read_text() == "one" and len(list(tmp_path.iterdir())) == 1
    put_text(tmp_path / "a.json", "three")
    assert (tmp_path / "a.json").read_text() == "three" and len(list(tmp_path.iterdir())) == 1


def test_foreign_types_are_refused() -> None:
    with pytest.raises(TypeError, match="complex"):
        encode(1j)
