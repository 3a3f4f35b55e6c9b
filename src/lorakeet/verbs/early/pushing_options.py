"""The options of `lorakeet push` that can be checked without the hub. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from lorakeet.data.locate import PACKAGE, locate_model
from lorakeet.errors import ConfigError, DataError, LorakeetError, VerificationFailed
from lorakeet.formats.files.json_object import read_object
from lorakeet.train.run import RunFolder
from lorakeet.verbs.options import PushOptions

CERTIFICATE = "certificate.json"


def require_pushable(options: PushOptions) -> RunFolder:
    """The run that is to be pushed.

    Raises DataError where something is missing, VerificationFailed for a certificate that failed, and ConfigError for a base that
    only this machine can name.
    """
    run = RunFolder.at(Path(options.run))
    if run is None or not run.certificate.is_file():
        raise DataError(f"{options.run} is no finished run: it has no certificate. Give the folder that finetune wrote.")
    _require_passed(run.certificate, str(options.run))
    if options.merged is not None:
        if not (options.merged / "config.json").is_file():
            raise DataError(f"{options.merged} is no merged model. Write one with: lorakeet merge {options.run} --out FOLDER")
        _require_passed(certificate_of(options.merged), str(options.merged))
    if options.gguf is not None:
        if not options.gguf.is_file():
            raise DataError(f"{options.gguf} does not exist. Write it with: lorakeet export {options.run} --out {options.gguf}")
        _require_passed(certificate_of(options.gguf), str(options.gguf))
    base = named_base(run)
    if options.base is None and named_here(base) and not base.startswith(PACKAGE):
        raise ConfigError(f"The base is named {base}, found on this machine only. Give its id on the hub with --base.")
    return run


def named_base(run: RunFolder) -> str:
    """The name of the base in the adapter's file; empty if it has none."""
    found = read_object(run.adapter / "adapter_config.json", expected="an adapter of PEFT")
    return str(found.get("base_model_name_or_path") or "")


def beside(file: Path, name: str) -> Path:
    """Where an export to one file keeps its certificate."""
    return file.with_name(f"{file.stem}.{name}")


def certificate_of(artefact: Path) -> Path:
    """Where the certificate of a written model is: in its folder, or beside its file."""
    return artefact / CERTIFICATE if artefact.is_dir() else beside(artefact, CERTIFICATE)


def named_here(name: str) -> bool:
    """True for a base in a folder, file or package of this machine."""
    try:
        return locate_model(name) is not None
    except LorakeetError:
        return Path(name).is_absolute() or name.startswith(PACKAGE)


def _require_passed(path: Path, subject: str) -> None:
    """Raises VerificationFailed unless the certificate at `path` passed."""
    from lorakeet.evaluate.certificate import read_certificate  # numpy and scipy, which other verbs' checks do without

    if not path.is_file():
        raise VerificationFailed(f"{subject} has no certificate ({path} is missing), so it was not compared with its run.")
    read_certificate(path).raise_if_failed()
