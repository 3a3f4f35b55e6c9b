"""The life of a request: leases end with the last text, whatever becomes of the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.access import Caller
from lorakeet.serve.model_names import UnknownModel
from lorakeet.serve.registry import Registry
from lorakeet.serve.sampling import Sampling
from lorakeet.serve.service import MOST_TEXTS, Service

GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.fixture
def service(live: ServingModel, asking: Callable[..., Any], saved: Callable[..., Path]) -> Service:
    engine = asking().engine
    registry = Registry(live, engine, base="tiny")
    registry.register("a", saved("a"))
    return Service(live.text, engine, registry)


def test_a_lease_lasts_as_long_as_its_texts(service: Service) -> None:
    async def life() -> None:
        writing = await service.write(Caller(), {"a": 1.0}, [(30, 51, 77)], GREEDY, texts=2)
        version = service.registry.get("a")
        assert version.users == 1 and writing.lease.label == "a"
        texts = []
        for text in writing.texts:
            texts.append([event async for event in text.events()])
        assert texts[0][-1].reason in ("stop", "length")
        service.close(writing)
        await service.settle()
        assert version.users == 0 and writing.written == sum(len(events) - 1 for events in texts)

    asyncio.run(life())


def test_closing_early_cancels(service: Service) -> None:
    async def life() -> None:
        writing = await service.write(Caller(), {"a": 1.0}, [(30, 51, 77)], Sampling(max_tokens=50, seed=1))
        service.close(writing)
        await service.settle()
        assert service.registry.get("a").users == 0
        assert service.engine.load == (0, 0)

    asyncio.run(life())


def test_what_is_refused_holds_nothing(service: Service) -> None:
    async def life() -> None:
        with pytest.raises(ConfigError, match="n is 17"):
            await service.write(Caller(), {}, [(30,)], GREEDY, texts=MOST_TEXTS + 1)
        with pytest.raises(ConfigError, match="20 prompts with n 16 are 320 texts; this server takes 260 at most"):
            await service.write(Caller(), {}, [(30,)] * 20, GREEDY, texts=MOST_TEXTS)
        with pytest.raises(ConfigError, match="fit the context"):
            await service.write(Caller(), {"a": 1.0}, [tuple(range(3, 100))], GREEDY)
        await service.settle()
        assert service.registry.get("a").users == 0

    asyncio.run(life())
    with pytest.raises(UnknownModel):
        service.adapters_named(Caller("x", frozenset({"b"})), "a")


def test_a_template_that_refuses_is_the_callers_problem(service: Service) -> None:
    service.text.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ConfigError, match="refuses these messages"):
        asyncio.run(service.chat_ids([{"role": "user", "content": "x"}]))
    service.text.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        asyncio.run(service.chat_ids([{"role": "user", "content": "x"}]))


def test_a_prompt_that_cannot_fit_is_not_tokenised(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = service.text.tokenizer.encode

    def watched(text: str, **options: Any) -> Any:
        asked.append(text)
        return encode(text, **options)

    monkeypatch.setattr(service.text.tokenizer, "encode", watched)
    longest = max(len(token) for token in service.text.tokenizer.get_vocab())
    most = service.engine.context * longest
    for call in (service.prompt_ids, lambda text: service.chat_ids([{"role": "user", "content": text}])):
        with pytest.raises(ConfigError, match=r"characters, which is more than the \d+ tokens"):
            asyncio.run(call("x" * (most + 1)))  # type: ignore[operator]
        assert asked == []
    assert len(asyncio.run(service.prompt_ids("x" * most))) >= service.engine.context and len(asked) == 1


def test_the_number_format_is_the_coarser_of_weights_and_products_where_weights_are_dense(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.number_format == "float32"
    monkeypatch.setattr(service, "text", replace(service.text, products=torch.bfloat16))
    assert service.number_format == "bfloat16"
    monkeypatch.setattr("lorakeet.serve.service.is_packed", lambda model: True)
    assert service.number_format == ""
