"""What an adapter on disk holds, by name and content, and whether that is what its certificate was made for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorakeet.disk import open_buffered, read_regular
from lorakeet.errors import DataError, Remedy, VerificationFailed, readable
from lorakeet.evaluate.certificate import CERTIFICATE, Certificate, read_certificate
from lorakeet.formats.files.digest import PIECE, sha256_of
from lorakeet.formats.files.json_object import parse_object
from lorakeet.formats.files.yaml_mapping import parse_yaml
from lorakeet.registry import SECTIONS

if TYPE_CHECKING:  # imports torch
    from lorakeet.formats.files.loaded_file import LoadedFile

CONFIG_NAME, MODEL_NAME = "adapter_config.json", "adapter_model.safetensors"  # of PEFT, whose reader needs torch
BASE = "base "  # begins the names that are about the base, which is compared where it is opened
WEIGHTS, QUANTISATION = f"{BASE}weights", f"{BASE}quantisation"
SETTING = "setting "  # begins the names that are about the run around an adapter, which a copy of the adapter alone lacks
NOT_TRAINED = "not trained here"
Say = Callable[[str], object]
# Keys of adapter_config.json that say where things are and who wrote them; all others may change what is computed.
_NOT_COMPUTED = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
# Settings of a run by which its prompts and answers are made; the others of `data` say which rows are read, and how.
_PROMPTS = (
    "format", "text_column", "label_column", "labels", "rename_labels", "template", "label_template", "system", "chat_template",
    "separator", "max_tokens", "too_long", "html_unescape", "strip_quotes",
)  # fmt: skip
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt")  # of older ones
_SHOWN = 8  # names in a refusal


class AdapterFiles(NamedTuple):
    """The files of a PEFT folder as they were read: what is compared is then what is used, even if they change meanwhile."""

    tensors: LoadedFile
    config: bytes


def identity_of(folder: Path, read: AdapterFiles | None = None) -> dict[str, str]:
    """By name: the SHA-256 of each tensor (dtype, shape, bytes) and tokenizer file of a PEFT folder, and each key of its config.

    Heads and token rows are tensors of the same file. Files that were read before are not read again. Of a folder in the layout
    of another kind of run: the SHA-256 of each file. DataError for a damaged file.
    """
    if read is None and folder.is_dir() and not (folder / CONFIG_NAME).exists() and not (folder / MODEL_NAME).exists():
        files = sorted(file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir())
        with readable(folder):
            found = {f"file {file.relative_to(folder).as_posix()}": _of_file(file) for file in files}
        return found | _settings_around(folder, sections=True)
    with readable(folder / CONFIG_NAME):
        raw = read_regular(folder / CONFIG_NAME) if read is None else read.config
    config = parse_object(raw, folder / CONFIG_NAME, expected="the settings of an adapter")
    found = dict(_tensors(folder / MODEL_NAME) if read is None else read.tensors.tensor_digests)
    found |= {f"config {key}": _canonical(value) for key, value in sorted(config.items()) if key not in _NOT_COMPUTED}
    return found | _settings_around(folder) | tokenizer_identity(folder)


def _of_file(file: Path) -> str:
    """The SHA-256 of a file; of a link what it names, which is not followed."""
    return f"a link to {os.readlink(file)}" if file.is_symlink() else sha256_of(file)


def _settings_around(folder: Path, *, sections: bool = False) -> dict[str, str]:
    """The settings of the run around an adapter by which it is used: of `data`, and of the `sections` that kinds bring."""
    run = folder.absolute().parent / "config.yaml"
    if folder.absolute().name != "adapter" or not run.is_file():
        return {}
    with readable(run):
        settings = parse_yaml(read_regular(run).decode(), run)
    parts = {name: part for name, part in settings.items() if isinstance(part, dict)} if isinstance(settings, dict) else {}
    data = parts.get("data", {})
    found = {f"{SETTING}data.{key}": _canonical(data[key]) for key in _PROMPTS if key in data}
    own = [(name, part) for name, part in parts.items() if sections and name not in SECTIONS]
    return found | {f"{SETTING}{name}.{key}": _canonical(value) for name, part in own for key, value in part.items()}


def tokenizer_identity(folder: Path, *, base: bool = False) -> dict[str, str]:
    """By name the SHA-256 of each tokenizer file in `folder`; of a base without those that its tokenizer.json replaces."""
    names = _TOKENIZER if base and (folder / _TOKENIZER[0]).is_file() else (*_TOKENIZER, *_SLOW)
    with readable(folder):
        files = [*(folder / name for name in names), *sorted(folder.glob("additional_chat_templates/*.jinja"))]
        found = {f"tokenizer {file.relative_to(folder).as_posix()}": sha256_of(file) for file in files if file.is_file()}
    return {f"{BASE}{name}": digest for name, digest in found.items()} if base else found


def _tensors(path: Path) -> dict[str, str]:
    """The SHA-256 of every tensor of a safetensors file, read without torch, which `push` and `check` do without."""
    found = {}
    with readable(path), open_buffered(path) as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > size:
                raise ValueError("it ends within its header")
            for name, entry in sorted(json.loads(file.read(length)).items()):
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= size - 8 - length:
                    raise ValueError(f"{name} is not in it")
                digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
                file.seek(8 + length + begin)
                for place in range(begin, end, PIECE):
                    digest.update(file.read(min(PIECE, end - place)))
                found[f"tensor {name}"] = digest.hexdigest()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"{path} is damaged ({type(error).__name__}: {error})."
            raise DataError(f"{said} It may have been cut off; fetch it again.") from error
    return found


def _canonical(value: object) -> str:
    """JSON of a value, the same for lists of names in another order."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = sorted(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def content_differences(certified: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names whose content differs, each with how; settings with both values."""
    said = []
    for name in sorted({*certified, *found}):
        before, now = certified.get(name), found.get(name)
        if before == now:
            continue
        how = "is new" if before is None else "is missing" if now is None else "has changed"
        shown = not name.startswith("tensor ") and before is not None and now is not None and len(before + now) < 120
        said.append(f"{name} {how} ({before} certified, {now} found)" if shown else f"{name} {how}")
    return said


