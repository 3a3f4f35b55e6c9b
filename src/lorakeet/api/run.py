"""A run from Python: `finetune`, and what a finished run holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lorakeet.api.adapter import AdapterValue
from lorakeet.api.arguments import in_python, python_call
from lorakeet.api.classify import LabelAnswer, classified
from lorakeet.api.display import ShownCertificate, one_line, page_of, table_of
from lorakeet.api.model import BaseModelHandle
from lorakeet.api.model import load as load_model
from lorakeet.api.rows import RowSet
from lorakeet.api.rows import rows as rows_of
from lorakeet.config import RunConfig, read_run
from lorakeet.core.spec import LoraSpec
from lorakeet.data.split import read_split_record
from lorakeet.disk import read_regular
from lorakeet.errors import ConfigError, DataError, readable
from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.evaluate.report.report import Report, SystemResult, read_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.wording import metric_words
from lorakeet.ranks.spec import RanksSpec
from lorakeet.registry import text_sections
from lorakeet.runs.terminal import TerminalConsole
from lorakeet.settings import load as load_settings
from lorakeet.settings import to_mapping
from lorakeet.train.progress import Record
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.verbs.finetune import finetune as finetune_run
from lorakeet.verbs.options import FinetuneOptions

_SAID = 120  # characters of a headline in the text of a run
_LOSSES = ("loss", "log_loss")  # before those of kinds
Called = Callable[[Record], object]


@python_call(in_python)
def finetune(
    model: BaseModelHandle | RunConfig | str | Path | nn.Module,
    rows: RowSet | Any = None,
    *,
    lora: LoraSpec | None = None,
    train: TrainSpec | None = None,
    out: str | Path | None = None,
    on_step: Called | None = None,
    on_held_out: Called | None = None,
    seeds: int = 1,
    **more: Any,
) -> FinishedRun:
    """Trains an adapter, evaluates it on rows that it never saw, and certifies it; all of it is in the new folder `out`.

    `model`: what `lk.load` returns, a name or path, or a whole RunConfig, which then holds every setting. `rows`: what
    `lk.rows` takes or returns. `more`: evaluate=lk.Evaluate(…), ranks=lk.Ranks(…), preference=lk.Preference(…) for another
    objective than sft, quiet=True to print nothing. `seeds`: so many are trained, and the report has their spread.
    `on_step` is called after each step, and `on_held_out` after each held-out evaluation, with a mapping of the numbers that
    metrics.jsonl has. OUT/config.yaml is the run file: `lorakeet finetune OUT/config.yaml` does the same again.

    Raises ConfigError, DataError and EnvironmentProblem before anything is trained, RunStopped if the run ends early, and
    VerificationFailed if the certificate fails.
    """
    quiet = bool(more.pop("quiet", False))
    if isinstance(model, RunConfig):
        if more or any(given is not None for given in (rows, lora, train, out)):
            raise ConfigError("A RunConfig has every setting, rows included. Change it with .changed(…), and give it alone.")
        config = model
    else:
        handle = model if isinstance(model, BaseModelHandle) else load_model(model)
        place = str(Path("runs/lorakeet" if out is None else out))
        if rows is None:
            raise ConfigError("rows is missing; give lk.rows(…), a path, or records.")
        rows = rows if isinstance(rows, RowSet) else rows_of(rows)
        config = _config(handle, rows, lora=lora or LoraSpec(), train=train or TrainSpec(), out=place, more=more)
        handle.release()  # a run reads the weights itself
    options = FinetuneOptions(seeds=seeds)
    with rows.naming_rows(config.data) if isinstance(rows, RowSet) else nullcontext():
        finetune_run(config, options, console=TerminalConsole(quiet=quiet), on_step=on_step, on_held_out=on_held_out)
    return open_run(config.out)


@python_call(in_python)
def resume(run: FinishedRun | str | Path, *, quiet: bool = False) -> FinishedRun:
    """Goes on with a run that ended early, from its last checkpoint, with the settings that it began with.

    Raises ConfigError where there is no run or nothing to go on from, and as `finetune` does.
    """
    path = run.path if isinstance(run, FinishedRun) else Path(run)
    finetune_run(open_run(path).config, FinetuneOptions(resume=path), console=TerminalConsole(quiet=quiet))
    return open_run(path)


def _config(
    handle: BaseModelHandle, rows: RowSet, *, lora: LoraSpec, train: TrainSpec, out: str, more: dict[str, Any]
) -> RunConfig:
    """The settings of the run, checked together."""
    known = {"evaluate": EvaluateSpec, "ranks": RanksSpec, **text_sections()}
    if unknown := [name for name in more if name not in known]:
        names = ", ".join(known)
        raise ConfigError(f"finetune has no argument {unknown[0]!r}; it takes lora, train, {names}, out, on_step, quiet.")
    RunFolder(Path(out)).require_free()
    config = RunConfig(model=handle.spec, memory=handle.memory, lora=lora, data=rows.spec, train=train, out=out, **more)
    checked = load_settings(RunConfig, to_mapping(config), where="lk.finetune")
    return replace(checked, data=rows.beside(out))  # written only now, so that a wrong setting leaves nothing


@python_call(in_python)
def open_run(path: str | Path) -> FinishedRun:
    """The run in the folder `path`. Raises DataError where there is none."""
    folder = RunFolder.at(Path(path))
    if folder is None:
        raise DataError(f"{path} is no run: it has no config.yaml. Give the folder that finetune wrote.")
    return FinishedRun(Path(path), read_run(folder.config))


@dataclass(frozen=True)
class FinishedRun:
    """A run folder as a value: its settings, adapter, report and certificate, each read at first use."""

    path: Path
    config: RunConfig

    @property
    def folder(self) -> RunFolder:
        """The paths within the run."""
        return RunFolder(self.path)

    @cached_property
    def adapter(self) -> AdapterValue:
        """The best adapter by held-out loss."""
        return AdapterValue.read(self.path, quiet=True)

    @property
    @python_call(in_python)
    def report(self) -> ShownReport:
        """The measurements; in a notebook, the page itself."""
        return ShownReport(read_report(self.folder.report))

    @property
    @python_call(in_python)
    def certificate(self) -> Certificate:
        """What was compared with the trained adapter, and by how much it differs."""
        return ShownCertificate.of(read_certificate(self.folder.certificate))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: a mapping for each step and held-out evaluation."""
        with readable(self.folder.metrics):
            return [json.loads(line) for line in read_regular(self.folder.metrics).decode().splitlines()]

    @cached_property
    def model(self) -> BaseModelHandle:
        """The base that the adapter was trained on."""
        return BaseModelHandle(replace(self.config.model, device="auto"), self.config.memory)

    @cached_property
    def rows(self) -> RowSet:
        """The rows of the run, split as they were."""
        return RowSet(self.config.data)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels of the training rows, in reporting order; empty if rows have none."""
        found = read_split_record(self.folder.split).get("labels")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @python_call(in_python)
    def classify(self, texts: Sequence[str | Mapping[str, Any]]) -> list[LabelAnswer]:
        """The label of each text, with its probability; of each record, if the template has other columns than the text."""
        with self.model.computing_with(self.adapter) as text:
            return classified(text, list(texts), self.config.data, self.labels, micro_tokens=self.config.train.micro_tokens)

    def generate(self, prompt: Any, **settings: Any) -> Any:
        """`model.generate` with this run's adapter."""
        return self.model.generate(prompt, adapter=self, **settings)

    def __str__(self) -> str:
        if not (self.folder.report.is_file() and self.folder.certificate.is_file()):
            return f"Run {self.path}: not finished; lk.resume({str(self.path)!r}) goes on"
        said = self.report.value.verdict.sentence if self.report.value.verdict else "not evaluated"
        proved = "certificate passed" if self.certificate.passed else "certificate FAILED"
        return f"Run {self.path}: {said if len(said) <= _SAID else said[: _SAID - 1] + '…'} ({proved})"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>{self.report.table()}"


