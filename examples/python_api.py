"""The same from Python: a run, its report and certificate, and the adapter as plain arrays.

python examples/python_api.py                                      # as it stands
python examples/python_api.py model=DIR train.epochs=2             # with other settings
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

import lorakeet
from lorakeet.workflows.finetune import finetune

out = Path("runs/from-python")
changes = dict(argument.split("=", 1) for argument in sys.argv[1:])
config = lorakeet.read_run(Path("examples/completion.yaml"), {"out": str(out), "train.epochs": "1", **changes})

try:
    finetune(config, console=Console())
except lorakeet.LorakeetError as error:
    sys.exit(f"{type(error).__name__}: {error}")

report = lorakeet.read_report(out / "report.json")
for system in report.systems:
    name, found = next(iter(system.metrics.items()))
    print(f"{system.name}: {name} {found.value:.3f} ({found.low:.3f} to {found.high:.3f}, {found.n} rows)")
if report.verdict is not None:
    print(report.verdict.sentence)
print("certificate passed:", lorakeet.read_certificate(out / "certificate.json").passed)

adapter = lorakeet.read_adapter(out / "adapter")
path, pair = next(iter(adapter.pairs.items()))
print(f"{len(adapter.pairs)} pairs; {path}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}, scale {pair.scale:g}")
