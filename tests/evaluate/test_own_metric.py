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
