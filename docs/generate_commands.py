"""Writes docs/reference/commands.md, what each verb takes, from the options of the verbs: `make docs`."""

from __future__ import annotations

from pathlib import Path

import click

from lorakeet.cli.flags import SettingFlag
from lorakeet.cli.main import lorakeet

PAGE = Path(__file__).parent / "reference" / "commands.md"

HEAD = """# Reference: the commands

Made from the code by `make docs`; a test compares it with the code. `lorakeet VERB --help` prints the same. Every verb also takes
`--json`, which prints only the result or the [error](errors.md), and `--debug`, which prints its traceback. A pair such as
`--sym / --no-sym` is one option: the first form means true, the second false. A word after the first works too: `--sym false`.

| exit code | means |
| ---: | --- |
| 0 | done |
| 2 | an error that you can mend; the message says how |
| 3 | a verification failed, or `check` found a requirement that does not hold |
| 4 | a run stopped early |
| 130, 143 | Ctrl-C, SIGTERM |
"""


def page() -> str:
    """The whole page as Markdown: a usage line and a table for each verb."""
    context = click.Context(lorakeet, info_name="lorakeet")
    parts = [HEAD]
    for name in lorakeet.list_commands(context):
        command = lorakeet.get_command(context, name)
        assert command is not None
        parts.append(section(command, click.Context(command, info_name=name, parent=context)))
    return "\n".join(parts)


def section(command: click.Command, context: click.Context) -> str:
    """What one verb takes. Settings of the run file stand on a page of their own."""
    usage = " ".join(["lorakeet", str(context.info_name), *command.collect_usage_pieces(context)])
    rows = [f"| `{name}` | {cell(meaning)} |" for name, meaning in getattr(command, "arguments", {}).items()]
    settings = False
    for param in command.get_params(context):
        settings = settings or isinstance(param, SettingFlag)
        record = None if isinstance(param, (SettingFlag, click.Argument)) else param.get_help_record(context)
        if record and not {"--json", "--debug", "--help"} & set(param.opts):
            rows.append(f"| `{record[0].replace('|', chr(92) + '|')}` | {cell(record[1])} |")
    text = [f"## `{context.info_name}`", "", command.help or "", "", "```", usage, "```", ""]
    if rows:
        text += ["| takes | meaning |", "| --- | --- |", *rows, ""]
    if settings:
        text += ["And every [setting of the run file](config.md) as a flag.", ""]
    return "\n".join(text)


def cell(text: str) -> str:
    """Help as a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
