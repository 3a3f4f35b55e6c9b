"""The time that a dry run tells: its tokens are about those that a run computes, and they grow with what is set."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.data.prefix import PASS
from lorakeet.memory.ledger import Work
from lorakeet.workflows.finetuning.assemble_text import TextAssembly
from lorakeet.workflows.finetuning.evaluate_text import TextEvaluator
from lorakeet.workflows.finetuning.run_time import Speed, measured_speed, phase_tokens, run_time_text
from lorakeet.workflows.finetuning.text import KIND
from tiny.runs import quiet


@pytest.fixture(scope="module")
def setup(finished: Any) -> TextAssembly:
    found: TextAssembly = finished.result.setup
    return found


def changed(setup: TextAssembly, **sections: dict[str, Any]) -> TextAssembly:
    return dataclasses.replace(setup, config=setup.config.changed(**sections))


def test_the_evaluation_is_about_what_is_computed(setup: TextAssembly, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, computed = setup.text.model.get_decoder(), []
    forward = decoder.forward

    def counting(*args: Any, **settings: Any) -> Any:
        computed.append(settings["input_ids"].numel())
        return forward(*args, **settings)

    monkeypatch.setattr(decoder, "forward", counting)
    evaluator = TextEvaluator(setup.config, setup.text, setup.encoder, setup.dataset.test, quiet())
    evaluator.report("t", baseline_rows=setup.dataset.train)
    evaluator.drift()
    cost = sum(computed) + PASS * len(computed)
    assert 0.5 * cost < phase_tokens(setup).evaluation < 2 * cost


def test_each_phase_grows_with_its_settings(setup: TextAssembly) -> None:
    before = phase_tokens(setup)
    longer = phase_tokens(changed(setup, train={"steps": 60, "evaluate_every": 60}))
    assert longer.training > 5 * before.training and longer.evaluation == before.evaluation
    wide = phase_tokens(changed(setup, data={"max_tokens": 1024}))
    assert wide.evaluation > 2 * before.evaluation, "the few-shot base sees examples"
    fewer = phase_tokens(changed(setup, data={"max_tokens": 1024}, evaluate={"examples": 0, "drift_texts": 0}))
    assert fewer.evaluation < before.evaluation and fewer.training == before.training
    assert fewer.certificate == before.certificate


def shown(setup: TextAssembly, *, dry_run: bool) -> str:
    file = io.StringIO()
    KIND.show(setup, Console(file=file, width=200), dry_run=dry_run)
    return file.getvalue()


def test_it_is_said_in_a_dry_run_alone_and_not_where_nothing_was_planned(setup: TextAssembly) -> None:
    dry, real = shown(setup, dry_run=True), shown(setup, dry_run=False)
    pattern = r"Time here, as busy as this machine is now: about [\d.]+ \w+ \(training [\d.]+ \w+, evaluation [\d.]+ \w+, cert"
    assert re.search(pattern, dry) and "Time here" not in real
    unplanned = dataclasses.replace(setup, residency=dataclasses.replace(setup.residency, plan=None))
    assert run_time_text(unplanned) == ""


def test_seconds_are_those_of_the_slower_of_products_and_results() -> None:
    assert Speed(10.0, 4.0).seconds(Work(20, 4)) == 2 and Speed(10.0, 4.0).seconds(Work(20, 40)) == 10
    found = measured_speed(torch.float32)
    assert found.flops > 0 and found.bytes > 0
