"""`python -m lorakeet` and the command `lorakeet`."""

from __future__ import annotations

import gc
import sys

from lorakeet.cli.main import main as run

__all__ = ["main"]


def main() -> None:
    """Runs the command line and leaves the process with its exit code.

    The interpreter would search all objects for cycles before it ends, and with torch loaded that takes seconds. Nothing needs
    it: files are closed, and what is registered with atexit runs.
    """
    code = run()
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    main()
