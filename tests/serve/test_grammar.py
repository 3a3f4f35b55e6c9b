"""JSON by a schema: whatever the model would write, the text is an instance of the schema; wrong schemas are refused in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.serve.engine import Request
from lorakeet.serve.grammar import ANY_OBJECT, GrammarFailed, Grammars
from lorakeet.serve.sampling import Sampling, TokenSampler

SCHEMA = {
    "type": "object",
    "properties": {"drug": {"enum": ["aspirin", "statin"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["drug", "stars"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def text(tiny_llama_folder: Path) -> Any:
    return load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32"), say=lambda _: None)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_whatever_the_logits_are_the_text_is_an_instance(text: Any, temperature: float) -> None:
    made = Grammars(text).of_schema(SCHEMA)
    noise = torch.Generator().manual_seed(0)
    for seed in range(8):
        chooser, ids = TokenSampler(Sampling(temperature=temperature, seed=seed), made.begin()), list[int]()
        assert chooser.guide is not None
        while not chooser.guide.finished:
            ids.append(chooser.choose(torch.randn(text.model.config.vocab_size, generator=noise) * 5).token)
        found = json.loads(text.tokenizer.decode(ids, skip_special_tokens=True))
        assert set(found) == {"drug", "stars"} and found["drug"] in ("aspirin", "statin") and 1 <= found["stars"] <= 5


def test_the_reported_log_probability_is_the_models_own(text: Any) -> None:
    logits = torch.randn(text.model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    chosen = TokenSampler(Sampling(temperature=0.0, logprobs=1), Grammars(text).of_schema(SCHEMA).begin()).choose(logits)
    assert text.tokenizer.decode([chosen.token]).strip()[:1] in ("{", "")
    assert chosen.logprob == pytest.approx(float(logits.log_softmax(-1)[chosen.token]))


def test_an_engine_keeps_to_it_beside_free_texts(asking: Callable[..., Any], text: Any) -> None:
    server = asking()
    free = server.ask((30, 51, 77)).ids
    made = Grammars(text).of_schema(SCHEMA)
    found: list[Any] = []
    for _ in range(2):
        events: list[Any] = []
        settings = Sampling(temperature=0.0, max_tokens=60)
        job = server.engine.submit(Request((30, 51, 77), settings, grammar=made), events.append)
        assert server.ask((30, 51, 77)).ids == free, "a text without a schema is as it was"
        while job.timing.ended == 0.0:
            server.ask((1, 2))
        found.append(json.loads("".join(event.text for event in events)))
        assert events[-1].reason == "stop"
    assert found[0] == found[1] and set(found[0]) == {"drug", "stars"}


def test_a_token_that_may_not_come_ends_the_text(text: Any) -> None:
    guide = Grammars(text).of_schema(ANY_OBJECT).begin()
    with pytest.raises(GrammarFailed, match="cannot be continued under its schema"):
        guide.take(text.tokenizer.encode("x", add_special_tokens=False)[0])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"type": "object", "properties": {"a": {"$ref": "http://elsewhere"}}},
        {"type": "string", "pattern": "(?=x)y"},
    ],
)
def test_wrong_schemas_are_refused(text: Any, schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        Grammars(text).of_schema(schema)


def test_without_the_library_the_remedy_is_said(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'lorakeet\[serve\]'"):
        Grammars(text).of_schema(SCHEMA)


def test_a_schema_without_any_text_is_refused_before_a_text_is_begun(text: Any) -> None:
    """It was an error of the server."""
    looped = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
    for schema in ({"$ref": "#"}, looped):
        with pytest.raises(ConfigError, match="has no text that fits it"):
            Grammars(text).of_schema(schema)
