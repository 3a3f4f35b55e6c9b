"""What the list of runs shows of each run folder, with a cache in SQLite that may be deleted at any time."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakeet.config import read_yaml
from lorakeet.disk import write_whole
from lorakeet.errors import DataError, LorakeetError, one_message, shortened, visible
from lorakeet.evaluate.report.report import report_values
from lorakeet.evaluate.values import from_text, to_text
from lorakeet.formats.files.json_object import read_object
from lorakeet.studio.places import regular_within
from lorakeet.train.log import read_metrics
from lorakeet.train.run import RunFolder

TAGS = ".studio.json"  # in a run folder
VERSION = 4  # of what is cached
_SPARK = 40  # points of a small curve
_MOST_TAGS, _LONGEST_TAG = 100, 100  # that are shown of what is in a file


@dataclass(frozen=True)
class RunSummary:
    """One run, by its files. `ended` is why it is over: done, stopped, or an empty text before the first step."""

    name: str
    made: float = 0.0  # seconds since 1970
    model: str = ""
    rows: str = ""
    ended: str = ""
    step: int = 0
    loss: float | None = None
    held_out: float | None = None
    best: float | None = None
    base: float | None = None
    verdict: str = ""
    tone: str = ""
    against: str = ""  # what `mixed` means: how the comparisons of the verdict disagree
    passed: bool | None = None
    spark: tuple[float, ...] = ()
    tags: tuple[str, ...] = ()
    problem: str = ""  # why its files cannot be read


class Index:
    """The summaries of all runs in a folder."""

    def __init__(self, runs: Path, cache: Path) -> None:
        self.runs, self.cache = runs, cache
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of the run folders."""
        with suppress(FileNotFoundError), os.scandir(self.runs) as entries:
            found = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)]
            return sorted(name for name in found if name.isprintable() and (self.runs / name / "config.yaml").is_file())
        return []

    def summaries(self, most: int | None = None) -> list[RunSummary]:
        """The newest runs first. What has not changed comes from the cache; of the others at most `most` are read."""
        stamps = {name: _stamp(self.runs / name) for name in self.names()}
        with self._lock:
            known = self._load()
            found = {name: known[name][1] for name, stamp in stamps.items() if name in known and known[name][0] == stamp}
            newest = sorted(stamps, key=lambda name: -int("0" + stamps[name].partition(":")[0].strip("-")))
            missing = [name for name in newest if name not in found][:most]
            fresh = {name: summary_of(self.runs / name) for name in missing}
            if fresh or known.keys() - stamps.keys():
                self._store({name: (stamps[name], summary) for name, summary in {**found, **fresh}.items()})
        return sorted({**found, **fresh}.values(), key=lambda one: (-one.made, one.name))

    def _load(self) -> dict[str, tuple[str, RunSummary]]:
        """What the cache has; nothing where it is missing, damaged, or of another version."""
        if not self.cache.is_file():
            return {}
        try:
            with closing(sqlite3.connect(self.cache, timeout=5)) as base:
                if base.execute("pragma user_version").fetchone()[0] != VERSION:
                    return {}
                rows = base.execute("select name, stamp, summary from runs").fetchall()
            return {name: (stamp, from_text(RunSummary, text, where=str(self.cache))) for name, stamp, text in rows}
        except (sqlite3.Error, DataError):
            return {}

    def _store(self, summaries: dict[str, tuple[str, RunSummary]]) -> None:
        rows = [(name, stamp, to_text(summary)) for name, (stamp, summary) in summaries.items()]
        try:
            self._write(rows)
        except sqlite3.DatabaseError:  # a damaged file
            with suppress(OSError, sqlite3.Error):
                self.cache.unlink(missing_ok=True)
                self._write(rows)

    def _write(self, rows: list[tuple[str, str, str]]) -> None:
        with closing(sqlite3.connect(self.cache, timeout=5)) as base, base:
            base.execute("create table if not exists runs (name text primary key, stamp text, summary text)")
            base.execute(f"pragma user_version = {VERSION}")
            base.execute("delete from runs")
            base.executemany("insert into runs values (?, ?, ?)", rows)


def summary_of(folder: Path) -> RunSummary:
    """What the files of a run say; a file that cannot be read is named in `problem`, and those after it are left out."""
    run, problem = RunFolder(folder), ""
    found: dict[str, Any] = {}
    try:
        with one_message("Its files are not as Lorakeet writes them", "Restore them from a copy, or delete the run."):
            _read_into(found, run)
    except LorakeetError as error:
        problem = str(error)
    texts = {name: shortened(visible(value)) for name, value in (*found.items(), ("problem", problem)) if isinstance(value, str)}
    return RunSummary(name=folder.name, **{**found, **texts}, passed=_passed(folder, run.certificate), tags=tags_of(folder))


