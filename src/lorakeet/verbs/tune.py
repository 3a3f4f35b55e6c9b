"""`lorakeet tune`: chooses learning rate, rank, targets and beta on held-out rows, and confirms the choice on other rows.

rows for the search | rows for the confirmation → what so many rows can show, in words → generations of trials in one pass over
the base (train/text/multi_adapter), the worse half stopped twice on the way → the best trial against the run file's settings,
on other rows and from other seeds (kinds/text/tuning/confirm).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from lorakeet.config import RunConfig, dump_yaml
from lorakeet.core.initialise import seed_for
from lorakeet.core.spec import LoraSpec
from lorakeet.disk import write_whole
from lorakeet.errors import ConfigError, DataError, PackageMissing, Problems
from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.report.rank_values import Search
from lorakeet.evaluate.report.report import Command, Report, write_report
from lorakeet.evaluate.values import encode
from lorakeet.evaluate.wording import signed, span
from lorakeet.kinds.protocol import what_trains
from lorakeet.kinds.report import machine, versions
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text
from lorakeet.kinds.text.tuning.confirm import Confirmation, confirm
from lorakeet.kinds.text.tuning.trials import START, SearchBudget, SearchRows, Trial, Trials, groups_by_key
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.models.text.cached_states import cached_states
from lorakeet.registry import function_at
from lorakeet.runs.output_paths import folder_above, require_empty, writing
from lorakeet.runs.search_space import QUICK_FACTORS, SearchPoint, plan_of_point, space_for
from lorakeet.runs.terminal import WholeTable
from lorakeet.train.durable import new_folder
from lorakeet.train.text.task import order_of
from lorakeet.verbs.options import TuneOptions, non_default

SPACE = {"rate_factors", "rank_choices", "target_choices", "beta_choices"}  # options that --try-rates replaces
SEEDS = 3  # of the confirmation: a difference counts only beyond that between seeds


@dataclass(frozen=True)
class Tuned:
    """The chosen settings, the search, and the folder of both."""

    out: Path
    config: RunConfig
    search: Search
    confirmed: Comparison | None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"out": str(self.out), "search": encode(self.search), "confirmed": encode(self.confirmed)}


def tune(config: RunConfig, options: TuneOptions = TuneOptions(), *, console: Console) -> Tuned:
    """Searches and confirms; writes config.yaml (the settings to train with) and a report to `results`, else OUT-tune.

    `options.seeds` are those of the confirmation: None is 3, or with `try_rates` 1, the run file's own.

    Raises ConfigError and DataError for what cannot be searched, before anything is trained.
    """
    out = options.folder(config.out)
    rates_only, together = options.try_rates, options.together
    seeds = (1 if rates_only else SEEDS) if options.seeds is None else options.seeds
    _check(options, seeds)
    if not config.declaration.trials:
        raise ConfigError(f"{what_trains(config)}, and no search is for that. Compare whole runs of lorakeet finetune.")
    if config.ranks.choose == "prune":
        raise ConfigError(
            "ranks.choose is prune, but trials keep their ranks. Set it to given or auto, or use lorakeet finetune."
        )
    for name in ("continue_from", "on_top_of"):
        if (earlier := getattr(config.lora, name)) is not None:
            raise ConfigError(
                f"lora.{name} is {earlier}, but each trial starts with pairs of its own. Leave it out, or use lorakeet finetune."
            )
    trials: type[Trials] = function_at(config.declaration.trials)
    trials.check(config)
    if rates_only and SPACE & non_default(options).keys():
        given = "--rate-factors, --rank-choices, --target-choices and --beta-choices"
        raise ConfigError(f"--try-rates compares half, once and twice the learning rate only. Leave it out, or {given}.")
    require_empty(out)
    sampler = None if rates_only else _sampler(config.train.seed)
    with enforcing_gpu_budget(config.memory.limit, "Raise the budget, or lower --together."):
        if rates_only:
            options = replace(options, rate_factors=QUICK_FACTORS, rank_choices=(), target_choices=(), beta_choices=())
        ranks, targets = options.rank_choices, options.target_choices
        planned = config.memory.budget or torch.cuda.is_available()
        largest = _largest(config, ranks, targets) if planned else None
        members = together  # in training at once, in the search or in its confirmation (none with one seed)
        if rates_only:
            members = max(together, len(QUICK_FACTORS)) if seeds > 1 else len(QUICK_FACTORS)
        setup = assemble_text(config, console, members=members, largest=largest)
        space = space_for(
            setup.config, setup.text, rate_factors=options.rate_factors, rank_choices=ranks, target_choices=targets,
            beta_choices=options.beta_choices,
        )  # fmt: skip
        budget = SearchBudget(None if options.minutes is None else 60 * options.minutes, options.tokens)
        search = trials(setup, space, _rows(setup), budget, console, folder_above(out))
        with _cached_states(search, seeds, out):
            confirmed, found = _searched(search, sampler, options.difference, seeds, together)
        _show(found, console)
        settings = replace(space.resolved(confirmed.chosen.point), out=config.out)
        _write(out, settings, found, setup, console)
        return Tuned(out, settings, found, confirmed.found)


def _searched(search: Trials, sampler: Any, difference: float, seeds: int, together: int) -> tuple[Confirmation, Search]:
    """Trains the trials of `sampler`, or without one half, once and twice the rate, and confirms the best."""
    power = search.power(difference)
    search.console.print(power, markup=False, soft_wrap=True)
    if sampler is None:
        others = [Trial(f"rate ×{factor:g}", SearchPoint(factor)) for factor in QUICK_FACTORS if factor != 1.0]
        search.generation([Trial(START, SearchPoint()), *others], rungs=())
    else:
        search.budget.reserved = 2 * seeds * search.setup.tokens_of_run if seeds > 1 else 0
        search.run(sampler, together)
    winner = search.best()
    confirmed = confirm(search, winner, seeds, together)
    return confirmed, search.result(confirmed.chosen, confirmed.conclusion, power, winner)


def _cached_states(search: Trials, seeds: int, out: Path) -> AbstractContextManager[Any]:
    """With train.keep_prefix_states: caches the output of the blocks below those that any trial trains.

    The scratch file is in the folder above `out`, which does not exist yet.
    """
    setup, spec = search.setup, search.setup.config.train
    if not spec.keep_prefix_states:
        return nullcontext()
    plans = [plan_of_point(setup.text, search.space, point) for point in search.space.points]
    train, trained = setup.train.examples, dict[int, None]()
    for more in range(seeds + 1 if seeds > 1 else 1):  # of the trials and the confirmation's seeds, which may end within an epoch
        order = order_of(train, replace(spec, seed=spec.seed + more))
        for step in range(min(setup.steps, order.steps_per_epoch)):
            trained.update(dict.fromkeys(order.indices(step)))
    later = [*(train[number] for number in trained), *search.rows.confirm]
    say, folder = partial(search.console.print, markup=False, soft_wrap=True), folder_above(out)
    return cached_states(
        setup.text, search.rows.search, folder=folder, micro_tokens=spec.micro_tokens, plans=plans, later=later, say=say
    )


def _largest(config: RunConfig, ranks: Sequence[int], targets: Sequence[str]) -> LoraSpec:
    """The largest pairs of all trials: the highest rank on every target of any."""
    lora = config.lora
    if ranks:
        lora = replace(lora, rank=max(*ranks, lora.rank, *lora.rank_pattern.values()), rank_pattern={})
    return replace(lora, target_modules=tuple(dict.fromkeys((*lora.target_modules, *targets))))


def _check(options: TuneOptions, seeds: int) -> None:
    """Raises ConfigError for numbers that no search can be made with."""
    minutes, tokens, together = options.minutes, options.tokens, options.together
    problems = Problems("The search cannot start")
    if not options.try_rates and minutes is None and tokens is None:
        problems.add("No budget is given. Give --minutes or --tokens, or use --try-rates.")
    numbers = {"--minutes": minutes, "--tokens": tokens, "--seeds": seeds, "--difference": options.difference}
    wrong = {name: value for name, value in numbers.items() if value is not None and value <= 0}
    for name, value in wrong.items():
        problems.add(f"{name} is {value:g}; it must be above 0.")
    if together < 2:
        problems.add(f"--together is {together}; trials are compared with each other, so 2 or more are trained at once.")
    problems.raise_if_any()


def _sampler(seed: int) -> Any:
    """An Optuna study. Raises EnvironmentProblem where the package is missing."""
    try:
        import optuna
    except ImportError:
        need = "The package optuna, which draws the trials, is missing. --try-rates does without"
        raise PackageMissing(need, "lorakeet[tune]", ["optuna"]) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))


def _rows(setup: TextAssembly) -> SearchRows:
    """The held-out rows for the search, and the test rows, or else half of the held-out rows, for the confirmation."""
    held_out = list(setup.held_out.examples)
    groups = groups_by_key([*setup.dataset.held_out, *setup.dataset.test])
    if setup.test.examples:
        return SearchRows(held_out, list(setup.test.examples), groups, "test rows")
    seed = setup.config.data.split_seed
    units = sorted({groups.get(e.key, e.key) for e in held_out}, key=lambda unit: seed_for(seed, f"tune/{unit}"))
    first = set(units[: (len(units) + 1) // 2])
    search = [example for example in held_out if groups.get(example.key, example.key) in first]
    confirm = [example for example in held_out if groups.get(example.key, example.key) not in first]
    if min(len(search), len(confirm)) < 2 * setup.config.train.answers:
        raise DataError(
            f"{len(held_out) // setup.config.train.answers} held-out rows are too few: those that choose and those that confirm "
            "must be 2 or more each. Raise data.held_out_fraction, or name a data.test file."
        )
    return SearchRows(search, confirm, groups, "held-out rows that the search never saw", "the held-out rows")


def _show(search: Search, console: Console) -> None:
    columns = ("trial", "settings", "steps", search.measure, "− run file", "verdict")
    table = WholeTable(*columns, title="The search", title_justify="left")
    for trial in search.trials:
        loss, against = trial.loss, trial.against_start
        cells = ["diverged" if loss is None else f"{loss.value:.4f} [{span(loss, 4, between=', ')}]"]
        if against is not None:
            found = against.difference
            cells += [f"{signed(found.value, 4)} [{span(found, 4, signs=True, between=', ')}]", against.verdict]
        style = "bold" if trial.name == search.winner else ""
        table.add_row(trial.name, trial.settings, str(trial.steps), *(Text(cell) for cell in cells), style=style)
    console.print(table)
    console.print(search.conclusion, markup=False, soft_wrap=True)


def _write(out: Path, settings: RunConfig, search: Search, setup: TextAssembly, console: Console) -> None:
    report = Report(
        "A search for settings",
        task="language",
        subtitle=f"{setup.text.name}, {len(search.trials)} trials",
        search=search,
        warnings=(search.power,),
        facts={
            "Rows": f"{len(setup.dataset.train)} training, {search.rows} for the search",
            "Seeds": f"training {settings.train.seed}, evaluation {settings.evaluate.seed}",
            "Versions": versions(),
            "Machine": machine(setup.text.device),
        },
        next_commands=(Command(f"lorakeet finetune {out / 'config.yaml'}", "train with the chosen settings"),),
    )
    with writing(f"The search in {out}", "Free some space, or choose another --out."), new_folder(out) as folder:
        write_whole(folder / "config.yaml", dump_yaml(settings).encode())
        write_report(report, folder)
    console.print(f"Settings: {out / 'config.yaml'}   Report: {out / 'report.html'}", soft_wrap=True)
