"""Chat templates of well-known families in Go's syntax, and which of them renders the same as a tokenizer's own.

A family is not recognised by its name: its template and the tokenizer's are rendered on sample conversations, and must be equal
character by character. The begin token is left out, as Ollama adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from lorakeet.export.go_template import render_go

_USER, _ANSWER, _QUESTION, _RULE = "Why is it so?", "Because.", 'And "now"? 3 > 2', "Be brief."
SAMPLES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", _USER),),
    (("user", _USER), ("assistant", _ANSWER), ("user", _QUESTION)),
    (("system", _RULE), ("user", _USER)),
    (("system", _RULE), ("user", _USER), ("assistant", _ANSWER), ("user", _QUESTION)),
)
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
    added = bool(bos) and tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
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
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError:
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
