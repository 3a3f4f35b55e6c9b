"""Writes docs/reference/models.md, what each family of models was tried for, from tests/families/results.json: `make docs`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "tests" / "families" / "results.json"
PAGE = DOCS / "reference" / "models.md"
COLUMNS = ("train", "gradients", "bf16", "PEFT", "merge", "plan", "NF4", "serve", "GGUF", "GPU")
SIGNS = {"passed": "✓", "refused": "refused", "not tried": "not tried", "wrong": "**wrong**", "crashed": "**crashed**",
         "too slow": "too slow"}  # fmt: skip
SHOWN = 240  # characters of a message

HEAD = """# Reference: the families of models

Made from the results of `make families` by `make docs`; a test compares them. For each family that transformers {version} has,
a small random model of its own class was made: hidden size 64, every kind of layer, windows shorter than the rows. Where experts
cannot have pairs, all columns are of a run without them.

| column | ✓ means |
| --- | --- |
| train | a gradient reaches every planned tensor, and no other tensor is trained |
| gradients | in fp32, gradients of packed rows are those of transformers and PEFT on single rows, to 1e-5; the worst difference |
| bf16 | the same in bf16, beside the model's own code; rounding explains the difference |
| PEFT | the real PEFT reads the files, and computes the live model's logits to 3e-5 |
| merge | transformers reads the merged model, and computes these logits to 3e-5; other tensors keep their bytes |
| plan | `lorakeet plan` answers |
| NF4 | a base in NF4 trains, its stacked experts packed too; the last table says where they stay dense |
| serve | greedy texts are those that transformers' generate writes; the last table says where their length is limited |
| GGUF | llama.cpp computes these logits from the exported file |
| GPU | on a simulated GPU, a whole run gives the CPU's numbers to 2e-4; the worst difference |

No real GPU was used: the simulated one computes with the CPU, and refuses what torch refuses on a GPU. A run there takes two
steps in fp32, is evaluated, generates and is certified. Compared are the first step's loss and gradient norm, and the base's
losses and replies. Dropout is off, since a GPU draws other numbers.

A row's hidden states, loss and reply do not depend on the rest of its batch. `make families` compares them with transformers on
the row alone, from 3 tokens to the most that a family takes. Some families attend to the best-scored tokens in longer rows alone:
DeepSeek-V3.2, GLM-5, Doge, MiniMax-M3 and their like. Which of equal scores are taken depends on the padding. So such rows are
computed one by one, and such texts are continued one by one. Shorter rows share batches.

Where a model's gradients or its merged logits are further off, its own code is measured in fp32 beside fp64.
Three times that difference is allowed. The last table names these families, with both numbers.

"""


def cell(one: dict[str, str] | None) -> str:
    """A sign, with the number that was measured."""
    if one is None:
        return "–"
    number = re.match(r"\d[\d.e+-]*(?=$|,)", one["detail"]) if one["outcome"] == "passed" else None
    return f"{SIGNS[one['outcome']]} {number[0] if number else ''}".strip()


def first_sentence(text: str) -> str:
    """The start of a message, as one line of a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= SHOWN else f"{line[:SHOWN].rstrip()} …"


def rows(found: dict[str, dict[str, dict[str, str]]]) -> dict[str, list[str]]:
    """The lines of the tables by heading: families that train, those that are refused, and what stands behind a sign."""
    trained, refused, said = [], [], []
    for kind, columns in found.items():
        train = columns.get("train")
        if train is None or train["outcome"] != "passed":
            one = train or columns["build"]
            refused.append(f"| {kind} | {SIGNS[one['outcome']]} | {first_sentence(one['detail'])} |")
            continue
        trained.append(f"| {kind} | {' | '.join(cell(columns.get(column)) for column in COLUMNS)} |")
        for column in COLUMNS[1:]:
            one = columns.get(column, {"outcome": "passed", "detail": ""})
            more = (column in ("gradients", "merge") and "," in one["detail"]) or (column in ("NF4", "serve") and one["detail"])
            if one["outcome"] != "passed" or more:
                said.append(f"| {kind} | {column} | {SIGNS[one['outcome']]} | {first_sentence(one['detail'])} |")
    return {"trained": trained, "refused": refused, "said": said}


def page() -> str:
    """The whole page as Markdown."""
    told: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = rows(told["families"])
    parts = [HEAD.format(version=told["transformers"]), "## Families that train\n"]
    parts += [f"| family | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}", *found["trained"]]
    parts += ["\n## Families that are refused, or whose small model could not be made\n", "| family | | message |"]
    parts += ["| --- | --- | --- |", *found["refused"]]
    parts += ["\n## What stands behind a sign\n", "| family | column | | message |", "| --- | --- | --- | --- |", *found["said"]]
    if untried := [kind for kind in told.get("known", []) if kind not in told["families"]]:
        parts += ["\n## Not tried\n", "| families |", "| --- |", f"| {', '.join(untried)} |"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
