"""Claim: GPTQ weights made here are as good as gptqmodel's on the same calibration rows, and its files are read to its numbers.

    python benchmarks/gptq_vs_gptqmodel.py --gptqmodel-python VENV/bin/python [--rows 64] [--judged 24] [--work DIR]

gptqmodel pins numpy, so it needs a virtual environment of its own: `pip install "gptqmodel>=7.6,<7.7" optimum` there.
Without it nothing is measured and the script exits with 2. Perplexities are no timings: a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from harness.machine import origin, write_result
from harness.processes import run
from rich.console import Console
from safetensors import safe_open

from lorakeet.config import read_run
from lorakeet.data.chat import Example
from lorakeet.data.prepare import load_dataset
from lorakeet.data.rows import Row
from lorakeet.models.generate.score import row_losses
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.gptq_blocks import layers_in_blocks, quantise_blocks, weight_of
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq import GptqBase, groups_in_order, quantise_to_nearest
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.verbs.options import QuantizeOptions
from lorakeet.verbs.quantize import write_gptq

RUN_FILE = Path(__file__).parents[1] / "examples" / "drug_reviews.yaml"
FILE_ROWS = 24  # with which a file is made to be read there
ALLOWED = 1.01  # our perplexity over gptqmodel's
THEIRS = Path(__file__).with_name("contenders") / "with_gptqmodel.py"


def examples(text: TextModel, rows: Sequence[Row], count: int, tokens: int) -> list[Example]:
    """The rows' texts joined and cut into `count` pieces of `tokens` tokens, every one of them a target."""
    ids: list[int] = []
    for row in rows:
        ids += [*text.tokenizer.encode(max((turn.free_text for turn in row.turns), key=len)), text.tokenizer.eos_token_id]
        if len(ids) >= count * tokens:
            break
    if len(ids) < count * tokens:
        raise SystemExit(f"the data has {len(ids)} tokens, fewer than {count}·{tokens}; take fewer")
    supervised = np.arange(tokens) > 0
    return [
        Example(np.array(ids[start : start + tokens], np.int64), supervised, str(start), None, False)
        for start in range(0, count * tokens, tokens)
    ]


def perplexity(text: TextModel, rows: Sequence[Example]) -> float:
    losses, targets = row_losses(text, rows, micro_tokens=1024)
    return float(np.exp(losses.sum() / targets.sum()))


def with_weights(path: str, weights: dict[str, torch.Tensor]) -> TextModel:
    text = loaded(path)
    for layer, weight in weights.items():
        text.model.get_submodule(layer).weight.data = weight
    return text


def loaded(path: str) -> TextModel:
    return load_text_model(ModelSpec(path=path, dtype="float32", products="float32"), say=lambda line: None)


def ours(path: str, rows: Sequence[Example], layout: GptqLayout, console: Console) -> dict[str, torch.Tensor]:
    """Every layer as Lorakeet's GPTQ leaves it."""
    found: dict[str, torch.Tensor] = {}
    for block in quantise_blocks(loaded(path), rows, layout):
        console.print(f"block {block.number + 1} of {block.count}: outputs moved by {max(block.errors.values()):.2%} at most")
        found |= {layer: base.dense() for layer, base in block.layers.items()}
    return found


def nearest(path: str, layout: GptqLayout) -> dict[str, torch.Tensor]:
    """Every layer rounded to the nearest."""
    text = loaded(path)
    found: dict[str, torch.Tensor] = {}
    for layer, module in layers_in_blocks(text.model, text.name).items():
        weight = weight_of(module)
        g_idx = groups_in_order(weight.shape[1], layout.group_size)
        codes, grid = quantise_to_nearest(weight, layout.bits, layout.sym, g_idx, int(g_idx.max()) + 1)
        found[layer] = GptqBase.of(codes, grid, bits=layout.bits, sym=layout.sym).dense()
    return found


def differing(text: TextModel, dense: Path) -> tuple[int, int]:
    """How many layers we unpack to other fp16 numbers than gptqmodel, and how many there are."""
    bases = {path: module for path, module in text.model.named_modules() if isinstance(module, GptqBase)}
    with safe_open(dense, "pt") as file:
        names = list(file.keys())
        wrong = sum(not torch.equal(bases[f"{name}.base"].dense().half(), file.get_tensor(name)) for name in names)
    return wrong, len(names)


