"""Small programs that each need a process of their own and share its imports: forked from one process that has done them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

FORK = "if os.fork() == 0:\n    exec({!r})\n    sys.stdout.flush()\n    os._exit(0)\nassert not os.wait()[1]\n"


def answers(imports: str, codes: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
    """What each code prints, one line each, in a process that has run `imports`, one after another."""
    program = f"import os, sys\n{imports}\n" + "".join(map(FORK.format, codes))
    there = dict(os.environ if env is None else env)
    run = subprocess.run([sys.executable, "-c", program], env=there, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()