def find_certificate(path: Path) -> Path | None:
    """The certificate of the adapter at `path`: beside its files, or in the run folder around an adapter/."""
    return next((place for place in _places(path) if place.is_file()), None)


def _places(path: Path) -> list[Path]:
    """Where the certificate of the adapter at `path` would be."""
    if path.is_file() and path.name not in (MODEL_NAME, CONFIG_NAME):
        return []  # a file of another format: no certificate is about it alone
    folder = path if path.is_dir() else path.parent
    inside = not (folder / "adapter" / MODEL_NAME).is_file()
    found = [folder / CERTIFICATE]
    for place in (folder.absolute(), folder.resolve()):  # of a link both where it stands and what it names
        found += [place / CERTIFICATE, *([place.parent / CERTIFICATE] if inside and place.name == "adapter" else [])]
    return list(dict.fromkeys(found))


def require_certified(
    path: Path, *, read: AdapterFiles | None = None, uncertified: bool = False, say: Say = lambda _: None
) -> str:
    """Compares the adapter at `path` with its certificate: empty if it is the same, or a note for results, which `say` hears.

    VerificationFailed names what differs, unless `uncertified`; DataError for a certificate that was edited.
    """
    place = find_certificate(path)
    if place is None:
        if run := next((one.parent for one in _places(path) if _is_run(one.parent)), None):
            lost = [f"its certificate is missing (of a run that has not ended, too: lorakeet finetune --resume {run})"]
            return accept_content(str(path), lost, uncertified=uncertified, say=say)
        say(f"{path} is {NOT_TRAINED}: no certificate says what it holds.")
        return NOT_TRAINED
    if not (certified := read_certificate(place).identity):
        note = "certified before adapters were identified, so that its content was not compared"
        say(f"{path} was {note}.")
        return note
    folder = path if path.is_dir() else path.parent
    folder = folder if (folder / MODEL_NAME).is_file() or not (folder / "adapter").is_dir() else folder / "adapter"
    return accept_content(str(path), _apart(certified, identity_of(folder, read)), uncertified=uncertified, say=say)