def _read_into(found: dict[str, Any], run: RunFolder) -> None:
    """Adds what each file says to `found`, one file after the other. Any exception for a file that no run writes."""
    found["made"] = run.config.stat().st_mtime
    settings = read_yaml(run.config)
    found["model"] = str(_inner(settings, "model", "path"))
    found["rows"] = str(_inner(settings, "data", "train"))
    if regular_within(run.path, run.metrics):
        found |= _numbers(read_metrics(run.metrics))
    if regular_within(run.path, run.report):
        found |= _verdict(report_values(run.report))


def _numbers(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What a summary says of metrics."""
    held_out = [(int(one["step"]), float(one["held_out_loss"])) for one in records if one.get("held_out_loss") is not None]
    losses = [float(record["loss"]) for record in records if record.get("loss") is not None]
    return {
        "ended": "stopped" if records else "",
        "step": max((int(record["step"]) for record in records), default=0),
        "loss": losses[-1] if losses else None,
        "held_out": held_out[-1][1] if held_out else None,
        "best": min((value for _, value in held_out), default=None),
        "base": held_out[0][1] if held_out and not held_out[0][0] else None,
        "spark": _thinned(losses),
    }


def _verdict(report: dict[str, Any]) -> dict[str, Any]:
    """What a summary says of a report."""
    verdict = report.get("verdict") or {}
    found = {"ended": "done", "verdict": _sentence(verdict), "tone": str(verdict.get("tone", ""))}
    return {**found, "against": _against(report.get("comparisons") or ()) if found["tone"] == "mixed" else ""}


def _against(comparisons: Sequence[dict[str, Any]]) -> str:
    """How the comparisons in the metric of the first one disagree: "better than one, no difference from another shown"."""
    words = {"better": "better than {}", "worse": "worse than {}", "no difference shown": "no difference from {} shown"}
    verdicts = {one.get("verdict") for one in comparisons if one.get("metric") == comparisons[0].get("metric")}
    found = [words[verdict] for verdict in words if verdict in verdicts]
    if len(found) == 1:  # evaluate/verdict says which metric
        return found[0].format("all") + ", not in another metric"
    return ", ".join(text.format("one" if number == 0 else "another") for number, text in enumerate(found))


def tags_of(folder: Path) -> tuple[str, ...]:
    """The tags of a run."""
    tags = _object(folder, folder / TAGS).get("tags")
    return tuple(shortened(visible(str(tag)), _LONGEST_TAG) for tag in tags[:_MOST_TAGS]) if isinstance(tags, list) else ()


def write_tags(folder: Path, tags: tuple[str, ...]) -> None:
    """Keeps the tags of a run in its folder, where they outlive the index."""
    write_whole(folder / TAGS, json.dumps({"tags": list(tags)}).encode())


def _stamp(folder: Path) -> str:
    """Changes whenever a file that the summary is made of does."""
    parts = []
    for name in ("config.yaml", "metrics.jsonl", "report.json", "certificate.json", TAGS):
        try:
            about = (folder / name).stat()
            parts.append(f"{about.st_mtime_ns}:{about.st_size}")
        except OSError:
            parts.append("-")
    return " ".join(parts)


def _inner(mapping: dict[str, Any], section: str, name: str) -> Any:
    inner = mapping.get(section)
    return inner.get(name, "") if isinstance(inner, dict) else inner or ""


def _sentence(verdict: dict[str, Any]) -> str:
    """The headline of a report, as evaluate/verdict words it."""
    parts = (f"{part.get('text', '')} ({part.get('interval', '')})".removesuffix(" ()") for part in verdict.get("phrases", ()))
    return f"{''.join(parts)}." if verdict else ""


def _passed(folder: Path, path: Path) -> bool | None:
    passed = _object(folder, path).get("passed")
    return passed if isinstance(passed, bool) else None


def _object(folder: Path, path: Path) -> dict[str, Any]:
    """The object in a file of a run folder; empty where there is none."""
    try:
        return read_object(path, expected="an object") if regular_within(folder, path) else {}
    except DataError:
        return {}


def _thinned(values: list[float]) -> tuple[float, ...]:
    """At most so many means of neighbours."""
    each = max(1, -(-len(values) // _SPARK))
    parts = [values[start : start + each] for start in range(0, len(values), each)]
    return tuple(sum(part) / len(part) for part in parts)
