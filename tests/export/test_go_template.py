"""`export.go_template`: the part of Go's text/template that is used; the expected texts follow the rules of its documentation."""

from __future__ import annotations

import pytest

from lorakeet.errors import ConfigError
from lorakeet.export.go_template import render_go

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
