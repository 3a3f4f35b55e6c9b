"""`errors`: exit codes, all problems at once, and the nearest name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorakeet.errors import (
    LONGEST_MESSAGE,
    ConfigError,
    DataError,
    EnvironmentProblem,
    LorakeetError,
    Problems,
    Remedy,
    RunStopped,
    VerificationFailed,
    nearest,
    one_message,
    readable,
    reader,
    require_regular,
    unreadable,
    visible,
)
from lorakeet.evaluate.report.templates import page_templates


def test_every_kind_of_error_has_its_exit_code() -> None:
    codes = {kind: kind.exit_code for kind in (ConfigError, DataError, EnvironmentProblem, VerificationFailed, RunStopped)}
    assert list(codes.values()) == [2, 2, 2, 3, 4]
    assert all(issubclass(kind, LorakeetError) for kind in codes)


def test_problems_are_raised_together() -> None:
    problems = Problems("The rows cannot be used", DataError)
    problems.raise_if_any()
    problems.add("one is wrong.")
    with pytest.raises(DataError, match=r"^one is wrong\.$"):
        problems.raise_if_any()
    problems.add("two is wrong.")
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    assert str(caught.value) == "The rows cannot be used (2 problems):\n  - one is wrong.\n  - two is wrong."


def test_one_remedy_for_all_problems_comes_last() -> None:
    problems = Problems("The rows cannot be used", remedy="Fetch them again.")
    problems.add("one is wrong.")
    with pytest.raises(ConfigError, match=r"^one is wrong\. Fetch them again\.$"):
        problems.raise_if_any()
    problems.add("two is wrong.")
    with pytest.raises(ConfigError, match=r"two is wrong\.\nFetch them again\.$"):
        problems.raise_if_any()


def test_a_message_is_bounded_and_the_rest_counted() -> None:
    said = str(DataError("a" * 5000 + "b" * 5_000_000 + "fetch it again."))
    assert len(said) <= LONGEST_MESSAGE and said.startswith("a" * 1000) and said.endswith("fetch it again.")
    assert "[…, 5,003,075 characters, …]" in said
    problems = Problems("The rows cannot be used", DataError, remedy="Fetch them again.")
    for number in range(100_000):
        problems.add(f"row {number} is " + "x" * (1_000_000 if number == 1 else 50))
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    lines = str(caught.value).splitlines()
    assert len(str(caught.value)) <= LONGEST_MESSAGE
    assert lines[0] == "The rows cannot be used (100,000 problems):" and lines[-1] == "Fetch them again."
    assert lines[-2] == f"  - and {100_000 - (len(lines) - 3):,} more."


def test_a_reader_gives_one_message_whatever_a_library_raises() -> None:
    class PanicException(BaseException):
        """As libraries in Rust raise it."""

    @reader("an adapter")
    def read(path: Path, error: BaseException) -> None:
        raise error

    for error in (IndexError("list\nindex."), RecursionError("deep"), PanicException("list index"), KeyError()):
        with pytest.raises(DataError, match=r"^a\.gguf cannot be read as an adapter: \w+.* \(test_errors\.py, line \d+\)\. It"):
            read(Path("a.gguf"), error)
    with pytest.raises(EnvironmentProblem, match="it needs more memory than there is"):
        read(Path("a.gguf"), MemoryError())
    for passing in (ConfigError("as it is"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(passing)) as caught:
            read(Path("a.gguf"), passing)
        assert caught.value is passing
    with pytest.raises(OSError, match="full"), one_message("a", "b", passing=(OSError,)):
        raise OSError("full")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "a device or a pipe"), (tmp_path, "a folder"), (Path("/dev/null"), "a device")):
        with pytest.raises(DataError, match=f"is {words}.*; expected a file"):
            require_regular(path)
    require_regular(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "sentence"), [("q_prj", " Did you mean 'q_proj'?"), ("Q_PROJ", " Did you mean 'q_proj'?"), ("zebra", ""), ("", "")]
)
def test_the_nearest_name_is_offered_when_it_is_near(name: str, sentence: str) -> None:
    assert nearest(name, ["q_proj", "k_proj", "down"]) == sentence


def test_a_file_that_is_not_read_is_named_with_the_reason_and_the_remedy() -> None:
    said = "a.yaml cannot be read: {}. Check the path, its permissions and the disk."
    assert unreadable(Path("a.yaml"), OSError(5, "Input/output error")) == said.format("Input/output error")
    assert unreadable(Path("a.yaml"), OSError("odd")) == said.format("odd")
    with pytest.raises(DataError, match=r"^a\.yaml cannot be read: odd"), readable(Path("a.yaml")):
        raise OSError("odd")


def test_a_remedy_is_the_same_on_the_command_line_and_in_words() -> None:
    flags = {value: Remedy("data.delimiter", value, "x").flag for value in (";", ",", "tab", "a b", "it's")}
    assert [flag.removeprefix("--data.delimiter ") for flag in flags.values()] == ["';'", "','", "tab", "'a b'", "'it'\"'\"'s'"]
    remedies = (Remedy("data.encoding", "cp1252", "Read it as cp1252"),)
    assert DataError("a", remedies=remedies).remedies == remedies and DataError("a").remedies == ()
    problems = Problems("Two", DataError, remedies=remedies)
    for message in ("a", "b"):
        problems.add(message)
        with pytest.raises(DataError) as caught:
            problems.raise_if_any()
        assert caught.value.remedies == remedies


@pytest.mark.parametrize("number", [0x1B, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
def test_no_text_changes_the_order_of_what_is_shown(number: int) -> None:
    assert visible(f"a{chr(number)}b").isascii()
    shown = page_templates(lambda _: "{{ text }}").get_template("x").render(text=f"a{chr(number)}<b")
    assert shown == f"a\\u{number:04x}&lt;b"


def test_an_error_is_the_same_after_json() -> None:
    """Its code, values, remedies and problems; those that are added to others keep theirs."""
    whole = Problems("Two")
    whole.add("a", code="file-missing", values={"path": "a"})
    whole.add(EnvironmentProblem("b", code="disk-full", remedies=[Remedy("", "", "Make space", "rm x")]))
    with pytest.raises(ConfigError) as caught:
        whole.raise_if_any()
    found = caught.value.to_mapping()
    assert found["code"] == "several-problems" and found["remedies"] == [{"command": "rm x", "words": "Make space"}]
    assert [one["code"] for one in found["values"]["problems"]] == ["file-missing", "disk-full"]
    again = LorakeetError.from_mapping(json.loads(json.dumps(found)))
    assert again.to_mapping() == found and [str(one) for one in again.problems] == ["a", "b"]
    one = Problems("One")
    one.add(EnvironmentProblem("b", code="disk-full", values={"path": "x"}))
    with pytest.raises(ConfigError, match=r"^b$") as alone:
        one.raise_if_any()
    assert (alone.value.code, alone.value.values, alone.value.problems) == ("disk-full", {"path": "x"}, ())


def test_what_a_library_raises_names_the_file_in_its_values(tmp_path: Path) -> None:
    @reader("a number")
    def number_of(path: Path) -> int:
        return int(path.read_text())

    (tmp_path / "n").write_text("x")
    with pytest.raises(DataError) as caught:
        number_of(tmp_path / "n")
    assert (caught.value.code, caught.value.values) == ("file-malformed", {"path": str(tmp_path / "n")})
