"""The options of the studio that can be checked before it is opened: packages, folders, the port. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec

from lorakeet.errors import PackageMissing, Problems
from lorakeet.runs.output_paths import require_place
from lorakeet.serve.listening import require_free_port
from lorakeet.verbs.options import StudioOptions

LOOPBACK_ADDRESS = "127.0.0.1"  # no other machine reaches it
_PACKAGES = ("starlette", "uvicorn")


def require_studio(options: StudioOptions) -> None:
    """Raises ConfigError for folders that are missing or a number that is no port, EnvironmentProblem for packages that are
    missing, a port in use, or a folder of runs that cannot be made.
    """
    problems = Problems("The studio cannot be opened")
    if options.runs.exists() and not options.runs.is_dir():
        problems.add(f"--runs {options.runs} is a file; expected a folder, which is made if it is missing.")
    for folder in options.folder:
        if not folder.expanduser().is_dir():
            problems.add(f"--folder {folder} is no folder; expected one with models or rows.")
    problems.raise_if_any()
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise PackageMissing(f"lorakeet studio needs {' and '.join(missing)}", "lorakeet[studio]", missing)
    if not options.runs.exists():
        require_place(options.runs)
    require_free_port(LOOPBACK_ADDRESS, options.port)
