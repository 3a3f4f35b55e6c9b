"""What a certificate says of an adapter and its base, and whether that base is the one at hand. Imports no torch by itself."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from lorakeet.config import read_run
from lorakeet.data.locate import locate_model
from lorakeet.errors import LorakeetError
from lorakeet.evaluate.certificate import Certificate
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.identity import CONFIG_NAME, QUANTISATION, WEIGHTS, Say, identity_of, require_base
from lorakeet.models.files.fingerprint import content_of
from lorakeet.models.spec import ModelSpec
from lorakeet.train.run import RunFolder


def base_identity(model: ModelSpec) -> dict[str, str]:
    """What the base `model` holds and how it is quantised, by content; empty if it is not on this machine.

    Of weights above 256 MiB pieces of every tensor are read (models/files/fingerprint).
    """
    place = _place_of(model)
    if place is None or not (_is_weights(place) or any(map(_is_weights, (*place.glob("*"), *place.glob("*/*"))))):
        return {}
    return {WEIGHTS: content_of(place), QUANTISATION: model.quantize.method}


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


def require_own_base(path: Path, base: Path | None = None, *, uncertified: bool, say: Say) -> str:
    """`require_base` of `base`, or of the one that the run or adapter at `path` names: for verbs that load no model."""
    run, config = RunFolder.around(path), path / CONFIG_NAME
    if base is not None:
        model = ModelSpec(path=str(base))
    elif run is not None:
        model = read_run(run.config).model
    else:
        told = read_object(config, expected="the settings of an adapter") if config.is_file() else {}
        model = ModelSpec(path=str(told.get("base_model_name_or_path") or ""))
    otherwise = run is None or base is not None  # nothing says how that one was quantised
    return require_base(path, partial(base_identity, model), quantised=otherwise, uncertified=uncertified, say=say)
