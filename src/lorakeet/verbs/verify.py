"""`lorakeet verify`: is what was merged, exported or served the model that was trained? Measured on the run's held-out rows.

live adapter in fp32  ──  the same ids, prompts, answers and texts  ──  each artefact of --against
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.values import encode
from lorakeet.formats.identity import require_certified, with_note
from lorakeet.kinds.protocol import run_without_text
from lorakeet.kinds.terminal import show_certificate
from lorakeet.models.files.source import find_source
from lorakeet.planning.check import (
    SERVERS,
    fit_check,
    maps_a_file,
    size_of_check,
)
from lorakeet.runs.open_adapter import Opened, open_by_options
from lorakeet.runs.residency import peak_said, temporary_stores
from lorakeet.train.run import RunFolder
from lorakeet.verbs.deployment import Deployable, check_deployment
from lorakeet.verbs.options import VerifyOptions, require_only
from lorakeet.verification.certify import ROWS, HowCompared, certify_artefacts, keep_checks
from lorakeet.verification.server_apis import adapters_of
from lorakeet.verification.watch import parse_duration, watch_server

WATCHED_ROWS = 4
UNPROVED = 4  # the exit code where nothing failed, and a wrong server might not have been seen


@dataclass(frozen=True)
class Verified:
    """What the comparison found."""

    certificate: Certificate
    watched: bool = False  # by few rows, which prove nothing

    @property
    def exit_code(self) -> int:
        """0, or 4 where a server is not proved; it is 3 where a check failed, which raises before this is returned."""
        return UNPROVED if self.certificate.unproved_artefacts and not self.watched else 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found = self.certificate
        return {"passed": found.passed, "artefacts": found.artefacts, "certificate": encode(found)}


@dataclass(frozen=True)
class VerifiedAdapters:
    """What was found of each adapter of a server, by its name; `failed` with what differs."""

    found: Mapping[str, Verified]
    failed: Mapping[str, str]
    without_run: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """3 where a check failed; 4 where an adapter is not proved, or no run of its name is there; else 0."""
        if self.failed:
            return VerificationFailed.exit_code
        return UNPROVED if self.without_run or any(one.exit_code for one in self.found.values()) else 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found = {name: one.to_mapping() for name, one in self.found.items()}
        return {"adapters": found, "failed": dict(self.failed), "without a run": list(self.without_run)}


def verify(options: VerifyOptions, *, console: Console) -> Verified | VerifiedAdapters | Deployable:
    """Compares the adapter, live on its base in fp32, with every artefact in `against`, and writes what was found.

    The checks go into the run's certificate.json, report.json and report.html, beside what training put there, named by the paths
    of the artefacts; checks of artefacts that were deleted go. Of a folder of runs, each adapter that a server lists is compared
    with the run of its name. Raises VerificationFailed (exit code 3) with the worst layer or the first diverging token and the
    likely cause; ConfigError for an artefact that cannot be opened. With `deploy` nothing is compared: see `check_deployment`.
    `memory`, or else the run's memory.budget, is kept, if need be by streaming the models.
    """
    path = Path(options.run_or_adapter)
    if options.deploy is not None:
        return check_deployment(path, options.deploy, console, base=options.base, uncertified=options.uncertified)
    if options.watch is not None:
        return _watched(path, options.watch, options, console)
    if path.is_dir() and RunFolder.at(path) is None and not any(path.glob("*.safetensors")) and _one_server(options.against):
        return _verify_adapters(path, options, console)
    if (other := run_without_text(path)) is not None:
        kind, run, config = other
        require_only(options, ("run_or_adapter", "against", "uncertified"), config.kind)
        note = require_certified(path, uncertified=options.uncertified, say=console.print)
        found = with_note(kind.verify_run(run, config, options.against, console), note)
        show_certificate(found, console)
        keep_checks(run, found, path.absolute().parent)
        found.raise_if_failed()
        return Verified(found)
    opened = open_by_options(path, options, console)
    options = replace(options, against=options.against or _found_beside(opened))
    source = find_source(opened.config.model, console.print)
    size = partial(size_of_check, opened, options.against, source, "this check", rows=_rows(options))
    opened = fit_check(opened, size, _place(opened), console)
    residency, mapped = opened.residency, maps_a_file(options.against)
    with peak_said(residency, console, mapped=mapped), temporary_stores(residency, "Nothing was compared."):
        certificate = _certified(opened, options, console)
    show_certificate(certificate, console)
    keep_checks(opened.run, certificate, _place(opened).parent)
    certificate.raise_if_failed()
    return Verified(certificate)


def _certified(opened: Opened, options: VerifyOptions, console: Console) -> Certificate:
    """The checks of every artefact, by the options."""
    how = HowCompared(options.rows, options.precision, options.base_gguf, options.minutes if options.modules else 0.0)
    return certify_artefacts(opened, options.against, how, console, of=options.run_or_adapter, beside=_place(opened).parent)


def _one_server(against: Sequence[str]) -> bool:
    """Whether the address of a server, without the name of a model, is all that is given."""
    return len(against) == 1 and against[0].startswith(SERVERS) and "#" not in against[0]


def _verify_adapters(folder: Path, options: VerifyOptions, console: Console) -> VerifiedAdapters:
    """Compares each adapter of a running server with the run of its name in `folder`. ConfigError where there is none."""
    say, url = partial(console.print, markup=False, soft_wrap=True), options.against[0]
    names = adapters_of(url)
    runs = {name: folder / name for name in names if Path(name).name == name and (folder / name).is_dir()}
    if not runs:
        raise ConfigError(f"{url} serves {names or 'no adapters'}; {folder} has no run of such a name.")
    found, failed = dict[str, Verified](), dict[str, str]()
    for name, run in runs.items():
        try:
            one = verify(replace(options, run_or_adapter=str(run), against=(f"{url}#{name}",)), console=console)
        except VerificationFailed as error:
            failed[name] = str(error)
            say(str(error), style="bold red")
            continue
        assert isinstance(one, Verified)
        found[name] = one
    without = tuple(name for name in names if name not in runs)
    for name in without:
        say(f"not proved  {url}#{name}: {folder} has no run of this name, so it was compared with nothing.", style="bold yellow")
    verdicts = {name: one.certificate.artefacts[f"{url}#{name}"] for name, one in found.items()} | dict.fromkeys(failed, "failed")
    say(f"{url}: {', '.join(f'{name} {verdict}' for name, verdict in verdicts.items())}.")
    return VerifiedAdapters(found, failed, without)


def _watched(path: Path, target: str, options: VerifyOptions, console: Console) -> Verified:
    """Compares a running server again and again; ConfigError for options that contradict each other."""
    if options.against:
        raise ConfigError("--watch and --against contradict each other; give --watch URL alone.")
    if not target.startswith(SERVERS):
        raise ConfigError(f"--watch is '{target}'; expected the address of a server, such as http://127.0.0.1:8000#reviews.")
    if options.rounds < 0:
        raise ConfigError(f"--rounds is {options.rounds}; it must be 0 (no end) or more.")
    every = parse_duration(options.every)
    opened = open_by_options(path, options, console)
    few = replace(options, against=(target,), rows=min(_rows(options), WATCHED_ROWS), modules=False)
    compare, say = partial(_certified, opened, few, console), partial(console.print, markup=False, soft_wrap=True)
    found = watch_server(compare, target, every, rounds=options.rounds, metrics=options.metrics, say=say)
    return Verified(found, watched=True)


def _rows(options: VerifyOptions) -> int:
    """How many held-out rows are compared. ConfigError for none."""
    rows = ROWS if options.rows is None else options.rows
    if rows < 1:
        raise ConfigError(f"--rows is {rows}; expected 1 or more.")
    return rows


def _found_beside(opened: Opened) -> tuple[str, ...]:
    """What earlier commands wrote under the names that they print: RUN-merged, RUN-gguf and RUN-ollama."""
    place = _place(opened)
    known = [place.with_name(f"{place.name}{ending}") for ending in ("-merged", ".gguf", "-ollama")]
    found = tuple(str(path) for path in known if path.exists())
    if not found:
        raise ConfigError(
            f"There is nothing to compare {place.name} with: name it with --against (a merged folder, a .gguf file, an http "
            f"address). Looked for {', '.join(path.name for path in known)} beside it."
        )
    return found


def _place(opened: Opened) -> Path:
    return Path(os.path.abspath(opened.run.path if opened.run else opened.folder))

