"""Replies of models whose layers pass states on are transformers' own, alone and in company, in slots that others used before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorakeet.serve.engine import Engine
from lorakeet.serve.probe import Prober
from tiny.asking import Asking
from tiny.hybrids import HYBRIDS, Hybrid, hybrid, prompts

TOKENS = 6


@pytest.fixture(params=HYBRIDS, scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hybrid]:
    torch.set_num_threads(1)
    yield hybrid(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def server(made: Hybrid) -> Iterator[Asking]:
    """Three slots for more texts, and prompts in chunks that cut a chunk of linear attention."""
    engine = Engine(made.live.text, made.live.selection, slots=3, context=96, chunk=40)
    engine.start()
    yield Asking(engine)
    engine.drain(timeout=0.0)


def weights(name: str) -> dict[str, float]:
    return {name: 1.0} if name else {}


@pytest.mark.slow
def test_replies_in_company_are_those_of_transformers(made: Hybrid, server: Asking) -> None:
    asked = [(ids, ("a", "", "b")[number % 3]) for number, ids in enumerate(prompts())]
    expected = [made.reply(ids, name, TOKENS) for ids, name in asked]
    begun = [server.begin(ids, weights(name), max_tokens=TOKENS) for ids, name in asked]
    assert [server.end(one).ids for one in begun] == expected
    assert [server.ask(ids, weights(name), max_tokens=TOKENS).ids for ids, name in reversed(asked)] == expected[::-1]
    assert len({tuple(ids) for ids in expected}) > 4, "prompts and adapters make a difference"


def test_a_chat_goes_on_from_its_states_and_from_nowhere_else(made: Hybrid, server: Asking) -> None:
    first = prompts((21,))[0]
    turn = server.ask(first, {"a": 1.0}, max_tokens=TOKENS)
    assert turn.reason == "length"
    longer = (*first, *turn.ids, 30, 51, 77)
    again = server.begin(longer, {"a": 1.0}, max_tokens=TOKENS)
    assert server.end(again).ids == made.reply(longer, "a", TOKENS)
    assert again[0].cached == len(first) + TOKENS - 1, "the last token of a reply is never computed"
    shorter = (*first, 9, 8)
    other = server.begin(shorter, {"a": 1.0}, max_tokens=TOKENS)
    assert server.end(other).ids == made.reply(shorter, "a", TOKENS) and other[0].cached == 0


def test_an_adapter_computes_in_a_mixed_batch_what_it_computes_alone(made: Hybrid) -> None:
    """As the server checks before it serves an adapter."""
    found = Prober(made.live.text, made.live.selection).probe("a")
    assert found.effect > 0.01 and found.apart is not None and found.apart <= 1e-3


def test_a_step_that_failed_leaves_no_state(made: Hybrid, server: Asking) -> None:
    """Its first layers have gone on, its last ones have not."""
    ids = prompts((24,))[0]
    expected = made.reply(ids, "b", TOKENS)
    server.ask(ids[:20], {"b": 1.0}, max_tokens=1)

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    hook = made.live.text.model.get_decoder().layers[-1].register_forward_hook(fail)
    assert server.ask(ids, {"b": 1.0}).reason == "error"
    hook.remove()
    again = server.begin(ids, {"b": 1.0}, max_tokens=TOKENS)
    assert server.end(again).ids == expected and again[0].cached == 0
