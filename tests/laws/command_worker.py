"""`lorakeet` with the words of each order, in processes of their own that tests kill; see tiny/forked."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import lorakeet.verbs.finetune  # noqa: F401 - what the verb imports late, once for all processes
from lorakeet.cli.main import main
from tiny.forked import serve

if __name__ == "__main__":
    serve(lambda order: main(order["words"]))
