"""Renders the part of Go's text/template that Ollama's chat templates use, to check what Ollama will render.

    {{ .Role }}  {{ $.System }}  {{ $i }}  {{ "text" }}   values        {{- … -}}   white space before or after is cut
    {{ if X }} … {{ else if Y }} … {{ else }} … {{ end }}               {{ range .L }}, {{ range $i, $m := .L }} … {{ end }}
    eq A B, ne A B, and A B, or A B, not A, parentheses, whole numbers

Anything else is refused, so that every template that is used was understood.
Documented at https://pkg.go.dev/text/template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakeet.errors import ConfigError

_ACTION = re.compile(r"(\{\{-\s|\{\{)(.*?)(\s-\}\}|\}\})", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\d+|[()]|:=|,|\$?\.?[A-Za-z_][\w.]*|\$[\w.]*|\.')


@dataclass
class _Node:
    words: list[str]  # of the action; empty for plain text
    text: str = ""
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


def render_go(template: str, values: Mapping[str, Any]) -> str:
    """Renders `template` as Go does for `values` (with Go's names: Messages, System, Role, Content)."""
    tree, closing = _parse(iter(_pieces(template)))
    if closing:
        raise ConfigError(f"The template has an {{{{ {' '.join(closing)} }}}} without an opening action.")
    out: list[str] = []
    _run(tree, values, {"$": values}, out)
    return "".join(out)


def _pieces(template: str) -> list[_Node]:
    """Plain texts and actions alternating, with white space trimmed by the actions."""
    found: list[_Node] = []
    position, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()].lstrip() if trim else template[position : match.start()]
        found.append(_Node([], text.rstrip() if match.group(1).startswith("{{-") else text))
        words = _WORD.findall(match.group(2))
        if "".join(words) != re.sub(r"\s+(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", "", match.group(2)):
            raise ConfigError(f"The template has {match.group()!r}, which is not understood here.")
        found.append(_Node(words))
        position, trim = match.end(), match.group(3).startswith((" -", "\n-", "\t-"))
    text = template[position:]
    found.append(_Node([], text.lstrip() if trim else text))
    return found


def _parse(pieces: Iterator[_Node]) -> tuple[list[_Node], list[str]]:
    """Nodes up to the `else` or `end` of this level, and its words; no words at the end of the template."""
    nodes: list[_Node] = []
    for piece in pieces:
        first = piece.words[0] if piece.words else ""
        if first in ("else", "end"):
            return nodes, piece.words
        if first in ("if", "range"):
            _fill(piece, pieces)
        nodes.append(piece)
    return nodes, []


def _fill(node: _Node, pieces: Iterator[_Node]) -> None:
    """Reads what belongs to an `if` or `range`, up to its `end`."""
    node.body, closing = _parse(pieces)
    if closing[:2] == ["else", "if"]:
        node.otherwise, closing = [_Node(closing[1:])], ["end"]
        _fill(node.otherwise[0], pieces)  # its `end` closes the whole chain
    elif closing[:1] == ["else"]:
        node.otherwise, closing = _parse(pieces)
    if closing != ["end"]:
        raise ConfigError(f"The template has a {{{{ {node.words[0]} }}}} without its {{{{ end }}}}.")


def _run(nodes: Sequence[_Node], dot: Any, names: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if not node.words:
            out.append(node.text)
        elif node.words[0] == "if":
            _run(node.body if _value(iter(node.words[1:]), dot, names) else node.otherwise, dot, names, out)
        elif node.words[0] == "range":
            _repeat(node, dot, names, out)
        else:
            out.append(str(_value(iter(node.words), dot, names)))


def _repeat(node: _Node, dot: Any, names: dict[str, Any], out: list[str]) -> None:
    words, bound = node.words[1:], []
    if ":=" in words:
        place = words.index(":=")
        bound, words = [word for word in words[:place] if word != ","], words[place + 1 :]
    items = list(_value(iter(words), dot, names))
    for index, item in enumerate(items):
        values = (index, item) if len(bound) == 2 else (item,)
        _run(node.body, item, {**names, **dict(zip(bound, values, strict=False))}, out)
    if not items:
        _run(node.otherwise, dot, names, out)


def _value(words: Iterator[str], dot: Any, names: Mapping[str, Any]) -> Any:
    """The value of the words up to a closing parenthesis, or to the end."""
    operands, function = [], None
    for word in words:
        if word == ")":
            break
        if word == "(":
            operands.append(_value(words, dot, names))
        elif word in _FUNCTIONS and not operands and function is None:
            function = _FUNCTIONS[word]
        else:
            operands.append(_operand(word, dot, names))
    if function is not None:
        return function(*operands)
    if len(operands) != 1:
        raise ConfigError(f"The template has {operands!r} where one value is expected, which is not understood here.")
    return operands[0]


_FUNCTIONS: dict[str, Any] = {
    "eq": lambda left, *right: any(left == one for one in right),
    "ne": lambda left, right: left != right,
    "and": lambda *all_of: next((one for one in all_of if not one), all_of[-1]),
    "or": lambda *any_of: next((one for one in any_of if one), any_of[-1]),
    "not": lambda one: not one,
}


def _operand(word: str, dot: Any, names: Mapping[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1].encode("latin-1", "backslashreplace").decode("unicode_escape")
    if word.isdigit():
        return int(word)
    head, *path = word.split(".")
    if head and head not in names:
        raise ConfigError(f"The template uses {word!r}, which is not understood here.")
    value = names[head] if head else dot
    for key in path:
        value = value.get(key, "") if key and isinstance(value, Mapping) else value
    return value
