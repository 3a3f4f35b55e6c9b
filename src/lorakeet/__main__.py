"""`python -m lorakeet` and the command `lorakeet`."""

from __future__ import annotations

import sys

from lorakeet.cli.main import main as run

__all__ = ["main"]


def main() -> None:
    """Runs the command line and leaves the process with its exit code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
