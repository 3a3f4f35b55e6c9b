"""The time that a dry run tells: its tokens are about those that a run computes, and they grow with what is set."""

from __future__ import annotations

import dataclasses
import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.data.prefix import PASS
from lorakeet.kinds.preference import kind as preference
from lorakeet.kinds.preference.evaluate import PreferenceEvaluator
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.kind import KIND
from lorakeet.kinds.text.run_time import Speed, measured_speed, phase_tokens, run_time_text
from lorakeet.memory.ledger import Work
from lorakeet.train.processes import ALONE
from lorakeet.train.run import RunFolder
from tiny.runs import quiet, sentence, settings, write_rows


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


def cost_of(setup: TextAssembly, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """What `work` computes, in tokens with the fixed cost of each pass."""
    decoder, computed = setup.text.model.get_decoder(), []
    forward = decoder.forward

    def counting(*args: Any, **settings: Any) -> Any:
        computed.append(settings["input_ids"].numel() + PASS)
        return forward(*args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(decoder, "forward", counting)
        work()
    return sum(computed)


def preferring(tiny_llama_folder: Path, folder: Path, objective: str, **changes: str) -> TextAssembly:
    chance, rows = random.Random(0), []
    for number in range(60):
        one, other = sentence(chance), sentence(chance)
        both = {"completion": one, "label": bool(number % 2)} if objective == "kto" else {"chosen": one, "rejected": other}
        rows.append({"prompt": sentence(chance), **both})
    data = write_rows(folder / "rows.jsonl", rows)
    more = {"train.objective": objective, "train.micro_tokens": "512", "evaluate.drift_texts": "0", **changes}
    return assemble_text(settings(tiny_llama_folder, data, folder / "run", more), quiet())


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_reference_and_its_readings_are_counted(
    objective: str, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, kind, folder = preferring(tiny_llama_folder, tmp_path, objective), preference.KIND, RunFolder.create(tmp_path / "run")
    none = changed(setup, train={"objective": "simpo"})
    task = kind.new_task(setup)

    def begin() -> None:
        with kind.training(setup, task, folder, quiet()):
            pass

    found, without = phase_tokens(setup), phase_tokens(none)
    reference = cost_of(setup, begin, monkeypatch)
    if objective == "dpo":
        assert 0.8 * reference < found.training - without.training < 1.25 * reference
    batches = task.batches(0)
    step = cost_of(setup, lambda: task.gradients(batches, 8.0), monkeypatch) - sum(batch.tokens + PASS for batch in batches)
    assert (step > PASS) == (objective == "kto"), "the pass that estimates the KL"
    _, rows = setup.evaluated
    evaluator = PreferenceEvaluator(setup.config, setup.text, setup.encoder, rows, quiet())
    cost = cost_of(setup, lambda: evaluator.report("t", baseline_rows=setup.dataset.train), monkeypatch)
    assert 0.7 * cost < found.evaluation < 1.4 * cost
    assert found.certificate > without.certificate


@pytest.mark.slow
def test_the_pass_that_estimates_the_kl_is_counted_at_each_step(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """A trained answer is twice one that is read, and kto only reads the second answer of a row."""
    setup = preferring(tiny_llama_folder, tmp_path, "kto", **{"train.steps": "200"})
    kto, dpo, simpo = (phase_tokens(changed(setup, train={"objective": name})) for name in ("kto", "dpo", "simpo"))
    assert kto.training == pytest.approx(dpo.training - setup.tokens_of_run / 2 + 200 * PASS)
    assert dpo.training > simpo.training and dpo.evaluation > simpo.evaluation
    assert kto.evaluation < dpo.evaluation, "its second answers are not evaluated"
    named = phase_tokens(changed(setup, train={"objective": "dpo", "reference": "base"}))
    assert simpo.training < named.training < dpo.training, "where the adapter starts as the base, that is measured too"


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


@pytest.mark.slow
def test_it_says_how_many_prompts_are_answered_and_how_long_that_takes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"Number {n}", "completion": f"{n % 7}"} for n in range(40)])
    changes = {"evaluate.answers": "5", "data.held_out_fraction": "0.3", "data.held_out_minimum": "0"}
    setup = KIND.assemble(
        settings(tiny_llama_folder, data, tmp_path / "run", changes), quiet(), processes=ALONE, resumed=None, dry_run=True
    )
    found, fewer = phase_tokens(setup), phase_tokens(changed(setup, evaluate={"answers": 0}))
    assert found.prompts == 5 and 0 < found.replies < found.evaluation
    assert fewer.prompts == 0 == fewer.replies and fewer.evaluation == pytest.approx(found.evaluation - found.replies)
    assert re.search(r" are replies: 5 held-out prompts \(evaluate\.answers\), answered by adapter, base", run_time_text(setup))
    assert "held-out prompts" not in run_time_text(changed(setup, evaluate={"answers": 0}))


def test_the_few_shot_base_is_named_where_it_is_much_of_the_run(setup: TextAssembly) -> None:
    wide = changed(setup, data={"max_tokens": 1024})
    found = phase_tokens(wide)
    assert 0.25 * (found.training + found.evaluation + found.certificate) < found.few_shot < found.evaluation
    assert re.search(r" Of the evaluation, [\d.]+ \w+ is the few-shot base, which --evaluate\.examples 0 ", run_time_text(wide))
    without = changed(wide, evaluate={"examples": 0})
    assert phase_tokens(without).few_shot == 0 and "few-shot" not in run_time_text(without)
    assert phase_tokens(without).evaluation == pytest.approx(found.evaluation - found.few_shot)
    long = changed(wide, train={"steps": 2000, "evaluate_every": 2000})
    assert phase_tokens(long).few_shot == found.few_shot and "few-shot" not in run_time_text(long), "a small part of the run"


def test_seconds_are_those_of_the_slower_of_products_and_results() -> None:
    assert Speed(10.0, 4.0).seconds(Work(20, 4)) == 2 and Speed(10.0, 4.0).seconds(Work(20, 40)) == 10
    found = measured_speed(torch.float32)
    assert found.flops > 0 and found.bytes > 0
