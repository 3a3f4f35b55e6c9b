"""A served model over HTTP, compared by what it writes: greedy tokens with their log-probabilities.

llama.cpp's own API (GET /props, POST /tokenize, /apply-template, /completion) is used where it answers, else OpenAI's
POST /v1/completions, whose prompts may be token ids (llama.cpp, vLLM). A server gives no logits of a prompt, so the live model is
asked about the same tokens that the server wrote.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.certificate import Check, judge
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.export.tolerances import Allowed
from lorakeet.models.sample import end_ids
from lorakeet.workflows.artefacts import InTorch, Messages
from lorakeet.workflows.compare_artefact import GREEDY_TOKENS, Probes, check_ids, judge_answers

_TIMEOUT = 300
_TOP = 5


@dataclass(frozen=True)
class Step:
    """One written token: its text, its id where the server says it, and its log-probability."""

    text: str
    number: int | None
    logprob: float


class Server:
    """A served model at `url`, which ends in #NAME where the server has several: http://127.0.0.1:8000#reviews."""

    def __init__(self, url: str, allowed: Allowed) -> None:
        """EnvironmentProblem where nothing answers, ConfigError where several models do and none is named."""
        place, _, model = url.partition("#")
        self.url, self.allowed, self.name = place.rstrip("/").removesuffix("/v1"), allowed, url
        self.native = self._asks_props()
        self.model = model or ("" if self.native else self._only_model())

    def _asks_props(self) -> bool:
        try:
            self._call("/props")
        except EnvironmentProblem:
            self._call("/v1/models")  # raises where nothing answers at all
            return False
        return True

    def _only_model(self) -> str:
        names = [str(model.get("id", "")) for model in self._call("/v1/models").get("data") or [{}]]
        if len(names) > 1:
            listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise ConfigError(f"{self.url} serves {listed}; say which of them is meant: --against {self.url}#NAME.")
        return names[0]

    def tokenise(self, text: str) -> list[int] | None:
        """The ids of a raw text; None where the server does not tell."""
        if not self.native:
            return None
        found = self._call("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [int(number) for number in found["tokens"]]

    def prompt(self, messages: Messages) -> list[int] | None:
        """The ids of a conversation through the server's chat template; None where it does not tell."""
        if not self.native:
            return None
        return self.tokenise(str(self._call("/apply-template", {"messages": list(messages)})["prompt"]))

    def write(self, prompt: Sequence[int], tokens: int) -> list[Step]:
        """The likeliest continuation, token by token."""
        ids = [int(number) for number in prompt]
        if self.native:
            asked = {"prompt": ids, "n_predict": tokens, "temperature": 0, "n_probs": _TOP, "cache_prompt": False}
            found = self._call("/completion", asked).get("completion_probabilities", [])
            return [Step(str(one["token"]), int(one["id"]), float(one["logprob"])) for one in found]
        asked = {"model": self.model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "logprobs": _TOP}
        given = self._call("/v1/completions", asked)["choices"][0].get("logprobs") or {}
        pairs = zip(given.get("tokens", ()), given.get("token_logprobs", ()), strict=True)
        return [Step(str(text), None, float(value)) for text, value in pairs]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                found = json.loads(response.read())
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise EnvironmentProblem(
                f"{self.url}{path} gives no answer that can be used ({error}). Start the server, or correct --against."
            ) from error
        if not isinstance(found, dict):
            raise EnvironmentProblem(f"{self.url}{path} answers {str(found)[:80]!r}; expected a JSON object.")
        return found


def check_server(live: InTorch, server: Server, probes: Probes, spec: EvaluateSpec) -> list[Check]:
    """Prompt ids where the server tells them; the log-probabilities and choices along what it writes; the task's answers."""
    checks: list[Check] = []
    if server.native:
        prompts = [(ids.tolist(), server.prompt(messages) or [], "prompt") for messages, ids in probes.conversations]
        raw = [(live.tokenise(text), server.tokenise(text) or [], "raw text") for text in probes.texts]
        checks.append(check_ids(live, server.name, [*prompts, *raw]))
    answers = [_check_answers(live, server, probes, spec)] if probes.labelled else []
    return [*checks, _check_writing(live, server, probes), *answers]


def _check_answers(live: InTorch, server: Server, probes: Probes, spec: EvaluateSpec) -> Check:
    """The task's metric on both sides, by the label that each writes, and the share of rows on which they write another one."""
    ends, ours, theirs = end_ids(live.text), [], []

    def said(ids: Sequence[int]) -> str:
        return str(live.text.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    for row in probes.labelled:
        labels, prompt = [said(ids.tolist()) for ids in row.completions], row.prompt.tolist()
        tokens = max(len(ids) for ids in row.completions)
        ours.append(_label(labels, said(live.greedy(prompt, tokens, ends))))
        theirs.append(_label(labels, "".join(step.text for step in server.write(prompt, tokens))))
    return judge_answers((live.name, server.name), (ours, theirs), probes.labelled, server.allowed, spec)


def _label(labels: Sequence[str], text: str) -> int:
    """The number of the longest label that `text` begins with; -1 where it begins with none."""
    found = [number for number, label in enumerate(labels) if text.strip().startswith(label)]
    return max(found, key=lambda number: len(labels[number]), default=-1)


def _check_writing(live: InTorch, server: Server, probes: Probes) -> Check:
    """The live model's view of the server's tokens: same log-probabilities, and no token that it found clearly worse."""
    worst = gap = 0.0
    count, detail = 0, ""
    tokenizer = live.text.tokenizer
    for prompt in probes.prompts:
        written: list[int] = []
        for place, step in enumerate(server.write(prompt.tolist(), GREEDY_TOKENS)):
            after = live.logits([*prompt.tolist(), *written])[-1].log_softmax(-1)
            ours = int(after.argmax())
            number = step.number if step.number is not None else _named(tokenizer, step.text, after)
            behind = float("inf") if number is None else float(after[ours] - after[number])
            if behind > gap:
                gap = behind
                said = repr(tokenizer.decode([ours]))
                detail = f"The first diverging token is number {place}: {said} here, {step.text!r} there, {behind:.3g} nats off."
            if number is None:
                break
            worst = max(worst, abs(float(after[number]) - step.logprob))
            written.append(number)
            count += 1
            if behind > server.allowed.gap:
                break
    if not count and not detail:
        gap, detail = float("inf"), "The server wrote nothing, or gives no log-probabilities (logprobs, n_probs)."
    return judge(
        f"{server.name}: greedy text",
        {"logprob_difference": worst, "gap": gap},
        tolerance={"logprob_difference": server.allowed.gap, "gap": server.allowed.gap},
        between=(live.name, server.name),
        n=count,
        detail=detail,
    )


def _named(tokenizer: Any, text: str, after: Any) -> int | None:
    """The likeliest of the live model's first tokens whose text is `text`; None where none is."""
    likely = [int(number) for number in after.topk(min(_TOP * 4, len(after))).indices]
    return next((number for number in likely if tokenizer.decode([number]) == text), None)
