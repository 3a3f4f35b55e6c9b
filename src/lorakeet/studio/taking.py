"""Ways to take a trained adapter away: their commands, where the result goes, what is missing, and what became of it.

Light: no tensor library. Sizes and times come from sizing.py, by the workbench.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from lorakeet.config import read_run
from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.studio.deleted import jobs_of_run
from lorakeet.studio.jobs import Job, Queue, last_line
from lorakeet.studio.places import NotHere, Places
from lorakeet.studio.remedies import page_words
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.checks import check_early
from lorakeet.verbs.early.pushing_options import certificate_of
from lorakeet.verbs.options import ConvertOptions, ExportOptions, MergeOptions, PushOptions, Quant

QUANTS = get_args(Quant)
WRITTEN_HERE = ("f32", "f16", "bf16", "q8_0")  # without llama.cpp
LLAMA_CPP = "llama_cpp_py_sync"
HUB = "huggingface_hub"
VERBS = ("merge", "export", "convert", "push", "predict")
UNCERTIFIED = "--uncertified"  # the flag that a refusal names
MANY = 20  # jobs that are shown with what they printed


@dataclass(frozen=True)
class WayOut:
    """One way to take a run away."""

    key: str
    title: str
    what: str  # it is for, in a sentence
    ending: str  # of the result's name
    quant: bool = False


WAYS = {
    way.key: way
    for way in (
        WayOut("merge", "One whole model", "A folder that programmers load as any other model (transformers, vLLM).", "-merged"),
        WayOut("gguf", "One GGUF file", "For LM Studio, Jan, llama.cpp. If you know none, you need none.", ".gguf", quant=True),
        WayOut("ollama", "For Ollama", "A folder with a GGUF file and its Modelfile.", "-ollama", quant=True),
        WayOut("mlx", "Adapter for MLX", "For mlx-lm on a Mac, beside its base model.", "-mlx"),
        WayOut("kohya", "For ComfyUI and A1111", "One .safetensors file in kohya's layout.", ".safetensors"),
        WayOut("diffusers", "For diffusers", "One .safetensors file in diffusers' layout.", "-diffusers.safetensors"),
        WayOut("push", "Share on a model hub", "Adapter, model card, report and certificate.", ""),
    )
}


@dataclass(frozen=True)
class Wanted:
    """One command that is to be carried out: its words, its options, and what it writes."""

    way: WayOut
    words: tuple[str, ...]
    options: Any
    out: Path | None

    @property
    def verb(self) -> str:
        return self.words[0]


def wanted(places: Places, run: str, key: str, form: Mapping[str, str]) -> Wanted:
    """The command of a filled-in form. ConfigError for a name or type that cannot be; NotHere for an unknown run or way."""
    folder = places.run(run)
    if key not in WAYS:
        raise NotHere(f"There is no way {key!r:.40} to take a run away.")
    way, given = WAYS[key], form.get("name", "").strip()
    if key == "push":
        private = form.get("private", "") == "true"
        words = ("push", str(folder), given, *(["--private"] if private else []))
        return Wanted(way, words, PushOptions(str(folder), given, private=private), None)
    quant = form.get("quant") or "q8_0"
    if quant not in QUANTS:
        raise ConfigError(f"quant is {quant!r:.40}; expected one of {', '.join(QUANTS)}.")
    name = given or default_name(run, way, quant)
    out = places.new_run(name)
    if out == folder:
        raise ConfigError(f"'{name}' is the run itself. Choose another name.")
    if key == "merge":
        return Wanted(way, ("merge", str(folder), "--out", str(out)), MergeOptions((str(folder),), out), out)
    if way.quant:
        to = ["--to", "ollama"] if key == "ollama" else []
        words = ("export", str(folder), *to, "--quant", quant, "--out", str(out))
        target: Any = "ollama" if to else "gguf"
        return Wanted(way, words, ExportOptions(str(folder), out, to=target, quant=quant), out)  # type: ignore[arg-type]
    return Wanted(way, ("convert", str(folder), str(out), "--to", key), ConvertOptions(folder, out, key), out)  # type: ignore[arg-type]


def default_name(run: str, way: WayOut, quant: str) -> str:
    """A name that says what it is: the run's, the type of a GGUF, and the ending."""
    return f"{run}-{quant}{way.ending}" if way.key == "gguf" else f"{run}{way.ending}"


def why_not(found: Wanted) -> str:
    """What is missing before the command can be carried out, in its own words; empty if nothing is."""
    quant = getattr(found.options, "quant", "f16")
    if quant not in WRITTEN_HERE and find_spec(LLAMA_CPP) is None:
        return f"{quant} needs llama.cpp's quantiser: pip install 'lorakeet[llama]', or take {', '.join(WRITTEN_HERE)}."
    if found.verb == "push" and find_spec(HUB) is None:
        return "Sharing needs huggingface_hub: pip install 'lorakeet[hub]'."
    if found.verb == "push" and not found.options.name:
        return "Give the repository as OWNER/NAME. Once, before: hf auth login."
    if found.out is not None and found.out.exists():
        return f"{found.out.name} exists already and is never overwritten. Give another name."
    try:
        check_early(found.verb, found.options, None)
    except LorakeetError as error:
        return page_words(str(error))
    return ""


