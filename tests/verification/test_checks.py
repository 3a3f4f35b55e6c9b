"""`verification.checks`: the checks of an artefact that is right, and of ones that are wrong in one way each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.data.chat import Candidates
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.llama_cpp import PASS
from lorakeet.exporting.merged_tensors import StoredTensor
from lorakeet.exporting.tolerances import F32, Q4
from lorakeet.memory.spill import Spill
from lorakeet.models.generate.sample import end_ids
from lorakeet.models.text.model import TextModel
from lorakeet.planning.check import COMPARED, ROW_LOGITS, positions_of_answer
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verification.artefact import InTorch, live_side
from lorakeet.verification.checks import (
    GREEDY_TOKENS,
    RecordedArtefact,
    answer,
    answers_of_rows,
    ask_all,
    check_greedy,
    check_ids,
    check_logits,
    check_prompts,
    check_stored,
    first_difference,
    share_error,
)
from lorakeet.verification.label_answers import check_label_answers
from lorakeet.verification.probes import Probes
from tiny.exports import loud_run
from tiny.held import HeldBytes
from tiny.runs import quiet

SPEC = EvaluateSpec(resamples=100)
ROW = np.array([5, 9, 70, 33, 12, 40], np.int64)


@pytest.fixture(scope="module")
def live(finished: Any) -> InTorch:
    return live_side(open_adapter(finished.path), quiet())


@pytest.fixture(scope="module")
def probes() -> Probes:
    labelled = Candidates(ROW[:4], (ROW[4:], ROW[3:5], np.array([90, 91, 92], np.int64)), "row", 0, False)
    return Probes([], [], [ROW, ROW[:3]], [labelled], [ROW[:4]])


def test_probes_are_cut_to_what_fits(probes: Probes) -> None:
    assert probes.cut_to(None) is probes
    cut = probes.cut_to(5)
    assert [len(ids) for ids in (*cut.rows, *cut.prompts)] == [5, 3, 4] and cut.most == 5
    assert cut.labelled == [] and cut.too_long == 1
    roomy = probes.cut_to(7)
    assert roomy.labelled == probes.labelled and roomy.too_long == 0


def test_parts_of_a_row_are_compared_as_the_whole_is(live: InTorch, probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    other = InTorch(live.text, None, "base")
    whole = check_logits(live, other, probes, SPEC)
    monkeypatch.setattr("lorakeet.verification.artefact.PASS", 2)
    assert [len(part) for part in live.logit_parts(ROW.tolist())] == [2, 2, 2]
    parts = check_logits(live, other, probes, SPEC)
    assert parts.n == whole.n == 7 and parts.measured == pytest.approx(whole.measured, rel=1e-4)
    for last in (1, 3):
        full, few = live.logits(ROW.tolist()), live.logits(ROW.tolist(), last)
        np.testing.assert_allclose(few, full[-last:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [200, 600])
def test_one_table_of_logits_of_each_side_is_in_memory_at_a_time(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for rows of several parts, and after another row."""
    vocabulary, cells = 20_000, 40_000
    monkeypatch.setattr("lorakeet.evaluate.parity.CELLS", cells)
    head = torch.randn(8, vocabulary)
    text: Any = SimpleNamespace(
        model=torch.nn.Identity(), hidden=lambda batch: torch.randn(batch.targets, 8), head=lambda hidden: hidden @ head
    )
    ids = np.arange(tokens)
    with HeldBytes() as held:
        check = check_logits(InTorch(text, None, "live"), InTorch(text, None, "x"), Probes([], [], [ids, ids], [], []), SPEC)
    table = 4 * min(tokens, PASS) * vocabulary
    assert check.n == 2 * (tokens - 1)
    assert ROW_LOGITS * table < held.peak < ROW_LOGITS * table + COMPARED * cells + (1 << 20) < 4 * table


