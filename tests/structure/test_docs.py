"""The pages: every link leads somewhere, and every command in them has the verbs and flags that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lorakeet.cli.main import lorakeet
from structure.tree import ROOT, committed_files, named

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LINK_TEXT = re.compile(r"\[([^\]]*)\]\([^)\s]+\)")
BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
ALWAYS = {"--help", "-h", "--version"}


def pages() -> list[Path]:
    return [path for path in committed_files() if path.suffix == ".md"]


def flags_of(command: click.Command) -> set[str]:
    options = [param for param in command.params if isinstance(param, click.Option)]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)} | ALWAYS


def commands() -> dict[str, click.Command]:
    context = click.Context(lorakeet)
    found = {name: lorakeet.get_command(context, name) for name in lorakeet.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def shown(text: str) -> Iterator[str]:
    """Every command line, and every flag that stands alone in a code span."""
    blocks = [line.strip() for block in BLOCK.findall(text) for line in block.splitlines()]
    spans = SPAN.findall(BLOCK.sub("", text))
    yield from (line for line in blocks if line.startswith("lorakeet "))
    yield from (span for span in spans if span.startswith(("lorakeet ", "--")))


def problems(line: str, known: dict[str, click.Command]) -> list[str]:
    words = shlex.split(line.replace("…", ""), comments=True)
    verb = words[1] if words[0] == "lorakeet" else "VERB"
    if verb not in known and verb != "VERB" and verb not in ALWAYS:
        return [f"no verb {verb}"]
    flags = flags_of(known[verb]) if verb in known else {flag for command in known.values() for flag in flags_of(command)}
    used = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"no flag {flag}" for flag in used if flag not in flags]


def test_every_link_leads_somewhere() -> None:
    lost = []
    for page in pages():
        for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
            path = target.partition("#")[0]
            if path and "://" not in path and not (page.parent / path).exists():
                lost.append(f"{named(page)}: {target}")
    assert not lost, "\n".join(lost)


def test_every_command_of_the_pages_exists() -> None:
    known = commands()
    told = [page for page in pages() if not page.is_relative_to(ROOT / "benchmarks")]  # whose scripts have flags of their own
    found = [(page, line) for page in told for line in shown(page.read_text(encoding="utf-8"))]
    wrong = [f"{named(page)}: {line}: {problem}" for page, line in found for problem in problems(line, known)]
    assert len(found) > 30 and not wrong, "\n".join(wrong)


def test_the_readme_names_every_verb() -> None:
    """Who reads one page must learn what there is; a verb that it does not name is found by nobody."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in commands() if not re.search(rf"\b(lorakeet|make) {name}\b", text)]
    assert not missing, f"README.md does not name {', '.join(missing)}"


def prose(text: str) -> str:
    """The text of a page without code blocks, tables, headings, pictures and the targets of links."""
    text = BLOCK.sub("", text)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "!["))]
    return LINK_TEXT.sub(r"\1", "\n".join(lines))


def sentences(text: str) -> list[list[str]]:
    """The sentences of a page as lists of words; list items and paragraphs end one too."""
    parts = re.split(r"(?<=[.:;?!])\s+(?:- )?|\n- |\n\n", prose(text))
    return [part.split() for part in parts if len(part.split()) > 2]


def test_the_first_pages_are_short() -> None:
    readme, changelog = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))
    found = sentences(readme)
    assert len(readme.splitlines()) <= 110 and len(changelog.splitlines()) <= 80
    assert len(found) > 20 and sum(map(len, found)) / len(found) <= 18, "mean words of a sentence of README.md"
    assert len((ROOT / "ARCHITECTURE.md").read_bytes()) <= 8192


def test_sentences_of_pages_are_short() -> None:
    log = ROOT / "docs" / "log"  # whose entries are as they were written
    read = {page: sentences(page.read_text(encoding="utf-8")) for page in pages() if not page.is_relative_to(log)}
    means = {named(page): sum(map(len, found)) / len(found) for page, found in read.items() if found}
    long = {page: round(mean, 1) for page, mean in means.items() if mean > 18}
    assert len(means) > 20 and not long, long


def test_words_of_sentences_are_counted() -> None:
    assert sentences("# Head\n\nOne two [three](a/b.md). Four five six:\n- seven eight nine\n\n| a b c d |\n") == [
        ["One", "two", "three."], ["Four", "five", "six:"], ["seven", "eight", "nine"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("lorakeet finetnue --lora.rank 8", ["no verb finetnue"]),
        ("lorakeet finetune --lora.rnak 8 --dry-run", ["no flag --lora.rnak"]),
        ("lorakeet merge runs/a --out b --lora.rank 8", ["no flag --lora.rank"]),
        ("--lora.rank 8", []),
        ("--no-such-flag", ["no flag --no-such-flag"]),
        ("lorakeet VERB --help", []),
    ],
)
def test_wrong_commands_are_found(line: str, found: list[str]) -> None:
    assert problems(line, commands()) == found


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [
        named(page)
        for page in pages()
        if page.is_relative_to(ROOT / "docs") and page.name != "README.md" and str(page.relative_to(ROOT / "docs")) not in index
    ]
    assert not missing, f"docs/README.md does not name {', '.join(missing)}"


def test_the_heart_is_read_in_an_hour() -> None:
    """A dozen files of at most 2,500 lines in all, and every name that the page points at is there."""
    page = (ROOT / "docs/explain/heart.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[\S+\]\(\.\./\.\./(src/\S+\.py)\) \| ([^|]+) \|", page, re.MULTILINE)
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path, _ in rows}
    assert len(sources) == 12 and sum(text.count("\n") for text in sources.values()) <= 2500
    for path, names in rows:
        for name in SPAN.findall(names):
            assert re.search(rf"(?:class|def) {name.rpartition('.')[2]}\b", sources[path]), (path, name)
