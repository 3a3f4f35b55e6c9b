"""`studio.remedies`: the remedies of an error are one click, and messages are written in the words of a page."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakeet
from lorakeet.errors import Remedy
from lorakeet.studio.remedies import page_words, remedies_together


def test_a_page_names_fields_and_shows_line_breaks() -> None:
    note = "To train with their names, set data.template, for instance '{text}\\nOne of: a, b'. Or see data.test, data.on_leak."
    shown = "To train with their names, set “prompt template”, for instance “{text}\nOne of: a, b”. Or see “test rows”, "
    template = Remedy("data.template", "{text}\nOne of: a, b", "Name the labels in the prompt")
    assert page_words(note, remedies=[template]) == f"{shown}“copies on both sides”."
    same = "a.data.test, lk.rows, C:\\new\\table, rows/data.test and e.g. this stay."
    assert page_words(same) == same
    long = "3 rows were dropped of /a/.studio/rows/my rows.csv; first my rows.csv:2. Set --data.test x.csv."
    assert page_words(long, "/a/.studio/rows/my rows.csv") == (
        "3 rows were dropped of my rows.csv; first my rows.csv:2. Set “test rows” x.csv."
    )


def test_the_remedies_of_an_error_come_together_first() -> None:
    encoding, label = Remedy("data.encoding", "cp1252", "Read it as cp1252"), Remedy("data.label_column", "b", "'b' is the label")
    whole, *each = remedies_together([encoding, label, Remedy("", "", "Install it", "pip install x")])
    assert whole["settings"] == {"data.encoding": "cp1252", "data.label_column": "b"}
    assert whole["words"] == "All together: read it as cp1252; “b” is the label"
    assert [one["settings"] for one in each] == [{"data.encoding": "cp1252"}, {"data.label_column": "b"}]
    (alone,) = remedies_together([encoding])
    assert alone["words"] == "Read it as cp1252"


FLAG = re.compile(r"(?<![\w-])--[a-z]|Ctrl-C|(?<!\w)/home/")


def written_texts() -> Iterator[tuple[str, str]]:
    """Every text in the code that names a flag or Ctrl-C, as a message may have it; what is computed in it is X."""
    for path in sorted(Path(lorakeet.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
            if FLAG.search(text) and isinstance(node, ast.JoinedStr | ast.Constant) and " " in text and "\n\n" not in text:
                yield path.name, text


@pytest.mark.slow
def test_no_message_of_the_code_brings_a_flag_a_path_or_ctrl_c_to_a_page() -> None:
    found = list(written_texts())
    assert len(found) > 150
    assert [(name, page_words(text)) for name, text in found if FLAG.search(page_words(text))] == []


@pytest.mark.parametrize(("message", "said"), [
    ("Go on with it: lorakeet finetune --resume /srv/x/runs/a", "Go on with it: “Resume”"),
    ("Raise it with --memory, or choose another --out.", "Raise it with “memory budget”, or choose another “name”."),
    ("Stopped by Ctrl-C before it finished.", "Stopped before it finished."),
    ("'/srv/u/my rows.csv' and /srv/u/b.csv:3 stay, http://127.0.0.1:8/a/b too.",
     "“my rows.csv” and b.csv:3 stay, http://127.0.0.1:8/a/b too."),
    ("It's 'a' or \"b c\": pip install 'lorakeet[llama]'. Its rows' ends 'stay.",
     "It's “a” or “b c”: pip install 'lorakeet[llama]'. Its rows' ends 'stay."),
    ("set --data.too_long truncate.", "set “longer rows” truncate."),
])  # fmt: skip
def test_a_message_of_the_command_line_is_said_in_the_words_of_a_page(message: str, said: str) -> None:
    assert page_words(message) == said == page_words(said)