class ShownReport:
    """A report whose systems are attributes: `report.adapter.accuracy` prints 0.805 [0.762, 0.842] n=379."""

    def __init__(self, value: Report) -> None:
        self.value = value

    @property
    def adapter(self) -> ShownSystem:
        """The adapter's metrics."""
        return self._of_role("adapter")

    @property
    def base(self) -> ShownSystem:
        """The base's metrics."""
        return self._of_role("base")

    def __getitem__(self, name: str) -> ShownSystem:
        found = next((system for system in self.value.systems if system.name == name), None)
        if found is None:
            known = ", ".join(repr(system.name) for system in self.value.systems)
            raise KeyError(f"The report has no system {name!r}; it has {known}.")
        return ShownSystem(found)

    def _of_role(self, role: str) -> ShownSystem:
        found = next((system for system in self.value.systems if system.role == role), None)
        if found is None:
            raise AttributeError(f"The report has no {role}.")
        return ShownSystem(found)

    def table(self) -> str:
        """The systems and their metrics as an HTML table."""
        names = list(dict.fromkeys(name for system in self.value.systems for name in system.metrics))
        head = ("", *(metric_words(name).title for name in names))
        body = [(system.name, *(system.metrics.get(name, "") for name in names)) for system in self.value.systems]
        return table_of([head, *body])

    def __str__(self) -> str:
        lines = [self.value.title]
        for system in self.value.systems:
            lines.append(f"  {system.name}: " + ", ".join(f"{name} {value}" for name, value in system.metrics.items()))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return one_line(f"Report: {self.value.title}; systems {', '.join(system.name for system in self.value.systems)}")

    def _repr_html_(self) -> str:
        return page_of(self.value)


class ShownSystem:
    """One system of a report; its metrics are attributes."""

    def __init__(self, value: SystemResult) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Any:
        metrics = self.__dict__["value"].metrics if "value" in self.__dict__ else {}
        if name == "loss":  # of labels it is that of the label, of other kinds one of their own
            name = next((one for one in (*_LOSSES, *metrics) if one in metrics and one.endswith("loss")), name)
        if name not in metrics:
            raise AttributeError(f"{name!r} was not measured; there are {', '.join(metrics) or 'no metrics'}.")
        return metrics[name]

    def __dir__(self) -> Sequence[str]:
        return [*super().__dir__(), *self.value.metrics]

    def __str__(self) -> str:
        return f"{self.value.name}: " + ", ".join(f"{name} {value}" for name, value in self.value.metrics.items())

    __repr__ = __str__
