"""Compares the numbers of plans with those of another state of the source, to the byte.

    python tests/golden/same_plans.py record FILE [--only WORD]
    python tests/golden/same_plans.py compare FILE [--only WORD]

`record` with the other source in PYTHONPATH, `compare` with this one, on one machine. Of each plan there are the bytes of every
kind in every phase, its work, and of every ledger every peak and a digest of every moment. Models have published shapes, or are
small ones of the families that transformers has. Refusals are compared by their words. `compare` prints each difference and exits
with 0 if there is none. Both take some minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lorakeet.config import RunConfig, read_run
from lorakeet.data.spec import NO_ROWS
from lorakeet.memory.ledger import Ledger
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import config_of
from lorakeet.planning.forecast_text_run import forecast_run
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import BEGIN
from lorakeet.planning.text_run import LEAST
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import RESIDENT, Way
from tiny.small_configs import small_config

LLAMA, SMALL = "meta-llama/Llama-3.1-8B", "HuggingFaceTB/SmolLM2-135M"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NF4 = QuantSpec(method="nf4")
WAYS = {
    "": RESIDENT, "streamed": LEAST, "two together": Way(streamed=True, together=2, spilled=False),
    "recomputed": Way(recomputed=True, slots=1),
}  # fmt: skip
SETTINGS: dict[str, dict[str, str]] = {
    "": {},
    "rank 64": {"lora.rank": "64"},
    "8-bit moments": {"train.moments": "8bit"},
    "rows of 2,048": {"data.max_tokens": "2048"},
    "micro-batches of 4,096": {"train.micro_tokens": "4096"},
    "one row": {"train.batch_size": "1"},
    "attention alone": {"lora.target_modules": "attention"},
    "dora": {"lora.variant": "dora"},
    "orthogonal": {"lora.start": "orthogonal"},
    "pissa": {"lora.start": "pissa"},
    "dropout": {"lora.dropout": "0.1"},
    "ranks auto": {"ranks.choose": "auto"},
    "sdpa": {"model.attention": "sdpa"},
    "eager": {"model.attention": "eager"},
}
SLOW = ("mamba", "bamba", "jamba", "zamba", "falcon_h1")  # families that compute a row token by token: two minutes each
Case = Callable[[], Any]


def forecast(model: Any, settings: dict[str, str], precision: Precision, way: Way) -> Any:
    """The plan of a run of these settings on the model of a configuration."""
    config: RunConfig = read_run(None, {"data.train": NO_ROWS, "model.path": SMALL, **settings})
    config = replace(config, model=replace(config.model, quantize=precision.quantize))
    found = forecast_run(config, model, precision, runtime=0, way=way)
    return {
        "phases": [phase.to_mapping() for phase in found.forecast.phases], "work": vars(found.work), "base": found.base,
        "trained": found.plan.parameters, "blocks": [found.blocks, found.block_bytes, found.alike],
        "trial": found.rate_trial and found.rate_trial.to_mapping(), "alone": found.alone and found.alone.to_mapping(),
    }  # fmt: skip


def family(kind: str, precision: Precision) -> Any:
    """The plan of a small model of a family."""
    return forecast(small_config(kind), {"data.max_tokens": "64"}, precision, RESIDENT)


def cases() -> Iterator[tuple[str, Case]]:
    """Each plan and its name."""
    narrow = partial(Precision, torch.bfloat16, torch.bfloat16)
    precisions = {
        "gpu": narrow(QuantSpec(), GPU), "gpu nf4": narrow(NF4, GPU), "cpu": narrow(QuantSpec(), CPU),
        "cpu nf4": narrow(NF4, CPU),
        "fp32": Precision(torch.float32, torch.float32, QuantSpec(), CPU),
    }  # fmt: skip
    for path in (LLAMA, SMALL):
        model = config_of(ModelSpec(path=path), print)
        for words, settings in SETTINGS.items():
            for place, precision in precisions.items() if words in ("", "8-bit moments") else (("gpu", precisions["gpu"]),):
                yield f"{path} {place} {words}", partial(forecast, model, settings, precision, RESIDENT)
        for words, way in WAYS.items():
            for place in ("gpu", "cpu nf4"):
                if words and not (way.recomputed and place != "gpu"):
                    yield f"{path} {place} {words}", partial(forecast, model, {}, precisions[place], way)
    results = json.loads((Path(__file__).resolve().parents[1] / "families" / "results.json").read_text())
    for kind in sorted(results["families"]):
        if kind in CONFIG_MAPPING and not any(word in kind for word in SLOW):
            yield f"family {kind}", partial(family, kind, precisions["fp32"])


def numbers(case: Case) -> dict[str, Any]:
    """The numbers of a plan, or the words of its refusal; with what every ledger of it recorded."""
    ledgers: list[Any] = []
    leave = Ledger.__exit__

    def left(self: Ledger, *error: Any) -> None:
        leave(self, *error)
        moments = [(one.phase, one.event, one.block, [(m.bytes, sorted(m.kinds.items()), m.heap) for m in one.moments])
                   for one in self.segments]  # fmt: skip
        peaks = {name: [peak.bytes, dict(sorted(peak.kinds.items())), peak.heap] for name, peak in self.peaks.items()}
        work = {name: [one.flops, one.written] for name, one in self.work.items()}
        ledgers.append([peaks, work, hashlib.sha256(repr(moments).encode()).hexdigest()[:16]])

    Ledger.__exit__ = left  # type: ignore[method-assign]
    try:
        found = case()
    except Exception as error:  # of Lorakeet, or of transformers about a configuration
        found = f"{type(error).__name__}: {error}"
    finally:
        Ledger.__exit__ = leave  # type: ignore[method-assign]
    return {"plan": found, "ledgers": ledgers}


def in_order(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a plan with its ledgers in one order, without the FLOPs before a step: small copies of modules, which are
    compared once (models/fuse), take some.
    """
    ledgers = [
        [peaks, {name: one[1:] if name == BEGIN else one for name, one in work.items()}, digest]
        for peaks, work, digest in found.get("ledgers", ())
    ]
    return {**found, "ledgers": sorted(ledgers, key=json.dumps)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="plans with this word in their names")
    given = parser.parse_args(arguments)
    before = json.loads(given.file.read_text()) if given.file.is_file() else {}
    found, wrong = before.copy() if given.what == "record" else {}, 0
    for name, case in cases():
        if given.only not in name or name in found:  # what is recorded already
            continue
        start = time.process_time()
        found[name] = json.loads(json.dumps(numbers(case)))
        was, now = (in_order(one.get(name, {})) for one in (before, found))
        differs = given.what == "compare" and now != was
        print(f"{time.process_time() - start:6.2f} s  {name}{'  DIFFERS' if differs else ''}", flush=True)
        if given.what == "record":
            given.file.write_text(json.dumps(found))
        if differs:
            wrong += 1
            for part in (part for part in now if now[part] != was.get(part)):
                print(f"    {part}\n      was {was.get(part)}\n      is  {now[part]}")
    print(f"{len(found)} plans, {wrong} different" if given.what == "compare" else f"{len(found)} plans recorded")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
