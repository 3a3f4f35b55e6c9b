"""Chooses the learning rate of a run that names none: trains half, once and twice the default for a few steps.

The three are members of one pass over the base (train/text/multi_adapter). Held-out rows decide. The
trained values are dropped: the run starts again with the chosen rate, which its saved run file names, so that it needs no trial
when it is resumed or run again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from rich.console import Console

from lorakeet.core.initialise import seed_for
from lorakeet.errors import DataError
from lorakeet.evaluate.report.rank_values import Search
from lorakeet.evaluate.wording import bytes_text, signed, span
from lorakeet.kinds.text.assemble import TextAssembly
from lorakeet.kinds.text.tuning.trials import RISE, SearchBudget, SearchRows, Trial, Trials, groups_by_key
from lorakeet.memory.allocator import release_free_memory
from lorakeet.memory.budget import available_memory
from lorakeet.memory.cuda import gpu_bytes_left
from lorakeet.memory.measure import resident_bytes
from lorakeet.runs.residency import RESIDENT
from lorakeet.runs.search_space import QUICK_FACTORS, SearchPoint, space_for
from lorakeet.train import schedule
from lorakeet.train.text.multi_adapter import why_not_together

MOST_OF_A_RUN = 6  # a trial has at most 1/6 of the run's steps, so three of them cost at most half a run
FEWEST_STEPS = 8  # of a trial: fewer only show which rate goes further (docs/log)
ROWS = 256  # held-out rows that decide, at most
DIFFERENCE = 0.05  # nats per token that the rows should be able to show


def choose_rate(setup: TextAssembly, console: Console, *, requested: bool = False) -> tuple[TextAssembly, Search | None]:
    """The assembly with the chosen train.learning_rate, and the trial; or the same assembly and None.

    There is no trial if the rate is given and no trial is `requested`, if train.rate_trial_steps is 0, and if it is not possible,
    which is printed. Another rate than the run's is chosen only if it is shown to be better, or if the run's own diverges after
    its warm-up. Raises DataError if all three diverge.
    """
    spec, say = setup.config.train, partial(console.print, markup=False, soft_wrap=True)
    if spec.rate_trial_steps == 0 or (spec.learning_rate is not None and not requested):
        return setup, None
    space = space_for(setup.config, setup.text, rate_factors=QUICK_FACTORS, rank_choices=(), target_choices=())
    steps = min(spec.rate_trial_steps, setup.steps // MOST_OF_A_RUN)
    seed = setup.config.data.split_seed  # rows are chosen by content
    held_out = sorted(setup.held_out.examples, key=lambda example: seed_for(seed, f"rate/{example.key}"))[:ROWS]
    rows = SearchRows(held_out, [], groups_by_key(setup.dataset.held_out), "")
    if refusal := _why_not(setup, rows, steps):
        say(f"The learning rate is {space.rate:.2e}; no other is tried, since {refusal}.")
        return setup, None
    plan = setup.residency.plan
    if plan is not None and (more := plan.trying_rates()) is not plan:
        setup = replace(setup, residency=replace(setup.residency, plan=more))
        say(f"Memory: at most {bytes_text(more.peak)} planned while learning rates are tried.")
    trials = Trials(setup, space, rows, SearchBudget(None, None), console)
    rates = ", ".join(f"{space.rate * factor:.2e}" for factor in QUICK_FACTORS)
    say(f"Learning rates {rates} are tried for {steps} steps each. {trials.power(DIFFERENCE)}")
    factors = sorted(QUICK_FACTORS, key=lambda factor: factor != 1.0)
    points = [Trial(f"rate ×{factor:g}", SearchPoint(factor)) for factor in factors]
    trials.generation(points, rungs=(), steps=steps)
    release_free_memory()  # the memory of three adapters, before the run's own
    chosen, found = _decided(trials, steps)
    say(found.conclusion)
    rate = space.resolved(chosen.point).train.learning_rate
    return replace(setup, config=setup.config.changed(train={"learning_rate": rate})), found


def _why_not(setup: TextAssembly, rows: SearchRows, steps: int) -> str:
    """Why three adapters cannot or should not be trained together here; empty if they should."""
    given = setup.config.train.rate_trial_steps
    if given < FEWEST_STEPS:
        return f"train.rate_trial_steps is {given}, and a trial needs {FEWEST_STEPS} or more"
    if steps < FEWEST_STEPS:
        return (
            f"a run of {setup.steps} steps is too short: a trial (train.rate_trial_steps {given}) may take 1/{MOST_OF_A_RUN} of "
            f"them, which is {steps}, and needs {FEWEST_STEPS}"
        )
    units = {rows.groups.get(example.key, example.key) for example in rows.search}
    if len(units) < 2:
        return f"{len(units)} {'groups of ' if rows.groups else ''}held-out rows cannot distinguish two rates"
    below = "lora.on_top_of keeps an earlier adapter, which a trial would train" * (setup.config.lora.on_top_of is not None)
    if refusal := below or why_not_together(setup.text, setup.plan):
        return refusal
    if setup.sharded:
        return "train.shard is on, and a trial needs the whole base"
    kept = setup.residency
    if kept.plan is None or kept.store is not None or kept.way.recomputed:
        bound = "memory.budget is set" if kept.given else "memory is short"
        return f"{bound}, and the memory of a trial is not known" if kept.way != RESIDENT or kept.budget else ""
    most, what = kept.budget.limit, "memory.budget"
    if not kept.given or most is None:
        most, what = _usable(setup.device), f"is free on {setup.device}" if setup.device.type == "cuda" else "is free"
    trial = kept.plan.rate_trial
    if trial is not None and trial.bytes > most:
        return f"three adapters in training would take {bytes_text(trial.bytes)}, more than {what} ({bytes_text(most)})"
    return ""


def _usable(device: torch.device) -> int:
    """The bytes that this process may use, those that it has among them: of its GPU, or else of the machine."""
    return gpu_bytes_left(device) if device.type == "cuda" else available_memory()[0] + resident_bytes()


def _decided(trials: Trials, steps: int) -> tuple[Trial, Search]:
    """The run's own rate, unless another is better on the same rows, Holm-corrected over both comparisons."""
    start = trials.all[0]
    found = trials.result(start, "", "")
    lines = {line.name: line for line in found.trials}
    better = [trial for trial in trials.all if (one := lines[trial.name].against_start) and one.verdict == "better"]
    kept = [trial for trial in trials.all if trial.losses is not None]
    spec = trials.setup.config.train
    warmup = schedule.warmup_steps(trials.setup.steps, spec.warmup_fraction)
    if start.losses is None and warmup >= steps:
        trial = f"×1 diverged after a warm-up of {steps // RISE} of {steps} steps"
        conclusion = f"{trial}. It stays, since the run warms up for {warmup} steps."
        return start, replace(found, conclusion=conclusion)
    if not kept:
        raise DataError(
            f"All three learning rates diverged within {steps} steps: {', '.join(line.settings for line in found.trials)}. Give "
            "a far lower train.learning_rate, and check the rows if that diverges too."
        )
    pool = better or ([start] if start.losses is not None else kept)
    chosen = min(pool, key=lambda trial: lines[trial.name].loss.value)  # type: ignore[union-attr]
    return chosen, replace(found, winner=chosen.name, conclusion=_conclusion(found, chosen, start, steps))


def _conclusion(found: Search, chosen: Trial, start: Trial, steps: int) -> str:
    """The choice and its margin, in words."""
    margins = []
    for line in found.trials:
        if line.diverged:
            margins.append(f"{line.name.removeprefix('rate ')} diverged")
        elif line.against_start is not None:
            gap = line.against_start.difference
            numbers = f"{signed(gap.value, 4)} nats a token [{span(gap, 4, signs=True, between=', ')}]"
            margins.append(f"{line.name.removeprefix('rate ')}: {numbers}, {line.against_start.verdict}")
    settings = next(line.settings for line in found.trials if line.name == chosen.name)
    what = "stays" if chosen is start else "is taken"
    return f"The {settings} {what}, after {steps} steps on {found.rows} held-out rows. Against ×1: {'; '.join(margins)}."
