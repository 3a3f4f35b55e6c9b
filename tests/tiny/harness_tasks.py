"""Task files for lm-evaluation-harness over a few rows on disk: choices, written answers, and a text's perplexity."""

from __future__ import annotations

import json
from pathlib import Path

COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
CHOICE = """task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITTEN = """task: tiny_written
output_type: generate_until
doc_to_text: "{{{{question}}}} Answer:"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
READ = """task: tiny_read
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""


def write_tasks(folder: Path, count: int = 12) -> Path:
    """A folder with three tasks over `count` rows."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    lines = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "label": n % 2} for n in range(count)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("read", READ)):
        (folder / f"{name}.yaml").write_text((text + COMMON).format(rows=rows))
    return folder