def test_rows_that_are_computed_together_are_what_each_is_alone(
    live: InTorch, probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a call of the model as many rows as fit; their logits, the last ones alone, and what they answer are the same."""
    rows = [[5, 9, 70, 33, 12, 40], [5, 9, 70], [8, 8, 61, 7], [2, 3, 4, 5, 6]]
    calls: list[int] = []
    whole = TextModel.hidden
    monkeypatch.setattr(TextModel, "hidden", lambda text, batch: (calls.append(len(batch.lengths)), whole(text, batch))[1])
    live = replace(live, together=13)
    for lasts in (None, [2, 3, 1, 5]):
        found = list(live.logits_of_rows(rows, lasts))
        for ids, table, last in zip(rows, found, lasts or map(len, rows), strict=True):
            torch.testing.assert_close(table, live.logits(ids, last), atol=1e-5, rtol=1e-5)
    assert calls[:2] == [2, 2]
    short = Candidates(ROW[:4], (ROW[4:5], ROW[3:4]), "short", 0, False)
    labelled = [*probes.labelled, short, *probes.labelled]
    assert answers_of_rows(live, labelled) == [answer(live, row, live) for row in labelled]


def test_a_side_that_tells_less_of_a_row_is_an_error(live: InTorch, probes: Probes) -> None:
    class Short(InTorch):
        def logit_parts(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
            return iter(())

    with pytest.raises(ValueError, match="fewer tokens of a row"):
        check_logits(live, Short(live.text, None, "short"), probes, SPEC)


def test_what_takes_long_is_counted_row_by_row(live: InTorch, probes: Probes, spill: Spill) -> None:
    counts: dict[str, list[int]] = {}

    @contextmanager
    def count(what: str, total: int) -> Iterator[Callable[[int], None]]:
        counts[what] = [total, 0]

        def done(more: int) -> None:
            counts[what][1] += more

        yield done

    check_logits(live, live, probes, SPEC, count)
    check_label_answers(live, live, probes, SPEC, count)
    check_greedy(live, live, probes, count)
    ask_all(live, probes, live, spill, count).let_go()
    rows, labelled, prompts = (len(some) for some in (probes.rows, probes.labelled, probes.prompts))
    assert {what.partition(": ")[2]: of for what, of in counts.items()} == {
        "logits of rows": [rows] * 2,
        "answers of rows": [2 * labelled] * 2,
        "greedy texts": [prompts] * 2,
        "its rows and texts": [rows + labelled + prompts] * 2,
    }


def test_the_model_is_equal_to_itself_and_its_base_is_not(live: InTorch, probes: Probes) -> None:
    base = InTorch(live.text, None, "base")
    assert check_logits(live, live, probes, SPEC).passed and check_label_answers(live, live, probes, SPEC).passed
    assert check_greedy(live, live, probes).measured == {"gap": 0.0}
    logits = check_logits(live, base, probes, SPEC)
    assert not logits.passed and logits.measured["effect"] == pytest.approx(1.0)
    assert "effect" not in check_logits(live, InTorch(live.text, None, "base", Q4), probes, SPEC).measured
    greedy = check_greedy(live, base, probes)
    assert not greedy.passed and "The first diverging token is number" in greedy.detail


def test_where_ids_part_is_said_with_a_cause(live: InTorch) -> None:
    bos = live.text.tokenizer.bos_token_id
    assert "BOS is doubled" in first_difference(live, [5, 6], [bos, 5, 6], "prompt")
    assert "leaves out the begin token" in first_difference(live, [bos, 5, 6], [5, 6], "prompt")
    assert "has no chat template" in first_difference(live, [5], [], "prompt")
    assert "parts at token 1" in first_difference(live, [5, 6, 7], [5, 8, 7], "raw text")
    check = check_ids(live, "x", [([1], [1], "prompt"), ([1], [2], "prompt")])
    assert not check.passed and check.measured["different_prompts"] == 1 and check.n == 2


def test_stored_tensors_are_checked_by_share_and_rounding() -> None:
    right = StoredTensor(1.0, 0.0, 1e-7, 1.0)
    assert check_stored("x", {"a": right}, F32).passed and not check_stored("x", {}, F32).passed
    for wrong, words in (
        (StoredTensor(0.5, 0.0, 1e-7, 0.5), "it holds 0.5 times the adapter's change"),
        (StoredTensor(math.nan, 0.0, 0.1, 0.0), "the adapter does not change it"),
        (StoredTensor(0.0, 0.0, math.inf, 0.0), "it is missing, or of another shape"),
    ):
        check = check_stored("x", {"a": right, "b": wrong}, F32)
        assert not check.passed and check.detail.startswith("The worst layer is b: ") and words in check.detail


def test_a_change_below_the_rounding_is_said_and_is_no_mistake() -> None:
    swallowed = StoredTensor(0.05, 0.001, 0.1, 0.4, noise=9.0)
    check = check_stored("x", {"a": StoredTensor(1.0, 0.0, 0.1, 1.0), "b": swallowed}, Q4)
    assert check.passed and "In 1 matrices rounding to 4 bits is larger than the adapter's change; they hold 0.05" in check.detail
    coarse = StoredTensor(0.05, 0.001, 0.9, 0.4, noise=9.0)
    assert not check_stored("x", {"b": coarse}, Q4).passed


def test_rounding_explains_a_part_of_the_share() -> None:
    assert share_error(StoredTensor(0.9, 0.03, 0.1, 1.0)) == 0.0
    assert share_error(StoredTensor(0.5, 0.03, 0.1, 1.0)) == pytest.approx(0.35)
    assert share_error(StoredTensor(math.nan, 0.0, 0.1, 0.0)) == 0.0 and share_error(StoredTensor(0, 0, math.inf, 0)) == math.inf


TALK = [{"role": "user", "content": "Is it 12:30?"}]


@pytest.fixture(scope="module")
def loud(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> InTorch:
    return live_side(open_adapter(loud_run(finished.path, tmp_path_factory.mktemp("loud") / "run")), quiet())


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Spill]:
    place = Spill(tmp_path)
    yield place
    place.close()


def every_probe(loud: InTorch) -> Probes:
    prompt = np.array(loud.prompt(TALK), np.int64)
    labelled = Candidates(ROW[:4], (ROW[4:], ROW[3:5], np.array([90, 91, 92], np.int64)), "row", 0, False)
    short = Candidates(ROW[:4], (ROW[4:5], ROW[3:4]), "short", 0, False)
    return Probes([(TALK, prompt)], ["a 1"], [ROW, ROW[:3]], [labelled, short], [ROW[:4]])


def test_every_check_is_the_same_without_the_artefact(loud: InTorch, spill: Spill) -> None:
    base, asked = InTorch(loud.text, None, "base"), every_probe(loud)
    recorded = ask_all(base, asked, loud, spill)
    recorded.let_go()
    for check in (check_logits, check_label_answers):
        assert check(loud, recorded, asked, SPEC) == check(loud, base, asked, SPEC)
    for plain in (check_prompts, check_greedy):
        assert plain(loud, recorded, asked) == plain(loud, base, asked)
    assert not check_logits(loud, recorded, asked, SPEC).passed, "the base is not the live adapter"


def test_what_answers_take_is_known_before(loud: InTorch, spill: Spill) -> None:
    asked = every_probe(loud)
    recorded = ask_all(InTorch(loud.text, None, "base"), asked, loud, spill)
    taken = [key[2] for key in recorded._known if isinstance(key, tuple) and key[0] == "logits"]
    counted = [positions_of_answer(row, loud.text.tokenizer) for row in asked.labelled]
    assert sum(counted) == sum(taken) and counted == [3 + 3 + 4, 1]


def test_no_request_is_repeated_and_nothing_is_made_up(loud: InTorch, spill: Spill) -> None:
    class Counted(InTorch):
        asked = 0

        def _hidden(self, ids: Any, last: int) -> torch.Tensor:
            Counted.asked += 1
            return super()._hidden(ids, last)

    recorded = RecordedArtefact(Counted(loud.text, None, "base"), spill)
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
        lambda: recorded.greedy(row, GREEDY_TOKENS, end_ids(loud.text)),
    ):
        with pytest.raises(KeyError):
            question()
