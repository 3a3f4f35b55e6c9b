"""A metric of one's own: the function of the file, and what is said of files that have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.evaluate.own_metric import load_metric


def test_the_function_of_the_file_is_the_metric(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def same_start(reply, reference):\n    return reply[:1] == reference[:1]\n")
    found = load_metric(f"{tmp_path / 'my.py'}:same_start")
    assert found.name == f"{tmp_path / 'my.py'}:same_start" and (found.score("ab", "ac"), found.score("b", "ac")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("content", "given", "words"),
    [
        ("", "my.py", "expected a Python file and one of its functions"),
        ("", "other.py:f", "there is no file"),
        ("", "my.py:f", "has no function 'f'"),
        ("1 / 0", "my.py:f", "cannot be run: ZeroDivisionError"),
    ],
)
def test_metrics_that_cannot_be(tmp_path: Path, content: str, given: str, words: str) -> None:
    (tmp_path / "my.py").write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_metric(str(tmp_path / given))


def test_a_metric_that_fails_names_the_reply(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def f(reply, reference):\n    return reply['x']\n")
    with pytest.raises(ConfigError, match=r"failed on the reply 'abc': TypeError.*returns a number"):
        load_metric(str(tmp_path / "my.py:f")).score("abc", "d")


def test_a_file_in_a_run_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "my.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(reply, reference):\n    return 1\n")
    with pytest.raises(ConfigError, match="of which no code is run"):
        load_metric(str(tmp_path / "run" / "my.py:f"), outside=tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_dataclasses_of_a_metric_file_work(tmp_path: Path) -> None:
    head = ["from __future__ import annotations", "from dataclasses import dataclass"]
    lines = [*head, "@dataclass", "class Score:", "    value: float"]
    (tmp_path / "my.py").write_text("\n".join([*lines, "def f(reply, reference):", "    return Score(0.5).value", ""]))
    assert load_metric(str(tmp_path / "my.py:f")).score("a", "b") == 0.5


@pytest.mark.parametrize("value", ["float('nan')", "1e999", "-1e999"])
def test_a_metric_that_is_no_finite_number_names_the_reply(value: str, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(f"def f(reply, reference):\n    return {value}\n")
    with pytest.raises(ConfigError, match=r"on the reply 'abc'; expected a finite number"):
        load_metric(str(tmp_path / "my.py:f")).score("abc", "d")
