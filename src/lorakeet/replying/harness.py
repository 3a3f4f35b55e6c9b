"""Tasks of lm-evaluation-harness, answered by base and adapter on the same rows, and compared with paired intervals.

The harness makes the prompts and decides what is right; the intervals are Lorakeet's. Metrics of all rows together, such as
perplexity, have no value for each row: they are noted, without an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorakeet.errors import ConfigError, EnvironmentProblem, nearest, one_message
from lorakeet.evaluate.compare import Comparison, compare_values, holm
from lorakeet.evaluate.intervals import Floats, mean
from lorakeet.evaluate.report.report import Report, Role, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.verdict import Phrase, Tone, Verdict, verdict_of
from lorakeet.evaluate.wording import number
from lorakeet.models.generate.harness_model import harness_model
from lorakeet.models.inject import activate
from lorakeet.models.text.model import TextModel

ADAPTER, BASE = "adapter", "base"
_MEND = "Its data may not be here, or a task file is wrong."
INSTALL = 'Install lm-evaluation-harness with pip install "lorakeet[tasks]".'


@dataclass(frozen=True)
class HarnessTasks:
    """Which tasks: their `names`, a folder with task files, rows of each (None: all), examples before each prompt (None: the
    task's own number), and whether prompts go through the chat template."""

    names: tuple[str, ...]
    folder: Path | None = None
    rows: int | None = None
    examples: int | None = None
    chat: bool = False


@dataclass(frozen=True, eq=False)
class TaskScores:
    """The results of one system: by metric the value of each row (n,), and the values that only all rows together have."""

    by_row: Mapping[str, Floats]
    whole: Mapping[str, float]
    higher_is_better: Mapping[str, bool]
    shortened: int = 0  # prompts that lost their beginning


def require_tasks(wanted: HarnessTasks) -> Any:
    """The harness's task manager. Raises EnvironmentProblem without the harness, ConfigError for a task that it does not know."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        said = f"--tasks needs lm-evaluation-harness, which is not installed ({error}). {INSTALL}"
        raise EnvironmentProblem(said, code="package-missing", values={"packages": ["lm_eval"]}) from error
    if wanted.rows is not None and wanted.rows < 2:
        raise ConfigError(f"--task-rows is {wanted.rows}; expected 2 or more.")
    if wanted.folder is not None and not wanted.folder.is_dir():
        raise ConfigError(f"--task-folder {wanted.folder} does not exist; name a folder with task files (.yaml).")
    with one_message(f"lm-evaluation-harness cannot list its tasks and those of {wanted.folder}", _MEND, EnvironmentProblem):
        manager = TaskManager(include_path=None if wanted.folder is None else str(wanted.folder))
        known = set(manager.all_tasks)
    if unknown := [name for name in wanted.names if name not in known]:
        raise ConfigError(f"lm-evaluation-harness has no task {unknown[0]!r}.{nearest(unknown[0], known)}")
    return manager


def run_tasks(
    text: TextModel, wanted: HarnessTasks, *, adapter: str, longest: int, micro_tokens: int, console: Console
) -> dict[str, TaskScores]:
    """The results of base and adapter, by system. Raises EnvironmentProblem where a task's data cannot be read."""
    import lm_eval

    manager, found = require_tasks(wanted), dict[str, TaskScores]()
    for system, name in ((BASE, None), (ADAPTER, adapter)):
        activate(text.model, name)
        console.print(f"{system} answers {', '.join(wanted.names)}.", markup=False, soft_wrap=True)
        model = harness_model(text, longest=longest, micro_tokens=micro_tokens)
        with one_message(f"lm-evaluation-harness could not run {', '.join(wanted.names)}", _MEND, EnvironmentProblem):
            results = lm_eval.simple_evaluate(
                model=model, tasks=list(wanted.names), task_manager=manager, limit=wanted.rows, num_fewshot=wanted.examples,
                apply_chat_template=wanted.chat, bootstrap_iters=0, log_samples=True,
            )  # fmt: skip
        found[system] = replace(task_scores(results), shortened=model.shortened)
    activate(text.model, adapter)
    return found


def task_scores(results: Mapping[str, Any]) -> TaskScores:
    """What `simple_evaluate` returned, by "task metric"; of several filters the first one's.

    A metric has values of rows if their mean is what the harness reports: others, such as perplexity, are of all rows together.
    """
    by_row: dict[str, Floats] = {}
    whole: dict[str, float] = {}
    higher: dict[str, bool] = {}
    for task, samples in results["samples"].items():
        for name, better in results["higher_is_better"].get(task, {}).items():
            key = f"{task} {name}"
            first = {sample["doc_id"]: sample[name] for sample in reversed(samples) if name in sample}
            values, reported = [first[row] for row in sorted(first)], _reported(results["results"][task], name)
            numbers = all(isinstance(value, (int, float, np.number, np.bool_)) for value in values)
            if values and numbers and np.isclose(np.mean(values), reported):
                by_row[key], higher[key] = np.array(values, float), bool(better)
            else:
                whole[key] = reported
    for group, found in results.get("groups", {}).items():
        names = {label.partition(",")[0] for label, value in found.items() if isinstance(value, (float, np.floating))}
        whole |= {f"{group} {name}": _reported(found, name) for name in sorted(names) if not name.endswith("_stderr")}
    return TaskScores(by_row, whole, higher)


def _reported(results: Mapping[str, Any], name: str) -> float:
    """The value of a metric that the harness reports, by its first filter."""
    found = [value for label, value in results.items() if label.partition(",")[0] == name]
    return float(found[0]) if found else float("nan")


def tasks_report(title: str, found: Mapping[str, TaskScores], spec: EvaluateSpec) -> Report:
    """A report of both systems: each metric with its interval, and the paired differences, adjusted for their number."""
    mine, base = found[ADAPTER], found[BASE]
    roles: tuple[tuple[str, Role], ...] = ((ADAPTER, "adapter"), (BASE, "base"))
    systems = tuple(
        SystemResult(name, role, {key: mean(values, spec=spec) for key, values in found[name].by_row.items()})
        for name, role in roles
    )
    names = [key for key in mine.by_row if mine.higher_is_better[key] and key in base.by_row]
    tests = [
        partial(_compared, key, mine.by_row[key], base.by_row[key]) for key in names
    ]  # fmt: skip
    comparisons = holm(tests, spec) if len(tests) > 1 else tuple(test(spec) for test in tests)
    notes = [
        f"{key} has no value for each row, so no interval: adapter {number(value)}, base {number(base.whole.get(key))}."
        for key, value in mine.whole.items()
    ]  # fmt: skip
    lower = [key for key in mine.by_row if not mine.higher_is_better[key]]
    notes += [f"{key} is better where it is lower; its difference is not tested." for key in lower]
    if mine.shortened:
        notes.append(f"{mine.shortened} prompts were longer than the model may read here, and lost their beginning.")
    return Report(
        title, task="language", systems=systems, comparisons=comparisons, verdict=_verdict(comparisons),
        rows_of=max((len(values) for values in mine.by_row.values()), default=0), warnings=tuple(notes),
    )  # fmt: skip


def _compared(key: str, mine: Floats, base: Floats, spec: EvaluateSpec) -> Comparison:
    return compare_values((ADAPTER, BASE), key, (mine, base), spec)


def _verdict(comparisons: Sequence[Comparison]) -> Verdict | None:
    """The verdict on one metric, or of several how many are better, worse and neither."""
    if len(comparisons) < 2:
        return verdict_of(comparisons)
    better, worse = (sum(one.verdict == word for one in comparisons) for word in ("better", "worse"))
    tone: Tone = "mixed" if better and worse else "better" if better else "worse" if worse else "none"
    text = f"Of {len(comparisons)} metrics of tasks the adapter is better than its base in {better} and worse in {worse}"
    return Verdict((Phrase(text, "adjusted for their number"),), tone)
