"""Samples of a run at several strengths of its adapter: the verb of its kind that draws them as a job, with one seed for all."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from lorakeet.config import read_run
from lorakeet.disk import open_regular
from lorakeet.errors import ConfigError, DataError
from lorakeet.registry import AddedVerb, declarations, function_at
from lorakeet.studio.deleted import jobs_of_run
from lorakeet.studio.jobs import Job, Queue
from lorakeet.studio.places import NotHere, Places

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_NAME = "it"  # of the adapter, in the command


@dataclass(frozen=True)
class DrawnSample:
    """One sample, by the strength of the adapter; 0 is the base."""

    file: str
    strength: float


def sampling_verb(run: Path) -> AddedVerb:
    """The verb that draws samples with a run. NotHere for a run of a kind without one."""
    verb = next((one for one in read_run(run / "config.yaml").declaration.verbs if one.record), None)
    if verb is None:
        raise NotHere(f"No samples are drawn with {run.name}.")
    return verb


def draw_strengths(places: Places, queue: Queue, run: str, *, prompt: str, seed: str, steps: str, once: str = "") -> Job:
    """Puts the command that draws `prompt` at each of STRENGTHS into the queue. ConfigError for what it would refuse."""
    folder = places.run(run)
    if not (folder / "adapter").is_dir():
        raise ConfigError(f"'{run}' has no adapter yet. Wait until it has trained, or resume it.")
    prompt = " ".join(prompt.split())
    if not prompt:
        raise ConfigError("The prompt is empty. Describe what is drawn, as the captions of your rows do.")
    verb, out = sampling_verb(folder), places.own / "drawn" / f"{run}-{secrets.token_hex(4)}"
    mixes = [f"{_NAME}={strength:g}" if strength else "base" for strength in STRENGTHS]
    try:
        numbers = int(seed or 0), int(steps or verb.options.steps)
    except ValueError:
        raise ConfigError(f"seed is {seed!r:.40} and steps {steps!r:.40}; expected whole numbers.") from None
    adapter, prompts = f"{_NAME}={folder}", (prompt,) * len(STRENGTHS)
    options = verb.options(prompts, out, adapter=(adapter,), each=tuple(mixes), seed=numbers[0], steps=numbers[1])
    function_at(verb.checks)(options)
    words = [verb.name, "--adapter", adapter, "--out", str(out), "--seed", str(numbers[0]), "--steps", str(numbers[1])]
    for mix in mixes:
        words += ["--prompt", prompt, "--each", mix]
    return queue.add(words, title=f"Draw with {run}", device=read_run(folder / "config.yaml").model.device, once=once)


def drawing_jobs(places: Places, queue: Queue, run: str) -> list[Job]:
    """The jobs that draw with a run, the newest first."""
    return [job for job in jobs_of_run(places, queue, run) if job.title == f"Draw with {run}"]


def samples_of(job: Job) -> list[DrawnSample]:
    """The samples of a job, by strength; none before it is done."""
    try:
        with open_regular(_folder(job) / _record_of(job)) as file:
            listed = json.loads(file.readall())
        found = [DrawnSample(str(one["file"]), float(one["mix"].get(_NAME, 0.0))) for one in listed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    return sorted(found, key=lambda one: one.strength)


def sample_bytes(job: Job, file: str) -> bytes:
    """One PNG of a job. NotHere for a name that is not listed."""
    if file not in [one.file for one in samples_of(job)] or "/" in file:
        raise NotHere(f"There is no sample {file:.100}.")
    try:
        with open_regular(_folder(job) / file) as found:
            return found.readall()
    except OSError as error:
        raise DataError(f"The sample {file:.100} cannot be read: {error}.") from error


def _record_of(job: Job) -> str:
    """The file that lists the samples of a job's verb."""
    verbs = {one.name: one for kind in declarations().values() for one in kind.verbs}
    return verbs[job.words[0]].record


def _folder(job: Job) -> Path:
    return Path(job.words[job.words.index("--out") + 1])
