"""No text of a stranger reaches the terminal as a control sequence; rich's own do."""

from __future__ import annotations

import io
import json
import logging
import random
import re
from pathlib import Path

import pytest
from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lorakeet.cli.main import main
from lorakeet.errors import visible
from lorakeet.runs.terminal import TerminalConsole, WholeTable, json_text
from lorakeet.verbs.serve import _Line
from structure.tree import ROOT

ATTACK = "\x1b]0;title\x07 \x1b[31mred\x1b[2J \x9b31m \x7f\x08 \x00 \ud800 é\tend\r\nnext"
CONTROLS = {chr(number) for number in [*range(32), *range(127, 160)]} - {"\t", "\n"}


def shown(*parts: object, terminal: bool = True) -> str:
    file = io.StringIO()
    TerminalConsole(file=file, force_terminal=terminal, color_system=None, markup=False, width=200).print(*parts, soft_wrap=True)
    return file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_controls_of_a_text_are_written_as_escapes(terminal: bool) -> None:
    table = Table(ATTACK)
    table.add_row(ATTACK)
    for part in (ATTACK, Text(ATTACK, style="red"), table):
        said = shown(part, terminal=terminal)
        assert not CONTROLS & set(said), said
        said.encode()
        for kept in ("\\x1b[31mred", "\\x9b31m", "\\ud800", "é"):
            assert kept in said, said


def test_rich_still_draws() -> None:
    file = io.StringIO()
    console = TerminalConsole(file=file, force_terminal=True, width=60, legacy_windows=False)
    console.print(Text("red \x1b[0m", style="red"))
    with Live(Text("a\nb"), console=console, auto_refresh=False) as live:
        live.update(Text("c\nd\x1b[A"), refresh=True)
    said = file.getvalue()
    assert "\x1b[31mred \\x1b[0m\x1b[0m" in said, "its colour, and the text's as an escape"
    assert "\x1b[1A" in said and "d\\x1b[A" in said, "its cursor, and the text's as an escape"


def test_json_is_the_same_value_without_controls() -> None:
    value = {"name\x1b": [ATTACK.replace("\ud800", ""), {"a": 1}], "\x9b": "\x7f"}
    said = json_text(value, indent=2)
    assert not CONTROLS & set(said) and json.loads(said) == value
    assert json.loads(json_text("\ud800")) == "\ud800" and json_text("\ud800").isascii()


def test_plain_texts_stay_as_they_are() -> None:
    for text in ("", "plain", "tab\tline\n", "é 漢字 \N{NO-BREAK SPACE}", "\N{GRINNING FACE}"):
        assert visible(text) == text


def test_an_error_that_names_a_hostile_path_escapes_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hostile = tmp_path / "run\x1b]0;x\x07\udcff"
    for arguments in ([], ["--json"], ["--debug"]):
        assert main(["check", str(hostile), *arguments]) == 2
        found = capfd.readouterr()
        assert not CONTROLS & set(found.out + found.err) and "run\\" in found.out + found.err


def test_a_line_of_the_server_s_log_is_one_line() -> None:
    record = logging.LogRecord("lorakeet.serve", logging.WARNING, "x", 1, "%s", ("a\nlevel=error b\x1b[31m\u2028c",), None)
    said = _Line().format(record)
    assert said.endswith("a\\nlevel=error b\\x1b[31m\\u2028c") and len(said.splitlines()) == 1


NUMBER = re.compile(r"[+−-]?\d[\d,.]*%?")


def printed(table: WholeTable, width: int) -> str:
    file = io.StringIO()
    TerminalConsole(file=file, width=width, markup=False).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_table_cuts_a_number(width: int) -> None:
    """Tables of every shape: up to twelve columns of numbers, intervals, names and sentences."""
    draw = random.Random(7)
    for _ in range(150):
        columns = draw.randint(1, 12)
        heads, lines = (f"kind {column}" for column in range(columns)), draw.choice([None, box.ASCII])
        table = WholeTable(*heads, title="Of 1,234,567 rows", box=lines)
        numbers: list[str] = ["1,234,567"]
        for _ in range(draw.randint(1, 4)):
            cells = []
            for _ in range(columns):
                low = draw.uniform(-1, 1) * 10 ** draw.randint(0, 7)
                sentence = f"adapter {low:.0f} is better than the base"
                texts = (f"{low:,.2f}", f"{low:.4f} [{low - 1:.4f}, {low + 1:.4f}]", sentence, "")
                cells.append(draw.choice(texts))
            numbers += NUMBER.findall(" ".join(cells))
            table.add_row(*map(Text, cells))
        said = printed(table, width)
        assert max(map(len, said.splitlines())) <= width
        assert not set(numbers) - set(NUMBER.findall(said)), said


def test_a_table_that_fits_is_a_table_and_one_that_does_not_is_lists() -> None:
    table = WholeTable("system", "accuracy", "loss", box=None)
    table.add_row("adapter", "0.8712 [0.8001, 0.9123]", "1.25")
    assert printed(table, 60).splitlines()[1].split() == ["adapter", "0.8712", "[0.8001,", "0.9123]", "1.25"]
    assert printed(table, 20).splitlines() == ["adapter", "  accuracy: 0.8712 ", "[0.8001, 0.9123]", "  loss: 1.25"]


def test_every_table_of_numbers_is_whole() -> None:
    """Replies of a chat, which are prose, are the only other tables."""
    source = ROOT / "src" / "lorakeet"
    users = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if "rich.table" in path.read_text("utf-8")}
    assert users == {"verbs/chat.py", "runs/terminal.py"}
