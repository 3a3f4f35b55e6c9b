"""vLLM in an environment of its own: found, started, waited for until it answers, and stopped with all of its processes.

LORAKEET_VLLM_PYTHON names the environment's Python; else it is this one, if vLLM is installed beside Lorakeet.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.runs.server_answer import open_answer

VARIABLE = "LORAKEET_VLLM_PYTHON"
INSTALL = f"make vllm builds an environment with vLLM's CPU engine; {VARIABLE} names its Python"
LONGEST_START = 1800.0  # seconds; a small model takes one to three minutes on a CPU
PAUSE = 0.5  # seconds between two questions
_STOPPING = 30.0  # seconds until processes that do not end are killed
_STANDARD_ERROR = 2
_COMMAND = "vllm.entrypoints.cli.main"
_KEYS_AND_VALUES = {"VLLM_CPU_KVCACHE_SPACE": "2"}  # GiB; by itself the CPU engine takes 92 % of the memory, or refuses
KEY = "VLLM_API_KEY"  # vLLM's own variable with its API key
_LOADING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # /v1/load_lora_adapter, by which any client may replace an adapter


def vllm_python() -> Path | None:
    """The Python of the environment with vLLM; None where there is none. ConfigError if the variable names no program."""
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise ConfigError(f"{VARIABLE} is '{named}'; expected the Python of an environment with vLLM. {INSTALL}.")
        return path
    return Path(sys.executable) if find_spec("vllm") is not None else None


def base_url(host: str, port: int) -> str:
    """The address at which a server on `host` answers; one that listens on all addresses answers on this machine's own."""
    where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{where}]:{port}" if ":" in where else f"http://{where}:{port}"


@contextmanager
def running_vllm(
    python: Path, words: Sequence[str], url: str, *, longest: float = LONGEST_START, loading: bool | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A context in which `vllm serve …` (`words`) answers at `url`; its messages go to standard error.

    `loading`: whether adapters may be loaded and unloaded while it runs; None leaves that to vLLM's variable (if unset: no).
    EnvironmentProblem if it ends before it answers, or does not answer in `longest` seconds. All that it started ends with the
    context.
    """
    command, variables = [str(python), "-m", _COMMAND, *words[1:]], {**_KEYS_AND_VALUES, **_environment()}
    if loading is not None:
        variables[_LOADING] = str(loading)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=_STANDARD_ERROR, start_new_session=True, env=variables
    ) as process:
        try:
            _wait_until_ready(process, url, longest)
            yield process
        finally:
            _stop(process)


def _environment() -> dict[str, str]:
    """This process's variables, without those that would put its own packages into another environment."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, longest: float) -> None:
    end = time.monotonic() + longest
    while time.monotonic() < end:
        if (code := process.poll()) is not None:
            raise EnvironmentProblem(f"vLLM ended with exit code {code} before it answered; what it said stands above.")
        with suppress(OSError, ValueError), open_answer(f"{url}/health"):
            return
        time.sleep(PAUSE)
    raise EnvironmentProblem(f"vLLM did not answer at {url}/health within {longest:,.0f} s; what it said stands above.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends vLLM and its engine's processes, which are in a session of their own."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, which)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOPPING)
