"""Base models from several threads: one handle or several, by threads and by asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

import lorakeet as lk
from api.conftest import Shared

PROMPTS = ("alder birch", "cedar GOOD alder", "birch")


def at_once(calls: list[Callable[[], str]], *, by: str) -> list[str]:
    """What each call returns, all begun together in a thread each."""
    together = Barrier(len(calls))

    def begun(call: Callable[[], str]) -> str:
        together.wait(60)
        return call()

    async def gathered() -> list[str]:
        return list(await asyncio.gather(*(asyncio.to_thread(begun, call) for call in calls)))

    if by == "asyncio":
        return asyncio.run(gathered())
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begun, calls))


@pytest.mark.parametrize("by", ["threads", "asyncio"])
@pytest.mark.parametrize("handles", [1, 3])
def test_threads_load_and_generate(shared: Shared, tiny_llama_folder: Path, handles: int, by: str) -> None:
    """Of three threads that loaded at once, two said "lacks 1 weights", and the process could load nothing any more."""
    expected = [shared.model.generate(prompt, adapter=shared.run, max_tokens=6) for prompt in PROMPTS]
    for _ in range(3):
        models = [lk.load(tiny_llama_folder, dtype="float32") for _ in range(handles)]
        calls = [
            lambda model=models[number % handles], prompt=prompt: model.generate(prompt, adapter=shared.run, max_tokens=6)
            for number, prompt in enumerate(PROMPTS)
        ]
        assert at_once(calls, by=by) == expected
        for model in models:
            model.release()


def test_threads_that_stream_measure_and_choose_their_own_adapter(shared: Shared) -> None:
    model, prompt = shared.model, PROMPTS[0]
    alone, adapted = (model.generate(prompt, adapter=adapter, max_tokens=30) for adapter in (None, shared.run))
    losses = str(model.losses(shared.rows.held_out, adapter=shared.run).sum())

    def with_run() -> str:
        with model.using(shared.run):
            return model.generate(prompt, max_tokens=30)

    for _ in range(3):
        found = at_once(
            [
                lambda: "".join(model.stream(prompt, max_tokens=30)),
                with_run,
                lambda: model.generate(prompt, max_tokens=30),
                lambda: str(model.losses(shared.rows.held_out, adapter=shared.run).sum()),
            ],
            by="threads",
        )
        assert found == [alone, adapted, alone, losses]
