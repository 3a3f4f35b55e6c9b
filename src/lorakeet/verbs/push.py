"""`lorakeet push`: a run's adapter, or its merged model, to a model hub, with model card, certificate and report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.disk import read_regular
from lorakeet.errors import DataError, one_message
from lorakeet.evaluate.certificate import read_certificate, with_digest
from lorakeet.evaluate.report.report import read_report, render_html
from lorakeet.exporting.hub import Uploaded, upload
from lorakeet.exporting.published_readme import published_readme
from lorakeet.formats.identity import require_certified
from lorakeet.runs.certified import require_certified_model, require_own_base
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.pushing_options import CERTIFICATE, certificate_of, named_base, named_here, require_pushable
from lorakeet.verbs.options import PushOptions

README, REPORT = "README.md", "report.html"
_TEXTS = (README, REPORT, "adapter_config.json")


@dataclass(frozen=True)
class Pushed:
    """What is on the hub now."""

    name: str
    uploaded: Uploaded

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"name": self.name, **asdict(self.uploaded)}


def push_run(options: PushOptions, *, console: Console) -> Pushed:
    """Sends the adapter of a run (or the merged folder, and a GGUF file) in one commit, and compares what the hub has then.

    Raises VerificationFailed for a run or artefact whose certificate failed, ConfigError for a base that only this machine can
    name, and EnvironmentProblem without a token or where the hub refuses or fails; the same command again goes on.
    """
    run = require_pushable(options)
    say = partial(console.print, markup=False, soft_wrap=True)
    require_certified(run.path, uncertified=options.uncertified, say=say)
    require_own_base(run.path, uncertified=options.uncertified, say=say)
    for artefact in filter(None, (options.merged, options.gguf)):
        certificate = read_certificate(certificate_of(artefact))
        require_certified_model(artefact, certificate, uncertified=options.uncertified, say=say)
    files = _files(options, run)
    if REPORT in files:
        say(f"{REPORT} shows rows of the data; --no-report leaves it out.")
    message = f"{run.path.absolute().name}, by Lorakeet"
    found = upload(files, options.name, private=options.private, message=message, say=say, bars=console.is_terminal)
    for path, size in found.files.items():
        say(f"  {path}  {size:,} bytes")
    if found.others:
        say(f"Also in the repository, unchanged: {', '.join(found.others[:20])}.")
    say(f"Compared with what was sent, by their hashes: {len(found.files)} files are the same. {found.url}")
    return Pushed(options.name, found)


def _files(options: PushOptions, run: RunFolder) -> dict[str, Path | bytes]:
    """What is sent, by its path in the repository."""
    source = _own(run.adapter) if options.merged is None else options.merged
    files: dict[str, Path | bytes] = {file.name: file for file in sorted(source.iterdir()) if _is_sent(file)}
    if options.merged is None:
        files[CERTIFICATE] = _own(run.certificate)
    if options.gguf is not None:
        files[options.gguf.name] = options.gguf
        certificate = _own(certificate_of(options.gguf))
        files[certificate.name] = certificate
    if run.page.is_file() and options.report:
        files[REPORT] = _own(run.page)
    return _renamed(files, options, named_base(run))


def _own(path: Path) -> Path:
    """The path. Raises DataError for a link: a run of someone else could name any file of this machine by one."""
    if path.is_symlink():
        raise DataError(f"{path} is a link, so what it names would be sent. Put a copy of that there if it is meant.")
    return path


def _is_sent(file: Path) -> bool:
    return file.is_file() and not file.is_symlink() and not file.name.startswith(".")


def _renamed(files: dict[str, Path | bytes], options: PushOptions, base: str) -> dict[str, Path | bytes]:
    """The same with the repository's name in the model card, and `--base` where texts name a base of this machine."""
    for name, file in list(files.items()):
        if not isinstance(file, Path) or not (name in _TEXTS or name.endswith(CERTIFICATE)):
            continue
        with one_message(f"{file} cannot be sent", "Write it again with finetune, merge or export."):
            text = render_html(read_report(RunFolder(file.parent).report)) if name == REPORT else read_regular(file).decode()
        if options.base and named_here(base):
            text = text.replace(base, options.base).replace(json.dumps(base)[1:-1], options.base)
        if name.endswith(CERTIFICATE):
            text = with_digest(text)
        if name == README:
            relation = "adapter" if options.merged is None else "finetune"
            text = published_readme(text, options.name, base=options.base or "", relation=relation)
        files[name] = text.encode()
    return files
