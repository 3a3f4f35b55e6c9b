"""What a certificate says of an adapter and its base, and whether that base is the available one. Imports no torch by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lorakeet.config import read_run
from lorakeet.data.locate import locate_model
from lorakeet.disk import written_whole
from lorakeet.errors import LorakeetError
from lorakeet.evaluate.certificate import Certificate
from lorakeet.exporting.ollama import MODELFILE
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.identity import (
    CONFIG_NAME,
    QUANTISATION,
    WEIGHTS,
    Say,
    accept_content,
    content_differences,
    identity_of,
    require_base,
    tokenizer_identity,
)
from lorakeet.models.files.fingerprint import content_of
from lorakeet.models.spec import ModelSpec
from lorakeet.runs.output_paths import writing
from lorakeet.train.run import RunFolder


def base_identity(model: ModelSpec) -> dict[str, str]:
    """What the base `model` holds and how it is quantised, by content; empty if it is not on this machine.

    Of weights above 256 MiB pieces of every tensor are read (models/files/fingerprint).
    """
    place = _place_of(model)
    if place is None or not (_is_weights(place) or any(map(_is_weights, (*place.glob("*"), *place.glob("*/*"))))):
        return {}
    found = {WEIGHTS: content_of(place), QUANTISATION: model.quantize.method}
    return found | (tokenizer_identity(place, base=True) if place.is_dir() else {})


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", ".gguf") and path.is_file()


def _place_of(model: ModelSpec) -> Path | None:
    try:
        if (place := locate_model(model.path)) is not None:
            return place
    except LorakeetError:
        return None
    from lorakeet.models.files.source import on_this_machine  # the hub's cache, by way of transformers, which takes seconds

    return on_this_machine(model)


def identified(certificate: Certificate, folder: Path, base: ModelSpec | None) -> Certificate:
    """The certificate with what the adapter in `folder` and the base that it was trained on hold."""
    found = identity_of(folder) | ({} if base is None else base_identity(base))
    return dataclasses.replace(certificate, identity=found)


def of_model(certificate: Certificate, model: Path) -> Certificate:
    """The certificate with what the merged model in a folder, or in a file, holds."""
    return dataclasses.replace(certificate, identity=model_identity(model))


def model_identity(model: Path) -> dict[str, str]:
    """What a written model holds: its weights with config.json, as of a base, and its tokenizer; or the files for Ollama."""
    if (model / MODELFILE).is_file():
        files = sorted(file for file in model.iterdir() if file.suffix == ".gguf" or file.name == MODELFILE)
        return {f"model {file.name}": content_of(file) for file in files}
    return {"model weights": content_of(model)} | (tokenizer_identity(model) if model.is_dir() else {})


def require_certified_model(model: Path, certificate: Certificate, *, uncertified: bool, say: Say) -> None:
    """Raises VerificationFailed where a written model is not what its certificate was made for, unless `uncertified`."""
    apart = content_differences(certificate.identity, model_identity(model)) if certificate.identity else []
    accept_content(str(model), apart, uncertified=uncertified, say=say)


@contextmanager
def certified_whole(out: Path, what: str) -> Iterator[Path]:
    """Yields where to make `out`, which appears by one rename when the block ends: with its certificate, or not at all."""
    with writing(f"{what} {out}", "Free some space, or choose another --out."), written_whole(out) as made:
        yield made


def require_own_base(path: Path, base: Path | None = None, *, uncertified: bool, say: Say) -> str:
    """`require_base` of `base`, or of the one that the run or adapter at `path` names: for verbs that load no model."""
    run, config = RunFolder.around(path), path / CONFIG_NAME
    if base is not None:
        model = ModelSpec(path=str(base))
    elif run is not None:
        model = read_run(run.config).model
    else:
        settings = read_object(config, expected="the settings of an adapter") if config.is_file() else {}
        model = ModelSpec(path=str(settings.get("base_model_name_or_path") or ""))
    otherwise = run is None or base is not None  # nothing says how that one was quantised
    return require_base(path, partial(base_identity, model), quantised=otherwise, uncertified=uncertified, say=say)
