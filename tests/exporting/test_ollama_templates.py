"""Ollama's chat templates: each family is recognised by what its template says; the subset of Go's text/template."""

from __future__ import annotations

from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.exporting.ollama_templates import SAMPLES, recognise, render_conversation, render_go
from tiny.models import tiny_tokenizer

LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}"
JINJA = {
    "ChatML": LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant\n{% endif %}",
    "Llama 3": LOOP
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + PROMPT
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "Gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + LOOP
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    + PROMPT
    + "<start_of_turn>model\n{% endif %}",
    "Phi-3": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}" + PROMPT + "<|assistant|>\n{% endif %}",
    "Zephyr": LOOP + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}" + PROMPT + "<|assistant|>\n{% endif %}",
    "Mistral": LOOP
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    + "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
    "Mistral Tekken": LOOP
    + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>"
    + "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
}


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", JINJA)
def test_a_family_is_recognised_and_says_the_same(family: str) -> None:
    tokenizer = with_template(JINJA[family])
    found = recognise(tokenizer)
    assert found is not None and found.template.family == family and found.default_system == ""
    talk = (*SAMPLES[1][:2], ("user", "One more?"))
    messages = [{"role": role, "content": content} for role, content in talk]
    assert render_conversation(found.template.text, talk) == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert found.knows_system is (family not in ("Gemma", "Mistral", "Mistral Tekken"))


def test_a_default_system_prompt_is_found() -> None:
    default = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    found = recognise(with_template(default + JINJA["ChatML"]))
    assert found is not None and found.default_system == "Be kind." and found.template.family == "ChatML"


@pytest.mark.parametrize("template", [LOOP + "({{ m.role }}) {{ m.content }}{% endfor %}", JINJA["ChatML"] + "!", None])
def test_other_templates_are_not_guessed(template: str | None) -> None:
    assert recognise(with_template(template)) is None  # type: ignore[arg-type]


VALUES = {"System": "S", "None": "", "Messages": [{"Role": "user", "Content": "u"}, {"Role": "assistant", "Content": "a"}]}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{ .System }} b", "a S b"),
        ("a {{- .System -}} b", "aSb"),
        ("{{ if .None }}x{{ else if .System }}y{{ else }}z{{ end }}!", "y!"),
        ("{{ if .None }}x{{ else if .None }}y{{ else }}z{{ end }}!", "z!"),
        ("{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}", "[user:u][assistant:a]"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ $.System }} {{ end }}", "0userS 1assistantS "),
        ('{{ range .Messages }}{{ if eq .Role "user" }}U{{ else }}A{{ end }}{{ end }}', "UA"),
        ("{{ range .None }}x{{ else }}empty{{ end }}", "empty"),
        ('{{ if and .System (ne .System "T") }}yes{{ end }}', "yes"),
        ("{{ if or .None (not .None) }}yes{{ end }}", "yes"),
        ('{{ "a\\nb" }}', "a\nb"),
        ("no actions", "no actions"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert render_go(template, VALUES) == text


@pytest.mark.parametrize(
    "template",
    ["{{ if .System }}x", "x{{ end }}", "{{ slice .System 1 }}", "{{ .System | len }}", "{{ $x }}", "{{ range .Messages }}"],
)
def test_what_is_not_understood_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="template"):
        render_go(template, VALUES)
