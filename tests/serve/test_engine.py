"""The engine writes what the model writes alone, whatever else is in the batch; and ends what must end."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.formats.files import loaded_file
from lorakeet.formats.peft import peft
from lorakeet.models.generate.sample import end_ids, sample
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.engine import Draining, QueueFull

PROMPTS: tuple[tuple[int, ...], ...] = (
    (30, 51, 77), tuple(range(40, 70)), (200, 5), (99, 98, 97, 96, 95), (30, 51, 77, 80, 90), tuple(range(100, 121)),
    (8,), (250, 251, 9), tuple(range(40, 60)),
)  # fmt: skip
A, B = {"a": 1.0}, {"b": 1.0}
WANTED: tuple[dict[str, float], ...] = (A, {}, B, A, B, A, {}, B, A)


@pytest.fixture
def loaded(live: ServingModel, saved: Callable[..., Path]) -> ServingModel:
    for seed, name in enumerate("ab"):
        live.attach(name, peft.read(saved(name, seed=seed, rank=4 if name == "a" else 2)))
    return live


def alone(live: ServingModel, ids: tuple[int, ...], name: str | None, tokens: int = 12, **options: Any) -> list[int]:
    """What models/generate/sample writes one at a time, without the end token."""
    live.selection.use(name)
    found = sample(live.text, [ids], max_tokens=tokens, **{"temperature": 0.0, **options})[0].tolist()
    return found[:-1] if found[-1] in end_ids(live.text) else found


@pytest.mark.slow
def test_greedy_texts_equal_those_written_one_at_a_time(loaded: ServingModel, asking: Callable[..., Any]) -> None:
    expected = [alone(loaded, ids, next(iter(wanted), None)) for ids, wanted in zip(PROMPTS, WANTED, strict=True)]
    server = asking(slots=4)
    begun = [server.begin(ids, wanted) for ids, wanted in zip(PROMPTS, WANTED, strict=True)]
    assert [server.end(job).ids for job in begun] == expected
    assert len({tuple(ids) for ids in expected}) > 6, "the adapters and prompts make a difference"
    again = [server.ask(ids, wanted) for ids, wanted in zip(PROMPTS, WANTED, strict=True)]
    assert [answer.ids for answer in again] == expected


def test_numbers_that_are_not_finite_end_the_text_and_reach_no_other(loaded: ServingModel, asking: Callable[..., Any]) -> None:
    expected = alone(loaded, PROMPTS[0], "a")
    server = asking(slots=1)
    broken = server.begin(PROMPTS[1], {"a": 1e30})
    server.end(broken)
    assert broken[0].cached == 0
    assert server.ask(PROMPTS[0], A).ids == expected, "the next text in the slot"
    again = server.begin(PROMPTS[1], {"a": 1e30})
    server.end(again)
    assert again[0].cached == 0, "nothing is gone on from"


def test_a_seeded_text_does_not_depend_on_the_batch(loaded: ServingModel, asking: Callable[..., Any]) -> None:
    expected = alone(loaded, PROMPTS[0], "a", temperature=1.0, seed=7)
    server = asking()
    others = [server.begin(ids, wanted, temperature=1.5) for ids, wanted in zip(PROMPTS, WANTED, strict=True)]
    assert server.ask(PROMPTS[0], {"a": 1.0}, temperature=1.0, seed=7).ids == expected
    for job in others:
        server.end(job)


def test_beginnings_are_reused_for_the_same_adapter_only(loaded: ServingModel, asking: Callable[..., Any]) -> None:
    long, server = tuple(range(40, 70)), asking(slots=2)
    expected = {name: alone(loaded, (*long, 7), name) for name in ("a", "b")}
    server.ask(long, {"a": 1.0}, max_tokens=1)
    same = server.begin((*long, 7), {"a": 1.0})
    assert server.end(same).ids == expected["a"] and same[0].cached == len(long)
    other = server.begin((*long, 7), {"b": 1.0})
    assert server.end(other).ids == expected["b"] and other[0].cached == 0
    for weights in ({"a": 0.5}, {"a": 1.0, "b": 1.0}, {}):
        mixed = server.begin((*long, 7), weights)
        server.end(mixed)
        assert mixed[0].cached == 0, weights


def test_long_prompts_come_in_chunks_between_the_tokens_of_others(loaded: ServingModel, asking: Callable[..., Any]) -> None:
    prompt = tuple(range(40, 70))
    expected = alone(loaded, prompt, None, tokens=2)
    server = asking(chunk=4)
    writing = server.begin((30, 51, 77), {"a": 1.0}, max_tokens=40)
    writing[1].get(timeout=30)
    before = server.engine.steps
    assert server.ask(prompt, {}, max_tokens=2).ids == expected
    assert server.engine.steps - before >= len(prompt) // 4
    assert server.end(writing).ids


def test_cancelled_late_and_waiting_texts_end(loaded: ServingModel, asking: Callable[..., Any]) -> None:
    server = asking(slots=1)
    running, waiting = server.begin((30, 51), max_tokens=60), server.begin((30, 52), max_tokens=60)
    late = server.begin((30, 53), max_tokens=60, timeout=0.0)
    waiting[0].cancel()
    assert server.end(waiting).reason == "cancelled" and server.end(late).reason == "timeout"
    running[0].cancel()
    assert server.end(running).reason in ("cancelled", "stop", "length")
    assert server.ask((30, 54), max_tokens=2).reason in ("length", "stop"), "the slot is free again"


def test_a_full_queue_says_when_to_come_back(asking: Callable[..., Any]) -> None:
    server = asking(slots=1, waiting=1)
    gate = threading.Event()
    blocked = server.engine.call(gate.wait)
    first = server.begin((30, 51), max_tokens=2)
    with pytest.raises(QueueFull, match="1 requests are waiting") as error:
        server.begin((30, 51))
    assert error.value.retry_after >= 1
    gate.set()
    assert blocked.result(30) and server.end(first).reason in ("length", "stop")


def test_draining_ends_what_was_taken_and_takes_nothing_new(asking: Callable[..., Any]) -> None:
    server = asking(slots=1)
    begun = [server.begin((30, 51), max_tokens=5) for _ in range(3)]
    assert server.engine.drain(timeout=30)
    assert {server.end(job).reason for job in begun} <= {"length", "stop"}
    with pytest.raises(Draining, match="shutting down"):
        server.begin((1, 2))
    assert not server.engine.ready


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ((), {}, "at least one"),
        (tuple(range(3, 67)), {}, "64 tokens; with at least one to write, at most 63 fit"),
        ((3, 320), {}, "the token 320, but the model knows 0 … 319 only"),
        ((3, -1), {}, "the token -1, but"),
        ((3,), {"temperature": -1.0}, "temperature is -1.0; it must lie between 0 and 2"),
        ((3,), {"top_p": 0.0}, "top_p is 0.0"),
        ((3,), {"max_tokens": 0}, "max_tokens is 0"),
        ((3,), {"logprobs": 21}, "logprobs is 21"),
        ((3,), {"stop": ("",)}, "none of them empty"),
    ],
)
def test_what_cannot_be_served_is_refused(ids: tuple[int, ...], settings: Any, message: str, asking: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        asking().begin(ids, **settings)


def test_texts_end_with_the_context(asking: Callable[..., Any], loaded: ServingModel) -> None:
    answer = asking(context=8).ask((30, 51, 77), {"a": 1.0}, max_tokens=100)
    assert len(answer.ids) == 6 and answer.reason == "length", "three of the prompt, and the last one is never fed back"


def test_a_failed_step_ends_its_texts_and_the_engine_goes_on(asking: Callable[..., Any], loaded: ServingModel) -> None:
    server = asking()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    layer = loaded.text.model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(fail)
    answer = server.ask((30, 51))
    assert answer.reason == "error" and "out of luck" in answer.events[-1].error
    hook.remove()
    assert server.ask((30, 51), max_tokens=2).reason in ("length", "stop")


def test_an_idle_engine_frees_the_copies_of_adapters(
    loaded: ServingModel, asking: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = asking()
    expected = server.ask(PROMPTS[0], A).ids
    assert loaded.table_bytes > 0, "the next text with it need not wait"
    loaded_file._SPARE.append(mmap.mmap(-1, 4096))
    monkeypatch.setattr("lorakeet.serve.engine.KEEP_COPIES", 0.01)
    server.engine.call(int).result(timeout=30)
    until = time.monotonic() + 30
    while loaded.table_bytes and time.monotonic() < until:
        time.sleep(0.01)
    assert loaded.table_bytes == 0
    assert server.ask(PROMPTS[0], A).ids == expected and not loaded_file._SPARE


def test_logprobs_are_those_of_the_model(asking: Callable[..., Any], loaded: ServingModel) -> None:
    server = asking()
    answer = server.ask((30, 51, 77), {"a": 1.0}, logprobs=3, max_tokens=4)
    for event in answer.events[:-1]:
        assert event.chosen.top[0] == (event.chosen.token, event.chosen.logprob) and len(event.chosen.top) == 3
        assert event.chosen.logprob < 0


def answers_where(error: Exception, server: Any, loaded: ServingModel) -> list[Any]:
    """Those of two texts that wait together, where the model's first layer raises `error`."""

    def fail(*_: Any) -> None:
        raise error

    gate = threading.Event()
    server.engine.call(gate.wait)
    begun = [server.begin((30, 51)) for _ in range(2)]
    hook = loaded.text.model.get_decoder().layers[0].register_forward_pre_hook(fail)
    gate.set()
    answers = [server.end(job) for job in begun]
    hook.remove()
    assert [answer.reason for answer in answers] == ["error", "error"]
    return answers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unforeseen_error_is_reported_to_all(asking: Callable[..., Any], loaded: ServingModel) -> None:
    server = asking(slots=1)
    answers_where(KeyError("a bug"), server, loaded)
    assert not server.engine.ready and "has failed" in server.engine.failure
    with pytest.raises(Draining, match="has failed"):
        server.begin((30, 51))


def test_a_gpu_that_failed_ends_the_engine_with_one_message(
    asking: Callable[..., Any], loaded: ServingModel, caplog: pytest.LogCaptureFixture
) -> None:
    """No later step could use it, so none is tried."""
    server = asking(slots=1)
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later")
    answers = answers_where(error, server, loaded)
    said = "The GPU failed: CUDA error: an illegal memory access was encountered. "
    assert all(answer.events[-1].error.startswith(said) for answer in answers)
    assert not server.engine.ready and server.engine.failure.startswith(said)
    assert [record.getMessage() for record in caplog.records] == [server.engine.failure]
    with pytest.raises(Draining, match="The GPU failed"):
        server.begin((30, 51))