def _apart(certified: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The differences of an adapter. Settings are compared where both sides are runs: older certificates have none."""
    both = all(any(name.startswith(SETTING) for name in side) for side in (certified, found))
    left_out = (BASE,) if both else (BASE, SETTING)
    one, other = ({name: value for name, value in side.items() if not name.startswith(left_out)} for side in (certified, found))
    return content_differences(one, other)


def _is_run(folder: Path) -> bool:
    """Whether a folder is laid out as a run that has an adapter; its certificate is written when it ends."""
    return (folder / "config.yaml").is_file() and (folder / "adapter").is_dir()


def require_base(
    path: Path, base: Callable[[], Mapping[str, str]], *, quantised: bool = False, uncertified: bool = False,
    say: Say = lambda _: None,
) -> str:  # fmt: skip
    """Compares what the available `base` holds with what the certificate of the adapter at `path` says, as `require_certified`.

    A base of nothing is not on this machine, which is said. With `quantised` the same base quantised otherwise is accepted with
    a note: that was requested.
    """
    place = find_certificate(path)
    certified = {} if place is None else read_certificate(place).identity
    certified = {name: value for name, value in certified.items() if name.startswith(BASE)}
    tokenizer = any(name not in (WEIGHTS, QUANTISATION) for name in certified)  # older certificates have none
    if not certified:
        return ""
    if not (found := base()):
        note = "base not compared: it is not on this machine"
        say(f"{path}: {note}.")
        return note
    found = {name: value for name, value in found.items() if tokenizer or name in (WEIGHTS, QUANTISATION)}
    apart = content_differences(certified, found)
    requested = quantised and {**certified, QUANTISATION: ""} == {**found, QUANTISATION: ""}
    return accept_content(str(path), apart, uncertified=uncertified or requested, say=say)


def is_certified(folder: Path, certificate: Path) -> bool:
    """Whether the adapter in `folder` is the one that `certificate` was made for; False for one that cannot be read."""
    try:
        return not _apart(read_certificate(certificate).identity, identity_of(folder))
    except DataError:
        return False


class Uncertified(str):
    """A note on content that is used though it is not what its certificate was made for."""


def joined_notes(*notes: str) -> str:
    """The notes as one, which is Uncertified where one of them is."""
    said = "; ".join(filter(None, notes))
    return Uncertified(said) if any(isinstance(note, Uncertified) for note in notes) else said


def accept_content(subject: str, apart: list[str], *, uncertified: bool, say: Say = lambda _: None) -> str:
    """Empty if nothing is `apart`, a note of it if `uncertified`; else VerificationFailed."""
    if not apart:
        return ""
    names = "; ".join(apart[:_SHOWN]) + (f"; and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else "")
    if not uncertified:
        raise VerificationFailed(
            f"{subject} is not what its certificate was made for: {names}. Put back what was there, or go on with --uncertified; "
            "results then say so.",
            code="content-differs-from-certificate",
            values={"subject": subject, "differs": apart},
            remedies=[Remedy("uncertified", "true", "Go on with it; results say so")],
        )
    note = Uncertified(f"uncertified: {names}")
    say(f"{subject} is used {note}")
    return note


def with_note(certificate: Certificate, *notes: str) -> Certificate:
    """The certificate with the notes on the adapters that it was made from among its facts."""
    said = "; ".join(dict.fromkeys(note for note in notes if note))
    return replace(certificate, facts={**certificate.facts, "adapter": said}) if said else certificate
