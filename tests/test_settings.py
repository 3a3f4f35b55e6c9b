"""`settings`: mappings to dataclasses and back, with every problem at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.errors import ConfigError, Problems
from lorakeet.settings import choices, describe, fields_of, load, override, to_mapping


@dataclass(frozen=True)
class Engine:
    path: str = field(default="tiny", metadata={"help": "Folder of the model."})
    dtype: Literal["auto", "bf16", "none"] = field(default="auto", metadata={"help": "Compute type."})
    cache: Path | None = field(default=None, metadata={"help": "Where copies are kept."})


@dataclass(frozen=True)
class Wing:
    rank: int = field(default=4, metadata={"help": "Rank."})
    alpha: float = field(default=12.0, metadata={"help": "Alpha."})
    targets: tuple[str, ...] = field(default=("all",), metadata={"help": "Modules."})
    ranks: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by name."})
    packing: bool = field(default=True, metadata={"help": "Packing."})
    limit: int | None = field(default=None, metadata={"help": "Limit."})

    def validate(self) -> list[str]:
        found = [f"wing.rank is {self.rank}; it must be 1 or more."] if self.rank < 1 else []
        return found + ([f"wing.alpha is {self.alpha:g}; it must be above 0."] if self.alpha <= 0 else [])


@dataclass(frozen=True)
class Craft:
    engine: Engine = field(default_factory=Engine, metadata={"help": "Engine.", "shorthand": "path"})
    wing: Wing = field(default_factory=Wing, metadata={"help": "Wing."})
    seed: int = field(default=0, metadata={"help": "Seed."})


@dataclass(frozen=True)
class Order:
    run: str = field(metadata={"help": "Folder of the run."})
    out: Path = field(metadata={"help": "Folder to write."})


def complaint(mapping: Any, cls: Any = Craft, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(cls, mapping, where="drug.yaml", **more)
    return str(caught.value)


def test_nothing_given_keeps_every_default() -> None:
    assert load(Craft, {}, where="x") == Craft()
    assert load(Craft, {"wing": None}, where="x") == Craft(), "a section whose lines are all commented out"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"wing": {"rnak": 8}}, "Unknown key 'wing.rnak' in drug.yaml. Did you mean 'wing.rank'?"),
        ({"wnig": {}}, "Unknown key 'wnig' in drug.yaml. Did you mean 'wing'?"),
        ({"rank": 8}, "Unknown key 'rank' in drug.yaml. Did you mean 'wing.rank'?"),
        ({"wing": {"seed": 8}}, "Unknown key 'wing.seed' in drug.yaml. Did you mean 'seed'?"),
        ({"zzz": 8}, "Unknown key 'zzz' in drug.yaml. Known keys here: engine, wing, seed."),
        ({"wing": {"rank": "many"}}, "wing.rank in drug.yaml is 'many' (text); expected a whole number."),
        ({"wing": {"rank": 1.5}}, "wing.rank in drug.yaml is 1.5 (a number); expected a whole number."),
        ({"wing": {"rank": True}}, "wing.rank in drug.yaml is True (true or false); expected a whole number."),
        ({"wing": {"rank": None}}, "wing.rank in drug.yaml is empty; expected a whole number."),
        ({"wing": {"rank": [8]}}, "wing.rank in drug.yaml is [8] (a list); expected a whole number."),
        ({"wing": {"alpha": float("nan")}}, "wing.alpha in drug.yaml is nan (a number); expected a number."),
        ({"wing": {"alpha": "0,5"}}, "wing.alpha in drug.yaml is '0,5' (text); expected a number. Write 0.5, with a point."),
        ({"wing": {"rank": "0,5"}}, "wing.rank in drug.yaml is '0,5' (text); expected a whole number."),
        ({"wing": {"alpha": "inf"}}, "wing.alpha in drug.yaml is 'inf' (text); expected a number."),
        ({"wing": {"packing": 1}}, "wing.packing in drug.yaml is 1 (a whole number); expected true or false."),
        ({"wing": {"targets": 5}}, "wing.targets in drug.yaml is 5 (a whole number); expected a list (text each)."),
        ({"wing": {"ranks": "q"}}, "wing.ranks in drug.yaml is 'q' (text); expected a mapping from names (a whole number each)."),
        ({"wing": {"limit": "x"}}, "wing.limit in drug.yaml is 'x' (text); expected a whole number, or none."),
        ({"wing": "fast"},
         "wing in drug.yaml is 'fast' (text); expected a mapping with keys rank, alpha, targets, ranks, packing, limit."),
        ({"engine": {"dtype": "bf61"}},
         "engine.dtype in drug.yaml is 'bf61' (text); expected one of 'auto', 'bf16', 'none'. Did you mean 'bf16'?"),
        ({"engine": {"path": 1.5}}, "engine.path in drug.yaml is 1.5 (a number); expected text."),
        ({"wing": {"rank": 0}}, "wing.rank is 0; it must be 1 or more."),
        (["a"], "The whole in drug.yaml is ['a'] (a list); expected a mapping with keys engine, wing, seed."),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(mapping: Any, message: str) -> None:
    assert complaint(mapping) == message


def test_all_problems_are_listed_at_once() -> None:
    text = complaint({"engine": {"dtype": "x"}, "wing": {"rank": 0, "alpha": -1}, "sede": 3, "seed": "no"})
    assert text.startswith("drug.yaml cannot be used (5 problems):")
    for part in ("engine.dtype", "wing.rank is 0", "wing.alpha is -1", "Unknown key 'sede'", "seed in drug.yaml is 'no'"):
        assert part in text


def test_validate_may_raise_its_problems_too() -> None:
    @dataclass(frozen=True)
    class Raising:
        low: int = 0
        high: int = 0

        def validate(self) -> None:
            problems = Problems("Raising cannot be used")
            for name in ("low", "high"):
                if getattr(self, name) < 0:
                    problems.add(f"{name} is negative.")
            problems.raise_if_any()

    assert complaint({"low": -1}, Raising) == "low is negative."
    assert complaint({"low": -1, "high": -2, "hihg": 1}, Raising).splitlines()[0] == "drug.yaml cannot be used (3 problems):"


def test_missing_values_are_listed_with_their_help() -> None:
    text = complaint({}, Order)
    assert "run is missing in drug.yaml; expected text. Folder of the run." in text
    assert "out is missing in drug.yaml; expected a path. Folder to write." in text
    assert load(Order, {"run": 7, "out": "here"}, where="x") == Order("7", Path("here"))


def test_a_flag_is_named_as_the_source_of_its_value() -> None:
    text = complaint({"wing": {"rank": "x"}}, origins={"wing.rank": "flag --wing.rank"})
    assert text.startswith("wing.rank (flag --wing.rank) is 'x'")


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("wing.rank", "8", 8), ("wing.rank", "1e3", 1000), ("wing.rank", 8.0, 8),
        ("wing.alpha", "1e-3", 1e-3), ("wing.alpha", 8, 8.0),
        ("wing.packing", "false", False), ("wing.packing", "On", True), ("wing.limit", "none", None), ("wing.limit", "7", 7),
        ("wing.targets", "q_proj, v_proj", ("q_proj", "v_proj")), ("wing.targets", ["a,b"], ("a,b",)), ("wing.targets", "", ()),
        ("wing.ranks", "q=8,v=2", {"q": 8, "v": 2}), ("wing.ranks", {"q": "8"}, {"q": 8}),
        ("engine.dtype", "none", "none"), ("engine.cache", "none", None), ("engine.cache", "a/b", Path("a/b")),
        ("engine", "other", "other"),
    ],
)
def test_text_is_read_as_the_declared_type(path: str, text: Any, expected: Any) -> None:
    craft = load(Craft, override(Craft, {}, path, text), where="x")
    value: Any = craft
    for name in path.split("."):
        value = getattr(value, name)
    value = value.path if path == "engine" else value
    assert value == expected and type(value) is type(expected)


def test_a_shorthand_text_stands_beside_dotted_flags() -> None:
    given_ = override(Craft, {"engine": "big"}, "engine.dtype", "bf16")
    assert load(Craft, given_, where="x").engine == Engine("big", "bf16")
    again = override(Craft, given_, "engine", "small")
    assert load(Craft, again, where="x").engine == Engine("small", "bf16")


def test_override_leaves_its_argument_and_wrong_sections_alone() -> None:
    mapping = {"wing": {"rank": 2}}
    assert override(Craft, mapping, "wing.alpha", "3") == {"wing": {"rank": 2, "alpha": "3"}}
    assert mapping == {"wing": {"rank": 2}}
    assert "expected a mapping" in complaint(override(Craft, {"wing": [1]}, "wing.alpha", "3"))


def test_fields_of_lists_every_leaf_in_order() -> None:
    leaves = fields_of(Craft)
    assert [leaf.path for leaf in leaves] == [
        "engine.path", "engine.dtype", "engine.cache",
        "wing.rank", "wing.alpha", "wing.targets", "wing.ranks", "wing.packing", "wing.limit", "seed",
    ]
    assert leaves[0].shorthand == "engine" and leaves[1].shorthand == ""
    assert (leaves[3].default, leaves[3].help, leaves[3].section) == (4, "Rank.", "wing")
    assert leaves[6].default == {} and leaves[9].section == ""


def test_types_are_described_in_words() -> None:
    assert describe(Literal["a", "b"] | None) == "one of 'a', 'b', or none"
    assert describe(Literal["none", "b"] | None) == "one of 'none', 'b'"
    assert describe(tuple[int, ...]) == "a list (a whole number each)"
    assert choices(Literal["a", "b"] | None) == ("a", "b") and choices(int | None) == ()


@settings(deadline=None)
@given(
    st.builds(
        Craft,
        engine=st.builds(Engine, path=st.text(), dtype=st.sampled_from(["auto", "bf16", "none"])),
        wing=st.builds(
            Wing,
            rank=st.integers(1, 512),
            alpha=st.floats(1e-9, 1e9),
            targets=st.lists(st.text(), max_size=3).map(tuple),
            ranks=st.dictionaries(st.text(), st.integers(1, 9), max_size=3),
            packing=st.booleans(),
            limit=st.none() | st.integers(),
        ),
        seed=st.integers(),
    )
)
def test_to_mapping_and_load_are_inverse(craft: Craft) -> None:
    assert load(Craft, to_mapping(craft), where="x") == craft
