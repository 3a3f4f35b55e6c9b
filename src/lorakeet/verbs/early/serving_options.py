"""The options of a server that can be checked without its model: names and paths, the address, limits, keys.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lorakeet.errors import ConfigError, PackageMissing, Problems
from lorakeet.memory.budget import Budget, parse_size
from lorakeet.serve.access import read_keys
from lorakeet.serve.listening import LOOPBACK, require_free_port
from lorakeet.serve.model_names import check_name
from lorakeet.verbs.options import ServeOptions, non_default

LEAST_CONTEXT = 2  # a token of a prompt and one of its text
_VLLM_TOO = {"context": "--max-model-len", "host": "--host", "port": "--port", "dtype": "--dtype"}
_PACKAGES = ("starlette", "uvicorn")


def require_servable(options: ServeOptions) -> Budget:
    """The memory budget of the adapters. Raises ConfigError for options that contradict each other or are out of range,
    EnvironmentProblem for a package that is missing or an address on which nothing can listen.
    """
    problems = Problems("The server cannot be started")
    if options.keys is None and options.host not in LOOPBACK:
        problems.add(
            f"--host {options.host} opens the server to other machines, which could load and unload adapters. Give --keys FILE, "
            "or leave --host out."
        )
    for name in ("slots", "queue", "timeout", "stop", "connections", "connections_per_address"):
        if (value := getattr(options, name)) is not None and value <= 0:
            problems.add(f"--{name.replace('_', '-')} is {value}; it must be above 0.")
    if options.context is not None and options.context < LEAST_CONTEXT:
        problems.add(f"--context is {options.context}; it must be {LEAST_CONTEXT} or more.")
    if options.out is not None:
        problems.add("--out is for --engine vllm only; --adapters-dir is the folder for uploads.")
    if options.command_only:
        problems.add("--command-only is for --engine vllm only.")
    problems.raise_if_any()
    parse_size(options.upload_limit)
    parse_size(options.uploads_total)
    budget = Budget.parse(options.memory)
    if options.keys is not None:
        read_keys(options.keys)
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise PackageMissing(f"lorakeet serve needs {' and '.join(missing)}", "lorakeet[serve]", missing)
    require_free_port(options.host, options.port)
    return budget


def named_paths(given: Sequence[str]) -> dict[str, Path]:
    """The paths by name in name=PATH, …. Raises ConfigError that lists every wrong entry."""
    problems = Problems("--adapter cannot be used")
    found: dict[str, Path] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals or not path:
            problems.add(f"--adapter {entry}: expected name=PATH, such as reviews=runs/reviews.")
            continue
        try:
            check_name(name)
        except ConfigError as error:
            problems.add(str(error))
            continue
        if name in found:
            problems.add(f"--adapter {entry}: the name '{name}' is given twice.")
        found[name] = Path(path).expanduser()
    problems.raise_if_any()
    return found


def vllm_flags(options: ServeOptions) -> list[str]:
    """Returns vLLM's flags for the `options` that differ from their defaults; raises ConfigError for those without one,
    and where no adapter is given.

    --host is always among them: without it vLLM accepts connections from every machine.
    """
    if not options.adapter:
        raise ConfigError("--engine vllm needs at least one --adapter name=PATH.")
    given = non_default(options)
    lost = sorted(given.keys() - {"model", "adapter", "engine", "out", "command_only", "uncertified", *_VLLM_TOO})
    if lost:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in lost)
        raise ConfigError(f"--engine vllm cannot pass on {flags}; leave them out, and give vLLM its own options.")
    return [word for name, flag in _VLLM_TOO.items() if name in {*given, "host"} for word in (flag, str(getattr(options, name)))]
