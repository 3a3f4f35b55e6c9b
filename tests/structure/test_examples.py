"""examples/: one for each verb, short, and all run by tests/laws/test_examples.py."""

from __future__ import annotations

import re

from lorakeet.verbs.options import VERBS
from structure.tree import ROOT, committed_files, named

LINES, ROWS = 60, 1000  # of an example, and of a file with rows


def examples() -> dict[str, str]:
    found = [path for path in committed_files() if path.is_relative_to(ROOT / "examples")]
    return {named(path): path.read_text(encoding="utf-8") for path in found}


def test_every_verb_has_an_example() -> None:
    shown = {verb for text in examples().values() for verb in re.findall(r"\blorakeet ([a-z]+)", text)}
    missing = [verb.name for verb in VERBS if verb.name not in shown]
    assert not missing, f"no file of examples/ shows lorakeet {', lorakeet '.join(missing)}"


def test_examples_are_short() -> None:
    lines = {name: text.count("\n") for name, text in examples().items()}
    too_long = {name: count for name, count in lines.items() if count > (ROWS if name.endswith(".jsonl") else LINES)}
    assert not too_long, f"more than {LINES} lines, or {ROWS} rows: {too_long}"


def test_every_example_is_run_by_a_test() -> None:
    test = (ROOT / "tests" / "laws" / "test_examples.py").read_text(encoding="utf-8")
    used = test + "".join(text for name, text in examples().items() if name.endswith((".yaml", ".sh", ".py")))
    idle = [name for name in examples() if name.rpartition("/")[2] not in used]
    assert not idle, f"named in no test: {', '.join(idle)}"
