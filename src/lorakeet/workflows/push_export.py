"""An exported folder given to Ollama: written just now, or by an earlier command and known again by its certificate."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.export import ollama
from lorakeet.export.gguf_model import GgufModel
from lorakeet.export.ollama import push
from lorakeet.formats.files.gguf_file import GgufFile


def exported_before(
    folder: Path, certificate: Path, expected: Mapping[str, str], *, separate: bool
) -> tuple[GgufModel, Certificate]:
    """The export that `folder` holds with its certificate, whose facts are `expected`.

    ConfigError unless it is of this adapter and these settings and has all its files; VerificationFailed where its check failed.
    """
    found = read_certificate(certificate) if certificate.exists() else None
    files = [folder / ollama.MODEL, *([folder / ollama.ADAPTER] if separate else [])]
    missing = not all(file.is_file() for file in files)
    if found is None or missing or {key: found.facts.get(key) for key in expected} != expected:
        said = "; ".join(f"{key}: {value}" for key, value in expected.items())
        raise ConfigError(
            f"{folder} exists already and is never overwritten; --push sends a folder again only where it holds a checked export "
            f"of this adapter with these settings ({said}). Choose another --out or remove that one."
        )
    found.raise_if_failed()
    return GgufModel(files[0], files[0].stat().st_size, dict(GgufFile(files[0]).tensor_types), ()), found


def push_folder(folder: Path, model: ollama.OllamaModel, name: str, *, host: str, checked: bool, console: Console) -> None:
    """Gives the folder to Ollama as `name`; EnvironmentProblem says how to go on where that fails."""
    by_hand = f"cd {shlex.quote(str(folder))} && ollama create {shlex.quote(name)} -f {ollama.MODELFILE}"
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sending", total=None)

        def show(file: str, sent: int, total: int) -> None:
            bar.update(task, completed=sent, total=total, description=f"sending {file}")

        try:
            push(folder, model, name, host=host, say=console.print, on_progress=show)
        except EnvironmentProblem as error:
            again = "The same command sends it again without writing it anew; or by hand" if checked else "By hand"
            raise EnvironmentProblem(f"{error} {folder} is complete. {again}: {by_hand}") from error
