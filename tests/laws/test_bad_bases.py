"""Bad bases and budgets at the command line: one message with file, tensor, value and remedy; exit code 2; nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.cli.main import main
from lorakeet.memory.budget import Budget
from lorakeet.runs.residency import Residency, Way
from tiny.gguf_file import write_tiny_gguf
from tiny.models import save_tiny_llama
from tiny.refusals import Bench
from tiny.runs import reviews, write_rows

QUANTIZE = {"": [], "nf4": ["--model.quantize", "nf4"]}  # int8 goes the same way
UP, NORM, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def bench(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    write_rows(tmp_path / "rows.jsonl", reviews(30))
    return Bench(tmp_path, tiny_llama_folder, capsys)


@pytest.fixture
def streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """From when it is called on every run streams its blocks, from a store in the folder that it returns."""

    def begin() -> Path:
        store = tmp_path.parent / f"{tmp_path.name}-store"
        residency = Residency(Budget.parse("8GiB"), Way(streamed=True), folder=store)
        monkeypatch.setattr("lorakeet.kinds.text.assemble.fit_text_run", lambda *_: residency)
        return store

    return begin


def change(folder: Path, changes: dict[str, Callable[[Tensor], Tensor] | None]) -> None:
    """Changes tensors of a saved model, or leaves them out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, how in changes.items():
        was = tensors.pop(name)
        if how is not None:
            tensors[name] = how(was).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def with_nan(weight: Tensor) -> Tensor:
    return weight.index_fill(0, torch.tensor([3]), float("nan"))


