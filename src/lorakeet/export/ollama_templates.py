"""Chat templates of the well-known families in Go's syntax, and which of them says the same as a tokenizer's own.

A family is not recognised by its name: its template is rendered on sample conversations beside the tokenizer's, and taken
where all of them come out equal, character by character. The begin token is left out, as Ollama adds it itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from lorakeet.export.go_template import render_go

_USER, _ANSWER, _ASKED, _RULE = "Why is it so?", "Because.", "And \"now\"? 3 > 2", "Be brief."
SAMPLES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", _USER),),
    (("user", _USER), ("assistant", _ANSWER), ("user", _ASKED)),
    (("system", _RULE), ("user", _USER)),
    (("system", _RULE), ("user", _USER), ("assistant", _ANSWER), ("user", _ASKED)),
)
_PLACE = "\u2402system\u2403"  # stands for a default system prompt while its text is looked for


@dataclass(frozen=True)
class GoTemplate:
    """A family's template and the texts at which Ollama is to stop."""

    family: str
    text: str
    stops: tuple[str, ...]


def _turns(opening: str, closing: str, answer: str) -> str:
    """A template whose turns all look alike, the role within `opening`."""
    return f"{{{{- range .Messages }}}}{opening}{{{{ .Content }}}}{closing}{{{{ end }}}}{answer}"


def _instructions(before: str, after: str, answer: str, system: str) -> str:
    """Mistral's template: [INST] around what the user says, the end token after answers; the system prompt as `system` says."""
    return (
        '{{- range $i, $m := .Messages }}{{ if eq .Role "user" }}[INST]' + before + system + "{{ .Content }}" + after
        + '[/INST]{{ else if eq .Role "assistant" }}' + answer + "{{ .Content }}</s>{{ end }}{{ end }}"
    )  # fmt: skip


_FIRST_USER = "{{ if and $.System (eq $i 1) }}{{ $.System }}\n\n{{ end }}"
_GEMMA = (
    '{{- range $i, $m := .Messages }}{{ if eq .Role "user" }}<start_of_turn>user\n' + _FIRST_USER
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
    """The template that says the same as the tokenizer's, and the system prompt that it puts where none is given."""

    template: GoTemplate
    default_system: str = ""
    knows_system: bool = True


def recognise(tokenizer: Any) -> Recognised | None:
    """The family of a tokenizer's chat template, or None where no template of the table renders all samples alike."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = [_asked(tokenizer, sample) for sample in SAMPLES]
    bos = str(tokenizer.bos_token or "")
    added = bool(bos) and tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    begun = bool(bos) and all(said is None or said.startswith(bos) for said in asked)
    bare = [None if said is None else said.removeprefix(bos) for said in asked]
    ways = [(bare, "")] if added and begun else [(asked, ""), (bare, bos)] if begun else [(asked, "")]
    for wanted, first in ways:
        for known in TEMPLATES:
            found = _compare(known, wanted)
            if found is not None:
                return replace(found, template=replace(known, text=first + known.text))
    return None


def _asked(tokenizer: Any, sample: Sequence[tuple[str, str]]) -> str | None:
    """What the tokenizer renders; None where its template refuses the conversation."""
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
    told = [render_conversation(template.text, (("system", system), *sample)) for sample in SAMPLES[:2]]
    return Recognised(template, system, knows) if list(plain) == told else None


def render_conversation(template: str, conversation: Sequence[tuple[str, str]]) -> str:
    """What Ollama makes of a conversation: its system turn is a message and stands in .System too."""
    messages = [{"Role": role, "Content": content} for role, content in conversation]
    system = "\n\n".join(content for role, content in conversation if role == "system")
    return render_go(template, {"Messages": messages, "System": system, "Response": ""})


