"""Matches the names and regular expressions of an adapter's configuration, which may be a stranger's, with bounded work.

    key without operators ("layers.0.q_proj", "^model\\.layers\\.0")   looked up, however many keys and modules there are
    regular expression                                               at most MOST of a setting, whose parts do not nest

Python's matcher backtracks: (a+)+$ on a path of 60 characters takes practically for ever, and .*.*.*x seconds, in which no other
thread runs. So `regex` matches, which stops after a time and lets others run. It takes an expression as `re` does unless one of
its own signs stands there; those are refused. All matches of a configuration share one allowance of processor time.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Mapping

import regex

from lorakeet.errors import ConfigError
from lorakeet.formats.identity import CONFIG_NAME

MOST = 100  # regular expressions of one setting, whose compilation takes up to a millisecond each
SECONDS, SECONDS_A_MODULE = 0.5, 1e-4  # of the processor, for all matches of a configuration; ordinary ones take a tenth
_LONGEST_KEY = 1000
PLAIN = re.compile(r"\^?((?:[\w.-]|\\[.-])+)\$?")
_OF_REGEX = re.compile(
    r"\[\[|\{[^0-9,]|[^\x00-\x7f]|\\[uUxN]|[-&|~]{2}"
)  # fuzzy and POSIX classes; ranges of a million characters
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?P<\w+>|\(\?<?[:=!]|\(\?[aimsuL-]+[:)]|\(\??|(?P<repeat>(?:[*+?]|\{(?:\d+,?\d*|,\d*)\})[?+]?)|.",
    re.DOTALL,
)
SIMPLER = "Use simpler keys, such as 'layers.0.q_proj' for one module."
Lengths = tuple[int, ...]


class Allowance:
    """Processor time for the matches of one configuration: SECONDS, and SECONDS_A_MODULE for every module."""

    def __init__(self) -> None:
        self.left = SECONDS

    def match(self, used: str, path: str, pattern: str, key: str) -> regex.Match[str] | None:
        """The match of `used`, made from the value `pattern` of `key`, at the beginning of `path`; ConfigError if it is none or
        takes too long."""
        began = time.thread_time()
        try:
            if wrong := pattern_problem(pattern, used):
                raise ConfigError(f"{CONFIG_NAME}: {key} is {pattern[:80]!r}, {wrong}")
            return compiled(used).match(path, timeout=max(self.left, 1e-6), concurrent=True)
        except TimeoutError:
            self.left = 0.0
            raise self._spent(key) from None
        finally:
            self.spend(time.thread_time() - began, key)

    def spend(self, seconds: float, key: str) -> None:
        """Counts the time that one module took. ConfigError once nothing is left."""
        self.left += SECONDS_A_MODULE - seconds
        if self.left <= 0:
            raise self._spent(key)

    def _spent(self, key: str) -> ConfigError:
        return ConfigError(f"{CONFIG_NAME}: the regular expressions of {key} take too long to match. {SIMPLER}")


@functools.lru_cache(1024)
def compiled(used: str) -> regex.Pattern[str]:
    """The expression, for the matcher of `regex`."""
    return regex.compile(used)


class KeyPatterns:
    """The keys of rank_pattern or alpha_pattern, which PEFT matches to the end of a path at a dot: `(.*\\.)?(KEY)$`.

    A dot of a key stands for any character there. So a key without other operators is kept by the texts between its dots, and a
    path is cut at the same places to look it up.
    """

    def __init__(self, name: str, values: Mapping[str, float], allowance: Allowance) -> None:
        self.name, self._allowance = name, allowance
        self._items = list(values.items())
        self._cuts: dict[int, set[Lengths]] = {}  # by the number of characters: the lengths of the texts between dots
        self._plain: dict[tuple[str, ...], list[tuple[int, bool]]] = {}  # by these texts: place among the keys, whole path or not
        self._others: list[int] = []
        for place, key in enumerate(values):
            if (found := PLAIN.fullmatch(key)) is None:
                self._others.append(place)
                continue
            texts = tuple(text.replace("\0", ".") for text in found[1].replace(r"\-", "-").replace(r"\.", "\0").split("."))
            lengths = tuple(map(len, texts))
            self._cuts.setdefault(sum(lengths) + len(lengths) - 1, set()).add(lengths)
            self._plain.setdefault(texts, []).append((place, key.startswith("^")))

    def matching(self, path: str) -> list[tuple[str, float]]:
        """All keys that match the module at `path`, in order, with their values."""
        if not self._items:
            return []
        began = time.thread_time()
        found = {
            place
            for end in ends_of(path)
            for lengths in self._cuts.get(len(end), ())
            for place, whole in self._plain.get(_cut(end, lengths), ())
            if not whole or end == path
        }
        self._allowance.spend(time.thread_time() - began, self.name)
        for place in self._others:
            key = self._items[place][0]
            if self._allowance.match(rf"(.*\.)?({key})$", path, key, self.name):
                found.add(place)
        return [self._items[place] for place in sorted(found)]


def ends_of(path: str) -> Iterator[str]:
    """The path, and its ends after each dot."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _cut(text: str, lengths: Lengths) -> tuple[str, ...]:
    """The texts of these lengths, one character apart."""
    found, start = [], 0
    for length in lengths:
        found.append(text[start : start + length])
        start += length + 1
    return tuple(found)


@functools.lru_cache(1024)
def pattern_problem(key: str, used: str) -> str:
    """What is wrong with the regular expression `key`, which is matched as `used`; an empty string if it can be tried."""
    if len(key) > _LONGEST_KEY:
        return f"which is {len(key):,} characters long; expected at most {_LONGEST_KEY:,}. Split it into several."
    try:
        if not _OF_REGEX.search(key):
            re.compile(key)
            re.compile(used)
            if not nests(key):
                return ""
    except (re.error, OverflowError, RecursionError) as error:
        return f"which is not a regular expression: {error}."
    return (
        "which may take for ever to match: expected no repetition of a group that holds repetitions or alternatives, no rare "
        f"kind of (?…), and plain characters. {SIMPLER}"
    )


def nests(key: str) -> bool:
    """Whether the regular expression `key` repeats a group that holds repetitions or alternatives, or has a rare kind of (?…)."""
    groups, last = [False], False  # by open group, and of its last part: whether there are several ways to match it
    for match in _TOKEN.finditer(key):
        token = match[0]
        if match["repeat"]:
            if last and _repeats(token):
                return True
            groups[-1] = last = True
        elif token == "|":
            groups[-1], last = True, False
        elif token == ")":
            last = groups.pop()
            groups[-1] = groups[-1] or last
        elif token == "(?":
            return True
        elif token.startswith("(") and not token.endswith(")"):
            groups.append(False)
        else:
            last = False
    return False


def _repeats(token: str) -> bool:
    """True if the quantifier `token` takes its part more than once."""
    if token[0] != "{":
        return token[0] != "?"
    low, comma, high = token.rstrip("?+")[1:-1].partition(",")
    return int((high or 2) if comma else low or 0) > 1
