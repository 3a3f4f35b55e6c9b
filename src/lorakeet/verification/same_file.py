"""The certified adapter, loaded again into the server under test: the same numbers give the same answers there, digit for digit.

Rounding hides a single module of a weak adapter from the live model, but not from the same server. Prompts are made up: no server
has kept what they begin with, so each name computes each of them once, and alike. The adapter is loaded under two further names,
whose answers show whether the server repeats itself. Both are unloaded afterwards, and their folders deleted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

import numpy as np

from lorakeet.core.adapter import Adapter
from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.certificate import Check
from lorakeet.formats.peft import peft
from lorakeet.verification.checks import named_check
from lorakeet.verification.server_apis import Api, adapters_of

PROMPTS, LENGTH = 12, 12  # made-up prompts, and tokens of each
WRITTEN = 4  # tokens after each, with their likeliest


def check_same_file(api: Api, names: tuple[str, str], adapter: Adapter, rows: Sequence[Sequence[int]]) -> Check | str:
    """Whether the second of `names` answers as `adapter` does there; else why that is not known.

    Prompts have tokens of `rows`. It fails where the two names of `adapter` always agree, and this one differs on half of the
    prompts or more.
    """
    if not api.loads:
        return "this server takes adapters at its start alone"
    if api.model not in adapters_of(api.url, api.key):
        return "the server lists no adapter of this name"
    every, chance = np.unique(np.concatenate([np.asarray(row) for row in rows])), np.random.default_rng(0)
    differ = varied = known = 0
    try:
        with _loaded(api, adapter) as (first, second):
            for prompt in chance.choice(every, (PROMPTS, LENGTH)).tolist():
                served, once, again = (one.write(prompt, WRITTEN) for one in (api, first, second))
                differ, varied = differ + (served != once), varied + (once != again)
                known += any(step.top for step in once.steps)  # an answer may end at once
    except EnvironmentProblem as error:
        return f"{error} It must load adapters at run time, from the folder for temporary files (TMPDIR)"
    if known < PROMPTS / 2:
        return f"the server reports log-probabilities of {known} of {PROMPTS} answers"
    if varied or 0 < differ < PROMPTS / 2:
        return f"the server answers {max(varied, differ)} of {PROMPTS} prompts otherwise from time to time"
    detail = "The server answers with another adapter than the certified one, loaded beside it." if differ else ""
    measured = {"different_answers": float(differ)}
    return named_check("same file", names, measured, dict.fromkeys(measured, 0.0), n=PROMPTS, detail=detail)


@contextmanager
def _loaded(api: Api, adapter: Adapter) -> Iterator[list[Api]]:
    """A context in which the server has this adapter too, under two names of its own."""
    with ExitStack() as stack:
        folder, apis = Path(stack.enter_context(TemporaryDirectory(prefix="lorakeet-"))) / "adapter", list[Api]()
        peft.write(adapter, folder)
        for _ in range(2):
            apis.append(api.load(f"lorakeet-check-{token_hex(4)}", str(folder)))
            stack.callback(_unload, apis[-1])
        yield apis


def _unload(api: Api) -> None:
    with suppress(EnvironmentProblem):  # it has gone, with all adapters
        api.unload()
