"""`workflows.recorded`: what was asked is answered without the artefact, to the same numbers, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.data.chat import Candidates
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.memory.spill import Spill
from lorakeet.models.generate.sample import end_ids
from lorakeet.workflows.planning.check_sizes import positions_of_answer
from lorakeet.workflows.runs.open_adapter import open_adapter
from lorakeet.workflows.verification.artefact import InTorch, live_side
from lorakeet.workflows.verification.checks import (
    GREEDY_TOKENS,
    Probes,
    check_answers,
    check_greedy,
    check_logits,
    check_prompts,
)
from lorakeet.workflows.verification.recorded import RecordedArtefact, ask_all
from tiny.exports import loud_run
from tiny.runs import quiet

SPEC = EvaluateSpec(resamples=100)
ROW = np.array([5, 9, 70, 33, 12, 40], np.int64)
TALK = [{"role": "user", "content": "Is it 12:30?"}]


@pytest.fixture(scope="module")
def live(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> InTorch:
    return live_side(open_adapter(loud_run(finished.path, tmp_path_factory.mktemp("loud") / "run")), quiet())


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Spill]:
    place = Spill(tmp_path)
    yield place
    place.close()


def probes(live: InTorch) -> Probes:
    prompt = np.array(live.prompt(TALK), np.int64)
    labelled = Candidates(ROW[:4], (ROW[4:], ROW[3:5], np.array([90, 91, 92], np.int64)), "row", 0, False)
    short = Candidates(ROW[:4], (ROW[4:5], ROW[3:4]), "short", 0, False)
    return Probes([(TALK, prompt)], ["a 1"], [ROW, ROW[:3]], [labelled, short], [ROW[:4]])


def test_every_check_is_the_same_without_the_artefact(live: InTorch, spill: Spill) -> None:
    base, asked = InTorch(live.text, None, "base"), probes(live)
    recorded = ask_all(base, asked, live, spill)
    recorded.let_go()
    for check in (check_logits, check_answers):
        assert check(live, recorded, asked, SPEC) == check(live, base, asked, SPEC)
    for plain in (check_prompts, check_greedy):
        assert plain(live, recorded, asked) == plain(live, base, asked)
    assert not check_logits(live, recorded, asked, SPEC).passed, "the base is not the live adapter"


def test_what_answers_take_is_known_before(live: InTorch, spill: Spill) -> None:
    asked = probes(live)
    recorded = ask_all(InTorch(live.text, None, "base"), asked, live, spill)
    taken = [key[2] for key in recorded._known if isinstance(key, tuple) and key[0] == "logits"]
    counted = [positions_of_answer(row, live.text.tokenizer) for row in asked.labelled]
    assert sum(counted) == sum(taken) and counted == [3 + 3 + 4, 1]


def test_no_request_is_repeated_and_nothing_is_made_up(live: InTorch, spill: Spill) -> None:
    class Counted(InTorch):
        asked = 0

        def _hidden(self, ids: Any, last: int) -> torch.Tensor:
            Counted.asked += 1
            return super()._hidden(ids, last)

    recorded = RecordedArtefact(Counted(live.text, None, "base"), spill)
    row = ROW.tolist()
    first = recorded.logits(row, 2)
    assert torch.equal(recorded.logits(row, 2), first) and Counted.asked == 1
    parts = torch.cat(list(recorded.logit_parts(row)))
    assert torch.equal(torch.cat(list(recorded.logit_parts(row))), parts) and Counted.asked == 2
    recorded.let_go()
    assert torch.equal(recorded.logits(row, 2), first)
    for question in (
        lambda: recorded.logits(row, 1),
        lambda: list(recorded.logit_parts(row[:2])),
        lambda: recorded.tokenise("b"),
        lambda: recorded.prompt(TALK),
        lambda: recorded.greedy(row, GREEDY_TOKENS, end_ids(live.text)),
    ):
        with pytest.raises(KeyError):
            question()


def test_no_block_of_a_streamed_live_model_comes_in_to_ask(live: InTorch, spill: Spill, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("the live model computed")

    class Told:
        """An artefact that computes nothing."""

        name, allowed = "told", live.allowed

        def tokenise(self, text: str) -> list[int]:
            return [1]

        def prompt(self, messages: Any) -> list[int]:
            return [1]

        def logits(self, ids: Any, last: int | None = None) -> torch.Tensor:
            return torch.zeros(last or len(ids), 96)

        def logit_parts(self, ids: Any) -> Iterator[torch.Tensor]:
            yield torch.zeros(len(ids), 96)

        def greedy(self, prompt: Any, tokens: int, ends: Any) -> list[int]:
            return [3]

        def stored(self, source: Path, opened: Any) -> dict[str, Any]:
            return {}

    asked = probes(live)
    monkeypatch.setattr(type(live.text), "hidden", computed)
    monkeypatch.setattr(type(live.text), "head", computed)
    recorded = ask_all(Told(), asked, live, spill)
    assert recorded.greedy(ROW[:4].tolist(), GREEDY_TOKENS, end_ids(live.text)) == [3]
