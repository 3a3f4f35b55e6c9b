"""Names and regular expressions of an adapter's configuration: matched as by PEFT, with work that does not multiply."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.formats.peft import patterns
from lorakeet.formats.peft.patterns import Allowance, KeyPatterns, ends_of, nests, pattern_problem
from lorakeet.formats.peft.peft_config import PeftConfig, parse_config


def by_re(keys: list[str], path: str) -> list[str]:
    return [key for key in keys if re.match(rf"(.*\.)?({key})$", path)]


def test_keys_without_operators_are_found_as_a_regular_expression_finds_them() -> None:
    """Dots stand for any character, "^" for the beginning of the whole path."""
    draw = random.Random(0)
    for _ in range(1500):
        path = ".".join(draw.choice(["a", "b", "ab", "a-b", "layers_0", "0"]) for _ in range(draw.randint(1, 5)))
        keys = list(dict.fromkeys(_drawn_key(draw, path) for _ in range(8)))
        table = KeyPatterns("rank_pattern", dict.fromkeys(keys, 1), Allowance())
        assert [key for key, _ in table.matching(path)] == by_re(keys, path), (path, keys)


def _drawn_key(draw: random.Random, path: str) -> str:
    ends = list(ends_of(path))
    key = draw.choice([*ends, path[draw.randrange(len(path)) :], "a", ".", "a.b", "layers.0"])
    key = "".join("." if draw.random() < 0.15 else "\\." if one == "." and draw.random() < 0.5 else one for one in key)
    return draw.choice(["", "", "^"]) + key + draw.choice(["", "", "$"])


def spent_on(config: dict[str, Any], modules: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The calls into a matcher of regular expressions, or refused ones, that so many modules need."""
    calls = 0
    known = patterns.compiled

    def counted(used: str) -> Any:
        nonlocal calls
        calls += 1
        return known(used)

    monkeypatch.setattr(patterns, "compiled", counted)
    found = parse_config({"r": 4, "lora_alpha": 8, **config}, "x")
    for number in range(modules):
        path = f"model.layers.{number}.self_attn.q_proj"
        found.rank_of(path), found.alpha_of(path), found.targets(path), found.parameters_at(path)
    return calls


def test_thirty_thousand_keys_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload with so many took 83 s, as each key was matched to each module."""
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(30_000)]
    table = {f"^{re.escape(name)}": 2 for name in names[:15_000]} | dict.fromkeys(names[15_000:], 2)
    config = {"rank_pattern": table, "alpha_pattern": table, "target_modules": names, "exclude_modules": ["x"]}
    assert spent_on({**config, "target_parameters": [f"{name}.weight" for name in names]}, 300, monkeypatch) == 0


def test_expressions_are_few_and_tried_once_for_each_module(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {rf"layers\.{number}\..*": 2 for number in range(patterns.MOST)}
    assert spent_on({"rank_pattern": keys}, 3, monkeypatch) == 3 * patterns.MOST
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match="has 101 regular expressions; expected at most 100"):
            parse_config({"r": 4, "lora_alpha": 8, name: {**keys, "(a)": 3}}, "x")
    for name, most in (("modules_to_save", 1000), ("layers_pattern", 100)):
        with pytest.raises(ConfigError, match=f"{name} has {most + 1:,} entries"):
            parse_config({"r": 4, "lora_alpha": 8, name: ["a"] * (most + 1)}, "x")


def test_all_matches_share_one_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(patterns, "time", type("_", (), {"thread_time": lambda: next(ticks) * 0.01}))
    found = parse_config({"r": 4, "lora_alpha": 8, "rank_pattern": {"(q|v)_proj": 2}}, "x")
    with pytest.raises(ConfigError, match="the regular expressions of rank_pattern take too long"):
        for number in range(1000):
            found.rank_of(f"layers.{number}.q_proj")
    assert 20 < number < 60, "some 25 modules at twice 10 ms"


@pytest.mark.parametrize(
    "key", [r"(?:.*a.*|.*b.*).*.*.*.*.*.*[xy]?z", r".*(.).*\1.*\1.*\1.*\1.*\1.*[!?]", r"(?=.*.*.*.*.*.*[xy][yz])b"]
)
def test_a_slow_match_ends(key: str) -> None:
    """No thread waits for it meanwhile: `regex` lets others run."""
    config = PeftConfig(4, 8.0, target_modules=key)
    try:
        config.targets("ab." * 90 + "q")
    except ConfigError as error:
        assert "take too long" in str(error)


@pytest.mark.parametrize(
    ("key", "nested"),
    [
        ("q_proj", False), ("a|b|c", False), ("(a|b)(c|d)", False), ("a?b?", False), ("a{2,5}", False),
        (r".*\.(q|v)_proj", False), (r"[+*?]\+\*", False), (r".*.*.*.*", False), (r"(a*)?", False), (r"(a+){1}", False),
        ("(a+)+", True), ("(a|b)*", True), ("(a?)+", True), ("((a{1000}){1000}){1000}", True), ("(a*){0,2}", True),
        ("(a*){2}", True), ("(a*){,5}", True), ("(?#x)", True), ("(?>a)", True), ("(?(1)a|b)", True),
    ],
)  # fmt: skip
def test_a_group_with_several_ways_is_not_repeated(key: str, nested: bool) -> None:
    assert nests(key) is nested


def test_what_regex_takes_otherwise_is_refused() -> None:
    for key in ("(?:foo){e<=1}", "[[:alpha:]]", "(?i)[\\u0080-\\U0010ffff]", "ä+", "[a--b]+"):
        assert "may take for ever" in pattern_problem(key, key), key