def ways_of(places: Places, run: str) -> list[WayOut]:
    """The ways that go with the kind of a run. Raises NotHere for one without an adapter."""
    folder = RunFolder(places.run(run))
    if not folder.adapter.is_dir():
        raise NotHere(f"'{run}' has no adapter yet. Wait until it has trained, or resume it.")
    taken_as = read_run(folder.config).declaration.taken_as
    return [way for way in WAYS.values() if way.key in taken_as]


def jobs_of(places: Places, queue: Queue, run: str) -> list[Job]:
    """The commands of the queue that took this run away, the newest first: MANY, and all that hold a file of the user's."""
    folder = str(places.runs / run)
    found = [job for job in jobs_of_run(places, queue, run) if job.words[:1] and job.words[0] in VERBS and folder in job.words]
    return [job for number, job in enumerate(found) if number < MANY or job.kept is not None]


def job_values(job: Job) -> dict[str, Any]:
    """What the page shows of one command: its state, what it said, and, when it is done, what was written and its checks."""
    out = job.out
    state = job.state
    return {
        "name": job.name,
        "title": job.title,
        "state": state,
        "command": list(job.words),
        "error": page_words(job.error) if state not in ("done", "running", "waiting") else "",
        "last": page_words(last_line(job.log)) if state == "running" else "",
        "log": job.log,
        "out": "" if out is None else str(out),
        "bytes": 0 if out is None else bytes_of(out),
        "certificate": None if out is None else certificate_values(out),
        "use": use_of(job, out) if state == "done" else [],
        "advice": advice_of(job),
        "uncertified": is_uncertified(job),
    }


def go_on_uncertified(places: Places, queue: Queue, run: str, name: str, once: str = "") -> Job:
    """Puts a command into the queue again that was refused because of another content; results then say so. NotHere if none."""
    refused = next((job for job in jobs_of(places, queue, run) if job.name == name and is_uncertified(job)), None)
    if refused is None:
        raise NotHere("There is no such command that was refused. Start it again.")
    return add_uncertified(queue, refused, once)


def is_uncertified(job: Job) -> bool:
    """Whether a command was refused because of another content than that of a certificate."""
    problem = job.problem if job.state in ("failed", "killed") and UNCERTIFIED not in job.words else None
    return problem is not None and problem.code == "content-differs-from-certificate"


def add_uncertified(queue: Queue, refused: Job, once: str = "") -> Job:
    """Puts a refused command into the queue once more, with the flag that its refusal names."""
    folder = f"{refused.folder}/"
    words = [f"{{folder}}/{word.removeprefix(folder)}" if word.startswith(folder) else word for word in refused.words]
    return queue.add([*words, UNCERTIFIED], title=refused.title, device=refused.device, once=once)


def advice_of(job: Job) -> str:
    """What to do about a result that did not pass its comparison."""
    words = job.words
    quant = words[words.index("--quant") + 1] if "--quant" in words[:-1] else ""
    if quant and quant not in ("f32", "f16", "bf16"):
        return f"Its precision {quant} rounds the weights. Take f16 or bf16, which are larger and nearer to what was trained."
    return "Its checks below say what differs."


def use_of(job: Job, out: Path | None) -> list[tuple[str, str]]:
    """Commands to go on with: what it is used by, and how it is verified again."""
    run = job.words[1]
    if out is None:
        return []
    verify = (shlex.join(["lorakeet", "verify", run, "--against", str(out)]), "Verify it again at any time")
    if job.words[0] == "merge":
        return [(shlex.join(["lorakeet", "chat", str(out)]), "Talk to it"), verify]
    if job.words[0] == "export" and "ollama" in job.words:
        name = shlex.quote(Path(run).name)
        create = f"cd {shlex.quote(str(out))} && ollama create {name} -f Modelfile && ollama run {name}"
        return [(create, "Run it in Ollama"), verify]
    return [(shlex.join(["llama-server", "-m", str(out)]), "Serve it with llama.cpp"), verify] if job.words[0] == "export" else []


def certificate_values(out: Path) -> dict[str, Any] | None:
    """The certificate that lies in or beside a result: its verdict, and each check; None without one."""
    try:
        found = read_certificate(certificate_of(out))
    except LorakeetError:
        return None
    return {
        "passed": found.passed,
        "verdict": found.verdict,
        "checks": [{"name": check.name, "passed": check.passed, "words": str(check)} for check in found.checks],
        "unchecked": [str(missing) for missing in (*found.modules, *found.unchecked)],
    }


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder; 0 while there is none."""
    try:
        if path.is_file():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return 0


def stamp_of(jobs: list[Job]) -> str:
    """Changes whenever a page of these commands would."""
    return json.dumps([[job.name, job.state, *(bytes_of(job.folder / name) for name in ("log", "result"))] for job in jobs])