def file_differences(source: str, rows: Sequence[Row], layout: GptqLayout, python: str, folder: Path) -> tuple[int, int]:
    """How many layers of a folder that `lorakeet quantize` made gptqmodel unpacks to other numbers than we, of how many."""
    texts, made = folder / "texts.jsonl", folder / "made"
    words = [max((turn.free_text for turn in row.turns), key=len) for row in rows[:FILE_ROWS]]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in words), encoding="utf-8")
    limits = {"calibration_rows": FILE_ROWS, "calibration_tokens": 512}
    write_gptq(QuantizeOptions(source, "gptq", made, calibration=str(texts), **limits), layout, Console())
    run([python, str(THEIRS), "--dense", str(made), str(folder / "made_dense")], log=folder / "log")
    return differing(loaded(str(made)), folder / "made_dense")


def measured(given: argparse.Namespace, work: Path, console: Console) -> dict[str, Any]:
    """Everything that the claim needs; what lies in `work` from an earlier, broken off run of the same settings is taken over."""
    note = work / "found.json"
    found: dict[str, Any] = json.loads(note.read_text()) if note.is_file() else {}

    def part(name: str, make: Callable[[], Any]) -> Any:
        if name not in found:
            found[name] = make()
            note.write_text(json.dumps(found))
            console.print(f"{name}: {found[name]}")
        return found[name]

    config = read_run(RUN_FILE, {"data.limit": "20000"})
    data, dense = load_dataset(config.data), loaded(config.model.path)
    rows = examples(dense, data.train, given.rows, given.tokens)
    judged = examples(dense, data.test, given.judged, given.tokens)
    layout, source = GptqLayout(given.bits, given.group_size, given.desc_act), str(dense.source)
    python = os.path.abspath(given.gptqmodel_python)  # not resolved: a link is what makes it a virtual environment's
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

    def theirs() -> float:
        (work / "ids.json").write_text(json.dumps([row.ids.tolist() for row in rows]))
        words = [str(THEIRS), source, str(work / "ids.json"), str(work / "out"), str(given.bits), str(given.group_size)]
        run([python, *words, "true" if given.desc_act else "false"], log=work / "log")
        return perplexity(loaded(str(work / "out")), judged)

    def their_file() -> tuple[int, int]:
        run([python, str(THEIRS), "--dense", str(work / "out"), str(work / "dense")], log=work / "log")
        return differing(loaded(str(work / "out")), work / "dense")

    del dense  # one model at a time
    part("dense", lambda: perplexity(loaded(source), judged))
    part("nearest", lambda: perplexity(with_weights(source, nearest(source, layout)), judged))
    part("lorakeet", lambda: perplexity(with_weights(source, ours(source, rows, layout, console)), judged))
    part("gptqmodel", theirs)
    part("their file, read here: layers that differ, of", their_file)
    part("our file, read there: layers that differ, of", lambda: file_differences(source, data.train, layout, python, work))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gptqmodel-python", help="the Python of an environment with gptqmodel; needed")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each row")
    parser.add_argument("--judged", type=int, default=24, help="rows on which the perplexity is measured")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder that keeps what is done, so that a broken off run goes on")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    if given.gptqmodel_python is None:
        print("NOT RUN: give --gptqmodel-python, the Python of an environment with gptqmodel. Nothing was measured.")
        return 2
    about, console = origin(), Console()
    with TemporaryDirectory() as name:
        work = given.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        found = measured(given, work, console)
    for way in ("dense", "nearest", "lorakeet", "gptqmodel"):
        print(f"{way:12} perplexity {found[way]:.3f}  ({found[way] / found['dense'] - 1:+.1%})")
    files = {name: tuple(value) for name, value in found.items() if "layers" in name}
    for name, (wrong, layers) in files.items():
        print(f"{name} {layers}: {wrong}")
    kept = found["lorakeet"] <= ALLOWED * found["gptqmodel"] and not any(wrong for wrong, _ in files.values())
    print(f"within 1 % of gptqmodel's, and files read to the same numbers both ways: {'yes' if kept else 'NO'}")
    settings = {key: str(value) for key, value in vars(given).items() if key not in ("results", "gptqmodel_python", "work")}
    content = {**found, "claim_kept": kept, "settings": settings}
    print(f"Written: {write_result('gptq_vs_gptqmodel', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