DAMAGES: dict[str, tuple[dict[str, Callable[[Tensor], Tensor] | None], list[str]]] = {
    "other shapes": (
        {UP: lambda w: w[:5], NORM: lambda w: w[:7], EMBEDDING: lambda w: w.t()},
        ["has 3 weights of other shapes than its config.json says", f"{UP} is 5×32, expected 48×32", f"{NORM} is 7, expected 32",
         EMBEDDING, "fetch both again"],
    ),
    "a matrix that is a row": ({UP: lambda w: w[0]}, [f"{UP} is 32, expected 48×32", "fetch both again"]),
    "missing": ({UP: None, NORM: None}, ["lacks 2 weights of its 'llama' architecture", UP, NORM, "Fetch the model again"]),
    "no number": ({UP: with_nan}, [UP, "NaN or infinite", "Fetch"]),
    "no number in a norm": ({NORM: with_nan}, [NORM, "NaN or infinite", "Fetch"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("method", QUANTIZE)
def test_damaged_weights_are_named_however_they_are_loaded(
    bench: Bench, streaming: Callable[[], Path], method: str, streamed: bool, damage: str
) -> None:
    changes, words = DAMAGES[damage]
    model = save_tiny_llama(bench.folder / "model")
    change(model, changes)
    store = streaming() if streamed else None
    bench.refused(bench.finetune(*QUANTIZE[method], model=model), "model", *words)
    assert store is None or not store.exists() or not any(store.iterdir())


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("method", QUANTIZE)
def test_an_expert_of_another_size_is_named(bench: Bench, streaming: Callable[[], Path], method: str, streamed: bool) -> None:
    model = save_tiny_llama(bench.folder / "model", family="mixtral", tie_word_embeddings=False)
    file = model / "model.safetensors"
    names = [name for name in load_file(file) if ".experts.2." in name]
    change(model, {names[0]: lambda weight: weight[:5]})
    if streamed:
        streaming()
    bench.refused(bench.finetune(*QUANTIZE[method], model=model), names[0], "5×32", "etch")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lama", ["model_type is 'lama'", "Did you mean 'llama'?", "pip install --upgrade transformers"]),
        ("", ["names no model_type", "Fetch it again"]),
        ("vit", ["'vit', which does not write text", "Name a language model"]),
    ],
)
def test_a_model_type_that_cannot_be_used(bench: Bench, kind: str, words: list[str]) -> None:
    model = save_tiny_llama(bench.folder / "model")
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": kind}))
    for flags in QUANTIZE.values():
        bench.refused(bench.finetune(*flags, model=model), "config.json", *words)
    bench.refused(["quantize", str(model), "--method", "nf4", "--out", "packed"], "config.json", *words)


@pytest.fixture(scope="module")
def packed(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every way of packing that is written."""
    folder = tmp_path_factory.mktemp("packed")
    rows = write_rows(folder / "rows.jsonl", reviews(60))
    gptq = ["--group-size", "16", "--calibration", str(rows)]
    for method, flags in {"nf4": [], "int8": [], "gptq": gptq}.items():
        assert main(["quantize", str(tiny_llama_folder), "--method", method, *flags, "--out", str(folder / method)]) == 0
    return {method: folder / method for method in ("nf4", "int8", "gptq")}


Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("nf4", {f"{UP1}.weight.absmax": None, f"{Q0}.weight.quant_map": None}, ["absmax' is missing", "quant_map' is missing"]),
        ("nf4", {f"{UP1}.weight": lambda t: t[:9]}, [f"{UP1}.weight", "its packed is torch.uint8 (9,)", "quantised model again"]),
        ("nf4", {f"{UP1}.weight.nested_absmax": with_nan}, [f"{UP1}.weight.nested_absmax", "NaN or infinite"]),
        ("nf4", {NORM: lambda t: t[:9]}, [f"{NORM} is 9, expected 32", "fetch both again"]),
        ("nf4", {NORM: None}, [f"lacks 1 weights of its 'llama' architecture: {NORM}"]),
        ("int8", {f"{UP1}.weight": lambda t: t[:64]}, [f"{UP1}.weight", "(64, 1) with 48 scales"]),
        ("int8", {f"{UP1}.weight_scale": lambda t: t[:24]}, [f"{UP1}.weight is 24×64, expected 48×32", "fetch both again"]),
        ("int8", {f"{UP1}.weight_scale": with_nan}, [f"{UP1}.weight_scale", "NaN or infinite"]),
        ("gptq", {f"{UP1}.qweight": lambda t: t[:3], f"{Q0}.scales": lambda t: t[:, :5]},
         ["(2 problems)", "'model.layers.1.mlp.up_proj.qweight' is int32 (3, 48)", f"{Q0}.scales", "lorakeet quantize"]),
        ("gptq", {f"{UP1}.scales": with_nan}, [f"{UP1}.scales", "NaN or infinite"]),
        ("gptq", {f"{UP1}.qzeros": None}, ["model.safetensors", "'model.layers.1.mlp.up_proj.qzeros' is missing", "again"]),
        ("gptq", {f"{UP1}.g_idx": lambda t: t + 5}, [f"{UP1}.g_idx", "names groups 5 to", "there are 2"]),
    ],
)  # fmt: skip
def test_damaged_packed_folders_are_named(
    bench: Bench, streaming: Any, packed: dict[str, Path], streamed: bool, method: str, changes: Any, words: list[str]
) -> None:
    shutil.copytree(packed[method], bench.folder / "model")
    ends = {name: how for name, how in changes.items() if how is with_nan}
    change(bench.folder / "model", {**changes, **{name: lambda t: torch.full_like(t, float("nan")) for name in ends}})
    store = streaming() if streamed else None
    bench.refused(bench.finetune(model="model"), *words)
    assert store is None or not store.exists() or not any(store.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 5}, ["bits is 5; expected one of 2, 3, 4, 8"]),
        ({"bits": None}, ["bits is None"]),
        ({"group_size": 0}, ["group_size is 0", "-1 for the whole row"]),
        ({"checkpoint_format": "marlin"}, ["'marlin'", "readable are gptq and gptq_v2"]),
        ({"desc_act": True}, ["(2 problems)", f"'{Q0}.g_idx' is missing", f"'{UP1}.g_idx' is missing", "desc_act is true"]),
    ],
    ids=str,
)
def test_gptq_settings_that_cannot_be_used(bench: Bench, packed: dict[str, Path], settings: Any, words: list[str]) -> None:
    model = Path(shutil.copytree(packed["gptq"], bench.folder / "model"))
    change(model, {f"{Q0}.g_idx": None, f"{UP1}.g_idx": None})
    assert main(bench.finetune("--dry-run", model=model)) == 0, "without desc_act the groups lie in order"
    file = model / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= settings
    file.write_text(json.dumps(config))
    bench.refused(bench.finetune(model=model), str(model), *words)


@pytest.mark.parametrize("flags", [["--model.quantize", "gguf"], []], ids=["blocks", "dense"])
@pytest.mark.parametrize("cut", [100, 5000, -100])
def test_a_truncated_gguf_file(bench: Bench, cut: int, flags: list[str]) -> None:
    write_tiny_gguf(bench.folder / "tiny.gguf", "Q8_0")
    whole = (bench.folder / "tiny.gguf").read_bytes()
    bench.write("tiny.gguf", whole[:cut])
    for command in (bench.finetune(*flags, model="tiny.gguf"), ["plan", "--model", "tiny.gguf", *flags]):
        bench.refused(command, "tiny.gguf", "cut off", "etch")


def test_a_gguf_file_of_a_type_that_is_not_trained_on(bench: Bench) -> None:
    write_tiny_gguf(bench.folder / "tiny.gguf", "TQ2_0", hidden_size=256, intermediate_size=256)
    words = ["blk.0.attn_q.weight is TQ2_0", "blk.1.ffn_down.weight is TQ2_0", "Q4_K"]
    bench.refused(bench.finetune("--model.quantize", "gguf", model="tiny.gguf"), *words)


def test_too_few_calibration_tokens(bench: Bench) -> None:
    bench.write("few.jsonl", [{"text": "a b"}])
    words = ["quantize", str(bench.model), "--method", "gptq", "--group-size", "16", "--out", "gptq", "--calibration"]
    bench.refused([*words, "few.jsonl"], "tokens, but the widest layer has 48 inputs", "Give more or longer rows")
    bench.refused([*words, bench.write("empty.jsonl", "")], "empty.jsonl has no rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("2", ["memory is '2', without a unit", "such as 2GiB"]),
        ("-2GiB", ["memory is '-2GiB'", "above 0"]),
        ("0GiB", ["memory is '0GiB'", "above 0"]),
        ("2 parsec", ["'parsec' is no unit of memory", "GiB"]),
        ("much", ["memory is 'much'", "such as 2GiB"]),
        ("64MiB", ["memory budget is 64MiB, but this run takes at least", "Raise the budget"]),
    ],
)
def test_a_budget_that_cannot_be_kept(bench: Bench, budget: str, words: list[str]) -> None:
    bench.refused(bench.finetune(f"--memory.budget={budget}"), *words)


def test_a_store_of_another_model(bench: Bench, streaming: Callable[[], Path]) -> None:
    store = streaming()
    assert main(bench.finetune("--dry-run")) == 0
    (path,) = store.iterdir()
    other = save_tiny_llama(bench.folder / "other" / bench.model.name, seed=1)
    assert main(bench.finetune("--dry-run", model=other)) == 0
    stolen = next(file for file in store.iterdir() if file != path)
    stolen.write_bytes(path.read_bytes())
    before = {file: file.read_bytes() for file in store.iterdir()}
    bench.refused(bench.finetune(model=other), str(stolen), "holds another model", "Delete it")
    stolen.write_bytes(path.read_bytes()[:-100])
    bench.refused(bench.finetune(model=other), str(stolen), "is damaged", "Delete it")
    assert path.read_bytes() == before[path]
