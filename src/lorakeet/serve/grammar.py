"""JSON by a schema: before each token is sampled, those that cannot continue such a text are masked (llguidance)."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError, LorakeetError, PackageMissing
from lorakeet.models.generate.sample import end_ids
from lorakeet.models.text.model import TextModel

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_SPACE = r"( |\n {0,24})?"  # a small model that may write unlimited spaces sometimes writes nothing else
_MOST_SYMBOLS = 100_000  # of a grammar; a larger schema would delay other texts


class GrammarFailed(LorakeetError):
    """A text cannot be continued under its schema."""


class Guide:
    """The state of a text in its grammar. Call `narrow` before each token is sampled, and `take` after it."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def narrow(self, logits: Tensor) -> Tensor:
        """`logits` (vocabulary,) with −∞ for tokens that may not come next. GrammarFailed if llguidance gives up."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._check()
        return logits.masked_fill(allowed[: len(logits)] == 0, float("-inf"))

    def take(self, token: int) -> None:
        """Advances the state by `token`."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """True if the text is complete."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(f"The text cannot be continued under its schema: {_first_line(self._matcher.get_error())}.")


class Grammar:
    """A parsed schema; any number of texts may use it."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def begin(self) -> Guide:
        """The initial state of a text."""
        return Guide(self._matcher.deep_copy())


class Grammars:
    """Parses schemas for the tokens of one model. Thread-safe."""

    def __init__(self, text: TextModel) -> None:
        self._text = text
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def of_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of a JSON schema.

        ConfigError for a schema that is wrong, too large, without any text or not supported by llguidance. EnvironmentProblem
        without llguidance.
        """
        guidance = _library()
        tokenizer, limits = self._prepared(guidance), guidance.LLParserLimits(max_grammar_size=_MOST_SYMBOLS)
        try:
            grammar = guidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _SPACE})
        except ValueError as error:
            raise ConfigError(f"The JSON schema cannot be read: {_first_line(str(error))}.") from error
        if problem := guidance.LLMatcher.validate_grammar(grammar, tokenizer, limits=limits):
            raise ConfigError(f"The JSON schema cannot be used: {_first_line(problem)}.")
        found = Grammar(guidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits))
        try:
            found.begin().narrow(torch.zeros(0))
        except GrammarFailed as error:
            raise ConfigError(f"The JSON schema has no text that fits it: {error}") from error
        return found

    def _prepared(self, guidance: Any) -> Any:
        """The model's tokens for llguidance, prepared once for the first schema."""
        with self._lock:
            if self._tokenizer is None:
                fast = getattr(self._text.tokenizer, "backend_tokenizer", None)
                if fast is None:
                    raise ConfigError(f"JSON schemas need a fast tokenizer; that of {self._text.name} is none.")
                described = json.loads(fast.to_str())
                described.update({"padding": None, "truncation": None})
                width = max(self._text.model.config.get_text_config().vocab_size, len(self._text.tokenizer))
                ends = sorted(end_ids(self._text))
                self._tokenizer = guidance.LLTokenizer(json.dumps(described), n_vocab=width, eos_token=ends)
            return self._tokenizer


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        need = "JSON schemas need llguidance, which is not installed on this server"
        raise PackageMissing(need, "lorakeet[serve]", ["llguidance"]) from error
    return llguidance


def _first_line(message: str) -> str:
    return message.strip().split("\n")[0].rstrip(".")
