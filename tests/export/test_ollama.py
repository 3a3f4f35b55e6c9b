"""`export.ollama`: the Modelfile and the request say the same; what a Modelfile cannot hold is refused."""

from __future__ import annotations

import pytest

from lorakeet.errors import ConfigError
from lorakeet.export.ollama import OllamaModel, describe_template
from tiny.models import tiny_tokenizer


def test_the_modelfile_of_a_known_family() -> None:
    said: list[str] = []
    model = describe_template(tiny_tokenizer(), system="Be brief.", adapter=True, say=said.append)
    assert not said and model.family == "ChatML"
    lines = model.modelfile().splitlines()
    assert lines[:2] == ["FROM ./model.gguf", "ADAPTER ./adapter.gguf"]
    assert lines[2].startswith('TEMPLATE """{{- range .Messages }}')
    assert 'SYSTEM """Be brief."""' in lines and 'PARAMETER stop """<|im_end|>"""' in lines
    body = model.request("m", {"model.gguf": "sha256:1", "adapter.gguf": "sha256:2"})
    assert body["files"] == {"model.gguf": "sha256:1"} and body["adapters"] == {"adapter.gguf": "sha256:2"}
    assert (body["template"], body["system"]) == (model.template, "Be brief.")
    assert body["parameters"] == {"stop": list(model.stops)}


def test_an_unknown_template_is_said_and_left_to_the_file() -> None:
    tokenizer, said = tiny_tokenizer(), []
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    model = describe_template(tokenizer, system="", adapter=False, say=said.append)
    assert len(said) == 1 and "no TEMPLATE" in said[0]
    assert model.modelfile() == 'FROM ./model.gguf\nPARAMETER stop """<|im_end|>"""\n'


def test_three_quotation_marks_are_refused() -> None:
    with pytest.raises(ConfigError, match="three quotation marks"):
        OllamaModel(system='say """').modelfile()
