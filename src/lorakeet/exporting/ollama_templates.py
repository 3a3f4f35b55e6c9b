"""Chat templates of well-known families in Go's syntax, and which of them renders the same as a tokenizer's own.

A family is not recognised by its name: its template and the tokenizer's are rendered on sample conversations, and must be equal
character by character. The begin token is left out, as Ollama adds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorakeet.data.template import TemplateRefused, encoded, templated
from lorakeet.errors import ConfigError

_USER, _ANSWER, _QUESTION, _RULE = "Why is it so?", "Because.", 'And "now"? 3 > 2', "Be brief."
SAMPLES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", _USER),),
    (("user", _USER), ("assistant", _ANSWER), ("user", _QUESTION)),
    (("system", _RULE), ("user", _USER)),
    (("system", _RULE), ("user", _USER), ("assistant", _ANSWER), ("user", _QUESTION)),
)
_ACTION = re.compile(r"(\{\{-\s|\{\{)(.*?)(\s-\}\}|\}\})", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\d+|[()]|:=|,|\$?\.?[A-Za-z_][\w.]*|\$[\w.]*|\.')
_PLACE = "\u2402system\u2403"  # placeholder for a default system prompt, to find its text


@dataclass(frozen=True)
class GoTemplate:
    """A family's template and its stop texts for Ollama."""

    family: str
    text: str
    stops: tuple[str, ...]


def _turns(opening: str, closing: str, answer: str) -> str:
    """A template with equal turns of all roles, the role within `opening`."""
    return f"{{{{- range .Messages }}}}{opening}{{{{ .Content }}}}{closing}{{{{ end }}}}{answer}"


def _instructions(before: str, after: str, answer: str, system: str) -> str:
    """Mistral's template: [INST] around user messages, the end token after answers; `system` renders the system prompt."""
    return (
        '{{- range $i, $m := .Messages }}{{ if eq .Role "user" }}[INST]' + before + system + "{{ .Content }}" + after
        + '[/INST]{{ else if eq .Role "assistant" }}' + answer + "{{ .Content }}</s>{{ end }}{{ end }}"
    )  # fmt: skip


_FIRST_USER = "{{ if and $.System (eq $i 1) }}{{ $.System }}\n\n{{ end }}"
_GEMMA = (
    '{{- range $i, $m := .Messages }}{{ if eq .Role "user" }}<start_of_turn>user\n'
    + _FIRST_USER
    + "{{ .Content }}<end_of_turn>\n"
    '{{ else if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}'
    "<start_of_turn>model\n"
)
_INST_STOPS = ("[INST]", "[/INST]")
TEMPLATES: tuple[GoTemplate, ...] = (
    GoTemplate(
        "ChatML", _turns("<|im_start|>{{ .Role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n"), ("<|im_start|>", "<|im_end|>")
    ),
    GoTemplate(
        "Llama 3",
        _turns(
            "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    GoTemplate("Gemma", _GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    GoTemplate("Phi-3", _turns("<|{{ .Role }}|>\n", "<|end|>\n", "<|assistant|>\n"), ("<|end|>", "<|user|>", "<|assistant|>")),
    GoTemplate("Zephyr", _turns("<|{{ .Role }}|>\n", "</s>\n", "<|assistant|>\n"), ("<|user|>", "<|assistant|>", "</s>")),
    GoTemplate("Mistral", _instructions(" ", " ", " ", _FIRST_USER), _INST_STOPS),
    GoTemplate("Mistral 1", _instructions(" ", " ", "", _FIRST_USER), _INST_STOPS),
    GoTemplate("Mistral 3", _instructions(" ", "", " ", _FIRST_USER), _INST_STOPS),
    GoTemplate("Mistral Tekken", _instructions("", "", "", _FIRST_USER), _INST_STOPS),
)


@dataclass(frozen=True)
class Recognised:
    """The template that renders the same as the tokenizer's, and the system prompt that the tokenizer adds if none is given."""

    template: GoTemplate
    default_system: str = ""
    knows_system: bool = True


def recognise(tokenizer: Any) -> Recognised | None:
    """The family of a tokenizer's chat template, or None if no template of the table renders all samples equally."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    rendered = [_rendered(tokenizer, sample) for sample in SAMPLES]
    bos = str(tokenizer.bos_token or "")
    added = bool(bos) and encoded(tokenizer, "a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    begins = bool(bos) and all(said is None or said.startswith(bos) for said in rendered)
    bare = [None if said is None else said.removeprefix(bos) for said in rendered]
    ways = [(bare, "")] if added and begins else [(rendered, ""), (bare, bos)] if begins else [(rendered, "")]
    for wanted, first in ways:
        for known in TEMPLATES:
            found = _compare(known, wanted)
            if found is not None:
                return replace(found, template=replace(known, text=first + known.text))
    return None


def _rendered(tokenizer: Any, sample: Sequence[tuple[str, str]]) -> str | None:
    """The tokenizer's rendering; None if its template refuses the conversation."""
    messages = [{"role": role, "content": content} for role, content in sample]
    try:
        return templated(tokenizer, messages, add_generation_prompt=True)
    except TemplateRefused:
        return None


def _compare(template: GoTemplate, wanted: Sequence[str | None]) -> Recognised | None:
    plain, with_system = wanted[:2], wanted[2:]
    given = [(said, render_conversation(template.text, sample)) for said, sample in zip(with_system, SAMPLES[2:], strict=True)]
    if plain[0] is None or any(said is not None and said != ours for said, ours in given):
        return None
    knows = all(said is not None for said in with_system)
    if all(said == render_conversation(template.text, sample) for said, sample in zip(plain, SAMPLES, strict=False)):
        return Recognised(template, knows_system=knows)
    before, _, after = render_conversation(template.text, (("system", _PLACE), *SAMPLES[0])).partition(_PLACE)
    if not (plain[0].startswith(before) and plain[0].endswith(after)):
        return None
    system = plain[0][len(before) : len(plain[0]) - len(after)]
    ours = [render_conversation(template.text, (("system", system), *sample)) for sample in SAMPLES[:2]]
    return Recognised(template, system, knows) if list(plain) == ours else None


def render_conversation(template: str, conversation: Sequence[tuple[str, str]]) -> str:
    """Renders a conversation as Ollama does: the system turn is a message and also .System."""
    messages = [{"Role": role, "Content": content} for role, content in conversation]
    system = "\n\n".join(content for role, content in conversation if role == "system")
    return render_go(template, {"Messages": messages, "System": system, "Response": ""})


@dataclass
class _Node:
    words: list[str]  # of the action; empty for plain text
    text: str = ""
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


def render_go(template: str, values: Mapping[str, Any]) -> str:
    """Renders `template` as Go does for `values` (with Go's names: Messages, System, Role, Content).

    Only the part of Go's text/template that chat templates use is known (https://pkg.go.dev/text/template). Anything else is
    refused with a ConfigError, so that every template that is used was understood:

        {{ .Role }}  {{ $.System }}  {{ $i }}  {{ "text" }}   values        {{- … -}}   white space before or after is cut
        {{ if X }} … {{ else if Y }} … {{ else }} … {{ end }}               {{ range .L }}, {{ range $i, $m := .L }} … {{ end }}
        eq A B, ne A B, and A B, or A B, not A, parentheses, whole numbers
    """
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
