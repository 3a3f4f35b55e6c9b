"""The one place where transformers and diffusers read a folder: code that it brings never runs, and no prompt offers to.

A folder may name code of its own: `auto_map` in its JSON files, a Python file beside a part of a pipeline, a kernel of the hub as
its attention. If the installed packages have a class for what it describes, that class reads it; otherwise it is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, dynamic_module_utils
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from lorakeet.disk import read_regular
from lorakeet.errors import DataError, EnvironmentProblem, one_message, require_regular, shortened
from lorakeet.formats.files.json_object import read_object

# The files that may name code, in the order in which a refusal names them.
_NAMING = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "config.json", "adapter_config.json")
_LIBRARIES = ("diffusers", "transformers")
_SAFETY = "stable_diffusion"  # diffusers' own folder of the checker of its first pipelines
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # in this process transformers refuses and does not ask
# From 5.25 on, transformers fetches kernels of the hub for every model that it loads, and calls them in place of its own layers.
NO_HUB_KERNELS = {"use_kernels": False}
_CHOICES = ("_attn_implementation_internal", "_experts_implementation_internal")


def read_native(owner: Any, source: str | Path, **settings: Any) -> Any:
    """Returns `owner.from_pretrained(source, **settings)`, read by classes of the installed packages alone.

    DataError with file and key where only code of the folder could read it. Other errors are the library's.
    """
    require_regular_files(Path(source))
    if owner is AutoTokenizer:
        _require_native_tokenizer(Path(source))
    if issubclass(owner, (PreTrainedModel, _BaseAutoModelClass)):
        settings = NO_HUB_KERNELS | settings
    with no_foreign_code(source):
        found = owner.from_pretrained(source, trust_remote_code=False, **settings)
    if isinstance(found, GenerationConfig):
        vars(found).pop("trust_remote_code", None)  # it keeps each argument as a setting
    if owner is AutoTokenizer and not isinstance(found, PreTrainedTokenizerBase):
        raise DataError(_no_tokenizer(source, type(found).__name__))
    for part in (found, *(getattr(found, name, None) for name in getattr(found, "sub_configs", ()))):
        for choice in _CHOICES:  # of a configuration: a kernel of the hub may be named there; each caller chooses its own
            if getattr(part, choice, None) is not None:
                setattr(part, choice, None)
    return found


def require_regular_files(folder: Path) -> None:
    """Raises DataError for a pipe or a device in a folder of which libraries open the files: reading it may never end."""
    for place, _, files in os.walk(folder):
        for name in files:
            require_regular(Path(place, name))


def build_native(owner: Any, config: Any, **settings: Any) -> Any:
    """Returns `owner.from_config(config, **settings)`, the model of a class of transformers.

    DataError with the kind of model where its configuration is of one that cannot be built, EnvironmentProblem where its code
    needs a package that is not installed.
    """
    kind, where = getattr(config, "model_type", ""), getattr(config, "name_or_path", "")
    begin = f"{f'{where}: the' if where else 'The'} configuration of a '{kind}' model describes none that can be built"
    advice = "Correct its config.json, or fetch it again."
    if str(where).endswith(".gguf"):
        advice = "Fetch the file again, or use the model's safetensors folder."
    with no_foreign_code(where), one_message(begin, advice):
        try:
            return owner.from_config(config, trust_remote_code=False, **settings)
        except ImportError as error:
            if "trust_remote_code" in str(error):
                raise
            needs = f"{f'{where}: a' if where else 'A'} '{kind}' model needs a package that is not installed"
            raise EnvironmentProblem(f"{needs}: {shortened(' '.join(str(error).split()), 400)}") from error


@contextmanager
def no_foreign_code(source: str | Path) -> Iterator[None]:
    """A context for a library to read `source`: DataError with file and key where code of the folder would be needed."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if "trust_remote_code" not in str(error):
            raise
        raise DataError(_needed(Path(source))) from error


def _require_native_tokenizer(folder: Path) -> None:
    """Raises DataError if the tokenizer of `folder` has a class that is none, or one that only code of the folder defines.

    transformers would read the latter as a tokenizer of another class.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = read_object(file, expected="the settings of a tokenizer")
    name, code = settings.get("tokenizer_class"), settings.get("auto_map")
    names_code = isinstance(code, list) or (isinstance(code, Mapping) and "AutoTokenizer" in code)
    if names_code and isinstance(name, str) and not any(map(_is_known, (name, f"{name}Fast", name.removesuffix("Fast")))):
        raise DataError(_refusal(file, "auto_map", code))
    found = tokenizer_class_from_name(name) if isinstance(name, str) else None
    if isinstance(found, type) and not issubclass(found, PreTrainedTokenizerBase) and not _stands_in(found):
        raise DataError(_no_tokenizer(folder, found.__name__))


def _stands_in(found: type) -> bool:
    """True of AutoTokenizer, and of a class in place of one whose package is missing: it says which when it is called."""
    return found is AutoTokenizer or found.__module__.startswith("transformers.utils.dummy")


def _no_tokenizer(source: str | Path, name: str) -> str:
    return f"{source} names {name} as the class of its tokenizer, which is none. Correct tokenizer_class there."


def require_native_parts(folder: str | Path, index: Mapping[str, Any], unused: Collection[str] = ()) -> None:
    """Raises DataError if a part of a pipeline is of no class that diffusers or transformers offers by name.

    `index` is the content of its model_index.json: a class name for each part, with the package that has it. Parts `unused` may
    be anything.
    """
    file = Path(folder) / "model_index.json"
    name = index.get("_class_name")
    if isinstance(name, (list, tuple)):
        raise DataError(_refusal(file, "_class_name", name))
    for part, value in index.items():
        if part.startswith("_") or part in unused or not isinstance(value, (list, tuple)) or list(value) == [None, None]:
            continue
        library, kind = value if len(value) == 2 else (None, None)
        own = isinstance(library, str) and (Path(folder) / part / f"{library}.py").is_file()
        of_its_own = isinstance(kind, str) and (not kind.startswith("Auto") or kind.startswith("Autoencoder"))
        if own or not of_its_own or library not in (*_LIBRARIES, _SAFETY):
            raise DataError(_refusal(file, part, value))


def _is_known(name: str) -> bool:
    return tokenizer_class_from_name(name) is not None


def _needed(folder: Path) -> str:
    """The refusal of a folder that a library would read with code of its own: the first file that names some, with the key."""
    for name in _NAMING:
        try:
            found = json.loads(read_regular(folder / name)).get("auto_map")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if found:
            return _refusal(folder / name, "auto_map", found)
    return _refusal(folder, "auto_map", None)


def _refusal(file: Path, key: str, value: Any) -> str:
    named = "" if value is None else f" {json.dumps(value)[:200]}"
    return (
        f"{file}: {key} names code of its own{named}. Code of a folder is never run, and the installed packages have no class "
        "for it. Use a folder whose classes transformers or diffusers has, or update: pip install --upgrade transformers"
    )
