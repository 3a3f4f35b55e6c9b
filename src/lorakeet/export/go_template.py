"""Renders the part of Go's text/template that Ollama's chat templates use, to check what Ollama will render.

    {{ .Role }}  {{ $.System }}  {{ $i }}  {{ "text" }}   values        {{- … -}}   white space before or after is cut
    {{ if X }} … {{ else if Y }} … {{ else }} … {{ end }}               {{ range .L }}, {{ range $i, $m := .L }} … {{ end }}
    eq A B, ne A B, and A B, or A B, not A, parentheses, whole numbers

Anything else is refused, so that every template that is used was understood.
Documented at https://pkg.go.dev/text/template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    tree, rest, closing = _parse(_pieces(template), 0)
    if closing or rest:
        raise ConfigError(f"The template has an {{{{ {' '.join(closing) or 'end'} }}}} without an opening action.")
    out: list[str] = []
    _run(tree, values, {"$": values}, out)
    return "".join(out)


def _pieces(template: str) -> list[_Node]:
    """Plain texts and actions alternating, with white space trimmed by the actions."""
    found: list[_Node] = []
    position, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        found.append(_Node([], text.rstrip() if match.group(1).startswith("{{-") else text))
        words = _WORD.findall(match.group(2))
        if "".join(words) != re.sub(r"\s+(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", "", match.group(2)):
            raise ConfigError(f"The template has {match.group()!r}, which is not understood here.")
        found.append(_Node(words))
        position, trim = match.end(), match.group(3).startswith((" -", "\n-", "\t-"))
    text = template[position:]
    found.append(_Node([], text.lstrip() if trim else text))
    return found


def _parse(pieces: list[_Node], position: int) -> tuple[list[_Node], int, list[str]]:
    """Nodes up to the `else` or `end` of this level, the position after it (0 at the end of the template), and its words."""
    nodes: list[_Node] = []
    while position < len(pieces):
        piece = pieces[position]
        position += 1
        first = piece.words[0] if piece.words else ""
        if first in ("else", "end"):
            return nodes, position, piece.words
        if first in ("if", "range"):
            piece.body, position, closing = _parse(pieces, position)
            if closing[:2] == ["else", "if"]:
                pieces.insert(position, _Node(closing[1:]))
                piece.otherwise, position, closing = _parse_chain(pieces, position)
            elif closing[:1] == ["else"]:
                piece.otherwise, position, closing = _parse(pieces, position)
            if closing != ["end"]:
                raise ConfigError(f"The template has a {{{{ {first} }}}} without its {{{{ end }}}}.")
        nodes.append(piece)
    return nodes, 0, []


def _parse_chain(pieces: list[_Node], position: int) -> tuple[list[_Node], int, list[str]]:
    """The `if` of an `else if`; its `end` closes the whole chain."""
    node = pieces[position]
    node.body, position, closing = _parse(pieces, position + 1)
    if closing[:2] == ["else", "if"]:
        pieces.insert(position, _Node(closing[1:]))
        node.otherwise, position, closing = _parse_chain(pieces, position)
    elif closing[:1] == ["else"]:
        node.otherwise, position, closing = _parse(pieces, position)
    return [node], position, closing


def _run(nodes: Sequence[_Node], dot: Any, names: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if not node.words:
            out.append(node.text)
        elif node.words[0] == "if":
            _run(node.body if _value(node.words[1:], dot, names) else node.otherwise, dot, names, out)
        elif node.words[0] == "range":
            _repeat(node, dot, names, out)
        else:
            out.append(str(_value(node.words, dot, names)))


def _repeat(node: _Node, dot: Any, names: dict[str, Any], out: list[str]) -> None:
    words, bound = node.words[1:], []
    if ":=" in words:
        place = words.index(":=")
        bound, words = [word for word in words[:place] if word != ","], words[place + 1 :]
    items = list(_value(words, dot, names))
    for index, item in enumerate(items):
        inner = dict(names)
        for name, value in zip(bound[-2:], (index, item) if len(bound) == 2 else (item,), strict=False):
            inner[name] = value
        _run(node.body, item, inner, out)
    if not items:
        _run(node.otherwise, dot, names, out)


def _value(words: Sequence[str], dot: Any, names: Mapping[str, Any]) -> Any:
    operands, position = [], 0
    while position < len(words):
        if words[position] == "(":
            depth, start = 1, position + 1
            while depth and position + 1 < len(words):
                position += 1
                depth += {"(": 1, ")": -1}.get(words[position], 0)
            operands.append(_value(words[start:position], dot, names))
        else:
            operands.append(_operand(words[position], dot, names) if position or words[0] not in _FUNCTIONS else words[0])
        position += 1
    if words and words[0] in _FUNCTIONS:
        return _FUNCTIONS[words[0]](*operands[1:])
    if len(operands) != 1:
        raise ConfigError(f"The template has {' '.join(words)!r}, which is not understood here.")
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
