"""The options of `lorakeet chat` that can be checked without its model. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from lorakeet.data.locate import locate_model
from lorakeet.errors import ConfigError, Problems
from lorakeet.formats.adapter_format import require_adapter
from lorakeet.memory.budget import Budget
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.serving_options import named_paths
from lorakeet.verbs.options import ChatOptions

_SERVERS = ("http://", "https://")
_OF_A_MODEL = ("adapter", "base", "quantize", "memory")


def is_server(target: str) -> bool:
    """True for the address of a server."""
    return target.startswith(_SERVERS)


def require_chattable(options: ChatOptions) -> None:
    """Raises ConfigError for options that contradict each other, DataError for a target or an adapter that is not there."""
    problems = Problems("The chat cannot begin")
    if is_server(options.target):
        for name in (name for name in _OF_A_MODEL if getattr(options, name)):
            problems.add(f"--{name} is given, but {options.target} is a server with a model of its own. Leave it out.")
    for name in ("max_tokens", "context"):
        if (value := getattr(options, name)) < 1:
            problems.add(f"--{name.replace('_', '-')} is {value}; it must be 1 or more.")
    problems.raise_if_any()
    Budget.parse(options.memory)
    for path in named_paths(options.adapter).values():
        require_adapter(path)
    if not is_server(options.target):
        path = Path(options.target).expanduser()
        if RunFolder.around(path) is None:
            locate_model(options.target)
    if options.base:
        locate_model(options.base)


def target_name(path: Path, taken: dict[str, Path]) -> str:
    """The name of the adapter at `path` in the chat: that of its run or folder. Raises ConfigError if --adapter has it too."""
    run = RunFolder.around(path)
    name = (path if run is None else run.path).absolute().name or "adapter"
    if name in taken:
        raise ConfigError(f"--adapter {name}=…: {path} has that name already. Choose another.")
    return name
