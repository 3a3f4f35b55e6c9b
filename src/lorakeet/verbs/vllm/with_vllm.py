"""`lorakeet serve --engine vllm`: adapters as vLLM reads them, its command, and the server itself where vLLM is installed.

checked ──► copied where vLLM would misread ──► vLLM started ──► each adapter verified against its base here ──► served
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from lorakeet.data.locate import locate_model
from lorakeet.errors import ConfigError, EnvironmentProblem, LorakeetError, Problems
from lorakeet.formats.detect import detect, read_certified
from lorakeet.formats.identity import require_base
from lorakeet.formats.limits import check_vllm, misread_by_vllm, uniform, vllm_max_rank
from lorakeet.formats.peft import peft
from lorakeet.kinds.terminal import conclude
from lorakeet.models.files.source import find_source
from lorakeet.models.spec import ModelSpec
from lorakeet.runs.certified import base_identity
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.runs.output_paths import writing
from lorakeet.serve.listening import LOOPBACK, require_free_port
from lorakeet.train.durable import new_folder
from lorakeet.train.interrupt import terminable
from lorakeet.verbs.early.serving_options import vllm_flags
from lorakeet.verbs.options import ServeOptions
from lorakeet.verbs.vllm.vllm_process import INSTALL, KEY, base_url, running_vllm, vllm_python
from lorakeet.verification.certify import HowCompared, certify_artefacts

CHECK_ROWS = 4


@dataclass(frozen=True)
class VllmCommand:
    """The words of `vllm serve`, and by name the adapter folders that it reads."""

    words: tuple[str, ...]
    adapters: Mapping[str, Path]

    def __str__(self) -> str:
        return shlex.join(self.words)


def vllm_command(options: ServeOptions, adapters: Mapping[str, Path], console: Console) -> VllmCommand:
    """vLLM's command for these adapters; what vLLM would misread is copied to `options.out`. ConfigError for what it refuses."""
    out, flags = options.out, vllm_flags(options)
    problems = Problems("vLLM cannot serve these adapters")
    ready: dict[str, Path] = {}
    ranks = []
    base = partial(base_identity, ModelSpec(path=options.model))
    for name, path in adapters.items():
        found, (adapter, _) = detect(path), read_certified(path, uncertified=options.uncertified, say=console.print)
        require_base(path, base, quantised=True, uncertified=options.uncertified, say=console.print)
        try:
            check_vllm(adapter)
        except ConfigError as error:
            problems.add(f"'{name}': {error}")
            continue
        ranks.append(vllm_max_rank(adapter))
        if found.format == "peft" and not misread_by_vllm(adapter):
            ready[name] = found.path
        elif out is None:
            why = "vLLM would compute wrong scales" if found.format == "peft" else f"it is stored as {found.format}"
            problems.add(f"'{name}': {why}. Give --out FOLDER for an exact copy that vLLM reads correctly.")
        else:
            ready[name] = out / name
            with writing(str(out), "Free some space, or choose another --out."), new_folder(ready[name]) as made:
                peft.write(uniform(adapter), made)
            console.print(f"'{name}': written to {ready[name]} with its scale in B and one rank", soft_wrap=True)
    problems.raise_if_any()
    limits = {"--max-lora-rank": max(ranks), "--max-loras": min(len(ready), 8), "--max-cpu-loras": len(ready)}
    model, named = _readable(options.model, console)
    words = ["vllm", "serve", model, "--enable-lora"]
    words += [word for flag, number in limits.items() for word in (flag, str(number))]
    words += [*flags, *named, "--lora-modules", *(f"{name}={path.resolve()}" for name, path in ready.items())]
    return VllmCommand(tuple(words), ready)


def _readable(model: str, console: Console) -> tuple[str, list[str]]:
    """The model as vLLM loads it: the dense copy of a .gguf file or package, under the name that it has here."""
    try:
        path = locate_model(model)
    except LorakeetError:  # it may be on another machine, where the command is run
        return model, []
    if path is None or path.is_dir():
        return model, []
    return str(find_source(ModelSpec(path=model), console.print)), ["--served-model-name", Path(model.rpartition(":")[2]).name]


def serve_with_vllm(options: ServeOptions, adapters: Mapping[str, Path], console: Console) -> VllmCommand:
    """Starts vLLM, verifies each adapter there, says so, and serves until SIGINT or SIGTERM. Returns its command.

    Machines beyond this one are only listened to with vLLM's key, and can then load no adapters.

    Without vLLM, and with `options.command_only`, the command is printed instead. EnvironmentProblem if vLLM does not start or
    ends by itself; VerificationFailed (exit code 3) if an adapter is not what vLLM computes: nothing is served then.
    """
    command = vllm_command(options, adapters, console)
    python = None if options.command_only else vllm_python()
    if python is None:
        console.print(str(command), soft_wrap=True, markup=False)
        if not options.command_only:
            console.print(f"vLLM is not installed here, so it was not started: {INSTALL}.", soft_wrap=True, markup=False)
        return command
    key, private = os.environ.get(KEY, ""), options.host in LOOPBACK
    if not (private or key):
        raise ConfigError(
            f"--host {options.host} opens vLLM to other machines. Set {KEY}, which vLLM then requires of clients, or "
            "leave --host out."
        )
    require_free_port(options.host, options.port)  # another server there would seem to be this one
    if not options.port:
        raise ConfigError("--port 0 cannot be used with --engine vllm; name a free port.")
    url = base_url(options.host, options.port)
    console.print(f"Starting {command}", soft_wrap=True, markup=False)
    loading = None if private else False
    with terminable(), running_vllm(python, command.words, url, loading=loading) as process:
        for name, path in adapters.items():
            _verify(path, f"{url}#{name}", options.model, key, console)
        many = f"{len(adapters)} adapter{'' if len(adapters) == 1 else 's'}"
        with suppress(KeyboardInterrupt):
            said = f"vLLM serves {many} at {url}/v1, each compared with the live adapter."
            console.print(said, soft_wrap=True, markup=False)
            _until_it_ends(process)
    return command


def _verify(path: Path, target: str, model: str, key: str, console: Console) -> None:
    """VerificationFailed where the served adapter is not the live one."""
    opened = open_adapter(path, base=model, uncertified=True, say=lambda _: None)  # compared before the server began
    found = certify_artefacts(opened, [target], HowCompared(CHECK_ROWS, minutes=0.0, key=key), console, of=str(path))
    conclude(found, console)


def _until_it_ends(process: subprocess.Popen[bytes]) -> None:
    code = process.wait()
    raise EnvironmentProblem(f"vLLM ended with exit code {code}; what it said stands above.")
