"""`verification.written_text`: a server's text is read as the live model would write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.tolerances import F16
from lorakeet.models.generate.sample import end_ids
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verification import server
from lorakeet.verification.artefact import live_side
from lorakeet.verification.probes import probes_of
from lorakeet.verification.server_apis import Step, Token, Written
from lorakeet.verification.written_text import read_text
from tiny.runs import quiet


def test_a_text_is_read_up_to_a_piece_of_a_character_that_is_reported_with_the_next_token(loud: Path) -> None:
    """llama.cpp drops the entry of the piece, so that what follows has other ids than were written."""
    live = live_side(open_adapter(loud), quiet())
    decode = live.text.tokenizer.decode
    piece = next(number for number in range(320) if decode([number]) == "\ufffd")
    plain = [number for number in range(320) if decode([number]).isascii() and decode([number]).isalpha()][:3]
    whole = [Step(Token(decode([number]), number, -0.5)) for number in plain]
    joined = Step(Token(f"\ufffd{decode([plain[2]])}", plain[2], -0.5))
    for steps, tokens in ((whole, 3), ([*whole[:2], joined, *whole], 2), ([whole[0], Step(Token("\ufffd", piece, -0.5))], 2)):
        reading = read_text(live, [5, 9], Written("".join(step.token.text for step in steps), tuple(steps)))
        assert reading.tokens == tokens
    by_id = Step(Token(f"token_id:{piece}", piece, -0.5))
    assert read_text(live, [5, 9], Written("x", (by_id, *whole))).tokens == 4


@pytest.mark.parametrize("chance", [0.9, 0.4, 0.02])
def test_a_text_that_ends_at_once_is_right_where_the_live_adapter_ends_too(
    chance: float, loud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a server that reports no end token: an adapter of labels may end a conversation without a word."""
    opened = open_adapter(loud)
    live = live_side(opened, quiet())
    end, wide = min(end_ids(live.text)), len(live.logits([5], 1)[0])

    def logits(ids: Sequence[int], last: int | None = None) -> Tensor:
        found = torch.full((1, wide), -20.0)
        found[0, end], found[0, 7] = math.log(chance), math.log(1 - chance)
        return found

    monkeypatch.setattr(live, "logits", logits)
    there: Any = SimpleNamespace(
        api=SimpleNamespace(takes_ids=True, write=lambda prompt, tokens: Written("")), allowed=F16, name="there"
    )
    probes = probes_of(opened, opened.dataset, live, 4)
    compared = server._Comparison(live, there, probes, EvaluateSpec())
    compared.check_writing([reading.up_to(F16.gap) for reading in compared.read_writing()])
    (check,) = compared.checks
    assert check.n == len(probes.prompts) > 0
    assert check.passed == (chance == 0.9) and check.measured["gap"] == pytest.approx(
        max(0.0, math.log((1 - chance) / chance)), abs=1e-5
    )
    assert check.passed or "'the end of the text' there" in check.detail
