"""A judge model behind OpenAI's API: compares the replies of adapter and base to the held-out prompts of a report."""

from __future__ import annotations

import json
import os
import time
import urllib.error
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException

from rich.console import Console

from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.judge import ReplyPair, collect_votes
from lorakeet.evaluate.report.compose_judge import with_judge
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.runs.server_answer import CallRefused, called_again, open_answer, read_answer, refusal_of
from lorakeet.train.progress import counted

KEY = "LORAKEET_JUDGE_KEY"  # environment variable with the server's API key
MOST_TOKENS = 2048  # of a vote with its reason
BUSY, WAITS = (429, 502, 503, 504), (1.0, 4.0, 15.0)  # statuses after which a server is called again, and seconds until then


@dataclass(frozen=True)
class JudgeServer:
    """The model `name` of the server at `url`."""

    url: str
    name: str

    @classmethod
    def at(cls, address: str) -> JudgeServer:
        """The judge of URL#MODEL (evaluate.judge)."""
        url, _, name = address.partition("#")
        return cls(url.rstrip("/").removesuffix("/v1"), name)

    def reply(self, question: str) -> str:
        """The judge's whole answer, greedy; empty if it reached MOST_TOKENS, where it may have quoted a vote.

        Raises EnvironmentProblem with what the server says where it gives none; a busy server is called again.
        """
        return called_again(partial(self._replied, question), BUSY, WAITS, time.sleep)

    def _replied(self, question: str) -> str:
        body = {
            "model": self.name, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MOST_TOKENS,
        }  # fmt: skip
        try:
            with open_answer(f"{self.url}/v1/chat/completions", body, key=os.environ.get(KEY, "")) as response:
                choice = json.loads(read_answer(response))["choices"][0]
            return "" if choice.get("finish_reason") == "length" else str(choice["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            raise CallRefused(f"{self.url} refuses {refusal_of(error)}", error.code) from error
        except (OSError, ValueError, HTTPException) as error:
            raise EnvironmentProblem(f"{self.url} gives no answer that can be read ({error}).") from error
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise EnvironmentProblem(f"{self.url} gives no message ({type(error).__name__}: {error}).") from error


def compared_by_judge(
    report: Report,
    pairs: Sequence[ReplyPair],
    systems: tuple[str, str],
    spec: EvaluateSpec,
    console: Console,
    groups: tuple[Hashable, ...] | None = None,
) -> Report:
    """The report with the preference of the judge that `spec` names; unchanged without one.

    A judge that gives no answer costs nothing but its result: the report says what happened.
    """
    if spec.judge is None or not pairs:
        return report
    server = JudgeServer.at(spec.judge)
    with counted(console, f"judge {server.name} reads replies", 2 * len(pairs)) as advance:

        def reply(question: str) -> str:
            advance(1)
            return server.reply(question)

        votes = collect_votes(server.name, pairs, reply, groups)
    return with_judge(report, votes, systems, spec)
