"""Reads YAML of strangers: plain values only, and no more of them than a person writes, however aliases multiply them.

Aliases make a text of 300 bytes stand for thousands of millions of values. The work is counted on the parsed nodes, each once,
before any value is made.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from lorakeet.errors import ConfigError

LARGEST = 1 << 20  # characters
MOST_VALUES = 100_000  # with what aliases repeat
LONGEST_NUMBER = 300  # characters; a double has 17 digits, and its largest number 309
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
RESOLVERS = (  # of plain values: tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
)


def parse_yaml(text: str, where: object) -> Any:
    """The value that a YAML text describes; None for an empty one. ConfigError names `where` and the line of what is wrong."""
    if len(text) > LARGEST:
        raise ConfigError(f"{where} has {len(text):,} characters; expected at most {LARGEST:,}. Is it the right file?")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Checked().count(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where} is not valid YAML{line}: {error.problem:.500}. Fix it there and run again.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error!s:.500}.") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply; expected sections with keys. Fix it and run again.") from None
    except Exception as error:  # whatever the library raises at odd values
        raise ConfigError(f"{where} is not valid YAML ({type(error).__name__}: {error!s:.300}). Fix it and run again.") from error


class _Checked:
    """Counts values, and refuses what is not plain."""

    def __init__(self) -> None:
        self._sizes: dict[yaml.Node, int | None] = {}  # None while its parts are counted

    def count(self, node: yaml.Node) -> int:
        """The values of a node, those of repeated parts as often as they are repeated. ConstructorError for too many."""
        if node in self._sizes:
            size = self._sizes[node]
            if size is None:
                raise _refused("it contains itself", node)
            return size
        if node.tag not in _PLAIN:
            raise _refused(f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!'):.80} is not taken; write a plain value", node)
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
                raise _refused(f"a number of {len(node.value):,} characters is not taken; at most {LONGEST_NUMBER} are", node)
            return 1
        self._sizes[node] = None
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(part,) for part in node.value]
        size = 1 + sum(self.count(part) for pair in pairs for part in pair)
        if size > MOST_VALUES:
            raise _refused(f"aliases make {size:,} values of it; at most {MOST_VALUES:,} are taken", node)
        self._sizes[node] = size
        return size


def _refused(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `no` and `off` are text, 1e-3 is a number, a date is text; a key given twice is refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML reads it from the class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key '{key.value:.80}' is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
