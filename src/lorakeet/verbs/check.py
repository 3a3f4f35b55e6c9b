"""`lorakeet check`: whether a run meets requirements, for a pipeline: exit code 0, or 3 with what is not met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lorakeet.errors import ConfigError, DataError, VerificationFailed, nearest
from lorakeet.evaluate.baselines import MAJORITY
from lorakeet.evaluate.certificate import Certificate, is_address, read_certificate
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report.report import Report, read_report
from lorakeet.evaluate.requirement import Requirement, parse_requirement
from lorakeet.formats.identity import require_certified
from lorakeet.runs.certified import require_own_base
from lorakeet.train.run import RunFolder
from lorakeet.verbs.options import CheckOptions

DRIFT, CERTIFICATE = "drift", "certificate"


@dataclass(frozen=True)
class Met:
    """One requirement, what was found, and whether it is met."""

    what: str
    required: str
    found: str
    met: bool

    def __str__(self) -> str:
        return f"{'pass' if self.met else 'FAIL'}  {self.what}: {self.found} ({self.required} is required)"


@dataclass(frozen=True)
class Checked:
    """All requirements, which are met."""

    requirements: tuple[Met, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"met": True, "requirements": [vars(one) for one in self.requirements]}


def check(options: CheckOptions, *, console: Console) -> Checked:
    """Holds the run's report and certificate against the requirements, and prints a line for each. Loads no model.

    Raises VerificationFailed (exit code 3) if one is not met, ConfigError for one that cannot be read or was not measured, and
    DataError without a report.
    """
    wanted = _wanted(options)
    folder = RunFolder.at(Path(options.run))
    if folder is None:
        raise DataError(f"{options.run} is no run folder: it has no config.yaml. Give the folder of a run that was measured.")
    report, say = read_report(folder.report), partial(console.print, markup=False, soft_wrap=True)
    require_certified(folder.path, uncertified=options.uncertified, say=say)
    require_own_base(folder.path, uncertified=options.uncertified, say=say)
    found = [_metric(report, name, requirement) for name, requirement in wanted]
    found += [_beats(report, system) for system in _rivals(report, options.beats)]
    if options.certificate != "any":
        there = read_certificate(folder.certificate) if folder.certificate.exists() else None
        found.append(_certified(there, options.certificate))
    for one in found:
        console.print(Text(str(one), style="green" if one.met else "bold red"))
    if failed := [one for one in found if not one.met]:
        lines = "; ".join(f"{one.what} is {one.found}, and {one.required} is required" for one in failed)
        raise VerificationFailed(f"{options.run} does not meet {len(failed)} of {len(found)} requirements: {lines}.")
    return Checked(tuple(found))


def _wanted(options: CheckOptions) -> list[tuple[str, Requirement]]:
    """The metrics with their requirements. Raises ConfigError for a text that is none."""
    given = [(name, text) for name in ("accuracy", "loss", DRIFT) if (text := getattr(options, name)) is not None]
    for entry in options.require:
        name, space, text = entry.strip().partition(" ")
        if not space:
            raise ConfigError(f"--require is {entry!r}; expected a metric and a bound, such as 'exact_match >=0.5'.")
        given.append((name, text))
    return [(name, parse_requirement(text, f"the requirement on {name}")) for name, text in given]


def _certified(certificate: Certificate | None, required: str) -> Met:
    """Whether the run and its artefacts passed; "served" also requires a server, and that each is proved."""
    if certificate is None:
        return Met(CERTIFICATE, "passed", "missing: resume the run to its end, or train again", False)
    good = certificate.passed and not certificate.failed_artefacts
    if required == "served":
        servers = [verdict for name, verdict in certificate.artefacts.items() if is_address(name)]
        found = certificate.verdict if servers else "no server was verified"
        return Met(CERTIFICATE, "every server proved", found, good and bool(servers) and {*servers} == {"proved"})
    return Met(CERTIFICATE, "passed", certificate.verdict, good)


def _metric(report: Report, name: str, requirement: Requirement) -> Met:
    adapter = next((system for system in report.systems if system.role == "adapter"), None)
    known: dict[str, Estimate] = dict(adapter.metrics) if adapter is not None else {}
    if report.drift is not None:
        known[DRIFT] = report.drift.mean_kl
    if name not in known:
        raise ConfigError(f"The report has no {name}; it has {', '.join(known) or 'no metrics'}.{nearest(name, known)}")
    return Met(name, str(requirement), str(known[name]), requirement.holds(known[name]))


def _rivals(report: Report, given: Sequence[str]) -> list[str]:
    """The systems to beat by their full names; the majority class too where the report compares it: one label has most rows."""
    rivals = [MAJORITY if name == "majority" else name for name in given]
    always = MAJORITY if any(one.right == MAJORITY for one in report.comparisons) else ""
    return list(dict.fromkeys([*rivals, always] if rivals and always else rivals))


def _beats(report: Report, system: str) -> Met:
    """Whether the report's first comparison of the adapter with a system says that the adapter is better."""
    compared = {one.right: one for one in reversed(report.comparisons)}
    if system not in compared:
        raise ConfigError(
            f"The report does not compare the adapter with {system!r}; it does with {', '.join(map(repr, compared))}."
            f"{nearest(system, compared)}"
        )
    one = compared[system]
    note = next((f" ({each.note})" for each in report.systems if each.name == system and each.note), "")
    return Met(f"{one.metric} against {system}{note}", "better", f"{one.difference} ({one.verdict})", one.verdict == "better")
