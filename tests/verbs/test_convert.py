"""`lorakeet convert`: what it prints, what it refuses, and that nothing half-written is left."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorakeet.cli.main import main
from lorakeet.config import dump_yaml, read_run
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed
from lorakeet.formats import mlx
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.diffusion import diffusers, kohya
from lorakeet.formats.peft import peft
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions, QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.adapters import random_adapter
from tiny.gguf_file import write_tiny_gguf
from tiny.models import tiny_model
from tiny.portable import image_adapter, llama_config, text_adapter
from tiny.runs import quiet, reviews, tree, write_rows

GOLDEN = Path(__file__).parents[1] / "golden"


def test_says_what_was_written_and_proves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft.write(text_adapter(), tmp_path / "in")
    config = llama_config(tmp_path)
    command = ["convert", str(tmp_path / "in"), str(tmp_path / "out.gguf"), "--to", "gguf", "--base", str(config), "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["from"], result["to"], result["pairs"]) == ("peft", "gguf", 14) and set(result["ranks"]) == {"2", "3", "4"}
    assert 0 < result["largest_relative_difference"] <= 1e-6
    assert "Read back: the effective ΔW of all 14 pairs equal to" in captured.err
    assert "… and 6 more pairs" in captured.err and "rank 2 (" in captured.err and "is peft: the folder holds" in captured.err


def test_a_loha_file_becomes_pairs_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{key}.{name}": torch.randn(shape) for name, shape in shapes.items()} | {f"{key}.alpha": torch.tensor(2.0)},
              tmp_path / "loha.safetensors")  # fmt: skip
    command = ["convert", str(tmp_path / "loha.safetensors"), str(tmp_path / "out.safetensors"), "--to", "kohya"]
    assert main(command) == 2 and "--rank 16, or --error 0.01" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--error", "0.00001"]) == 0
    assert "LoHa compressed to rank 4, relative error" in capsys.readouterr().out
    slots = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(load_file(tmp_path / "out.safetensors")) == {f"{key}.{slot}" for slot in slots}


def test_a_pair_that_changes_nothing_may_go_and_is_named(tmp_path: Path) -> None:
    names = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    pairs = {name: Pair(torch.randn(2, 3072), torch.randn(3072, 2), 2.0) for name in names}
    pairs[names[1]] = replace(pairs[names[1]], B=torch.zeros(3072, 2))
    diffusers.write(Adapter(pairs), tmp_path / "in.safetensors")
    done = convert(
        ConvertOptions(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="kohya"), console=Console(quiet=True)
    )
    [note] = [note for note in done.notes if "change nothing" in note]
    assert note.startswith("1 pairs") and names[1] in note
    assert kohya.read(tmp_path / "out.safetensors").pairs.keys() == {names[0], *names[2:]}


@pytest.mark.parametrize("kind", ["folder", "gguf", "gptq"])
def test_a_run_goes_to_gguf_with_its_own_base(kind: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = tiny_llama_folder
    if kind == "gguf":
        base = tmp_path / "base.gguf"
        write_tiny_gguf(base)
    if kind == "gptq":
        rows = write_rows(tmp_path / "rows.jsonl", reviews(60))
        base = tmp_path / "base"
        options = QuantizeOptions(str(tiny_llama_folder), method="gptq", out=base, group_size=16, calibration=str(rows))
        quantize(options, console=quiet())
    run = tmp_path / "run"
    peft.write(random_adapter(tiny_model("llama"), "q_proj"), run / "adapter")
    (run / "config.yaml").write_text(dump_yaml(read_run(None, {"model": str(base), "data.train": "rows.jsonl"})))
    for source, out in ((run, "out.gguf"), (run / "adapter", "same.gguf")):
        done = convert(ConvertOptions(source, tmp_path / out, to="gguf", uncertified=True), console=Console(quiet=True))
        assert f"The base is {base}, on which {run} was trained; --base would name another one." in done.notes
    config = tiny_llama_folder / "config.json"
    options = ConvertOptions(run, tmp_path / "named.gguf", to="gguf", base=config, uncertified=True)
    named = convert(options, console=Console(quiet=True))
    assert not any("The base is" in note for note in named.notes)
    written = [(tmp_path / name).read_bytes() for name in ("out.gguf", "same.gguf", "named.gguf")]
    assert written[0] == written[1] == written[2]


def test_without_a_base_on_this_machine_it_must_be_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    peft.write(text_adapter(), run / "adapter")
    (run / "config.yaml").write_text(dump_yaml(read_run(None, {"model": str(tmp_path / "gone"), "data.train": "rows.jsonl"})))
    with pytest.raises(ConfigError, match="name the base: --base FOLDER"):
        convert(ConvertOptions(run, tmp_path / "out.gguf", to="gguf", uncertified=True), console=Console(quiet=True))


def test_dora_goes_to_gguf_folded_on_request(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    peft.write(random_adapter(model, "q_proj", dora=True), tmp_path / "in")
    done = convert(
        ConvertOptions(tmp_path / "in", tmp_path / "out.gguf", to="gguf", base=tmp_path / "base", rank=8),
        console=Console(quiet=True),
    )
    assert len([note for note in done.notes if "DoRA folded into a plain pair of rank 8" in note]) == 2
    assert read_adapter(tmp_path / "out.gguf").pairs.keys() == done.adapter.pairs.keys()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with one adapter of each sort."""
    peft.write(text_adapter(), tmp_path / "text")
    peft.write(text_adapter(dora=True), tmp_path / "dora")
    peft.write(Adapter(text_adapter().pairs, extras={"lm_head.weight": torch.ones(4, 4)}), tmp_path / "extras")
    peft.write(random_adapter(tiny_model("mixtral"), "gate_up_proj"), tmp_path / "experts")
    kohya.write(image_adapter(), tmp_path / "image.safetensors")
    llama_config(tmp_path)
    model = tiny_model("llama", intermediate_size=3)
    model.save_pretrained(tmp_path / "narrow")
    (tmp_path / "there.gguf").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("text there.gguf --to gguf --base llama.json", ["there.gguf exists already and is never overwritten"]),
        ("text out --to gguf --base llama.json", ["gguf is a single file", "out.gguf"]),
        ("text out.gguf --to mlx", ["mlx is a folder", "expected a name without .gguf"]),
        ("text out.gguf --to gguf", ["--base FOLDER or its config.json"]),
        ("dora out.gguf --to gguf --base llama.json", ["cannot hold DoRA's magnitudes", "model.layers.0", "--rank N"]),
        ("dora out.gguf --to gguf --base llama.json --rank 8", ["can only be folded with the weights of the base"]),
        ("extras out --to mlx", ["modules_to_save): lm_head.weight", "lorakeet merge"]),
        ("experts out --to mlx", ["kind experts", "mlp.experts.gate_up_proj"]),
        ("text out.safetensors --to kohya", ["is no module of Stable Diffusion", "14 problems"]),
        ("text out.safetensors --to diffusers", ["belong to no component"]),
        ("image.safetensors out --to mlx", ["conv2d"]),
        ("text out --to mlx --base narrow", ["is a pair for a weight"]),
        ("gone out --to mlx", ["gone does not exist"]),
        ("text out --to onnx", ["'onnx'", "peft"]),
        ("text out --to mlx --rank 0", ["--rank is 0"]),
    ],
)
def test_what_is_refused_in_one_message_and_leaves_nothing(
    command: str, words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before, names = tree(place), sorted(place.rglob("*"))
    assert main(["convert", *command.split()]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("Error: ") == 1 and "Traceback" not in said
    for word in words:
        assert word in said
    assert tree(place) == before and sorted(place.rglob("*")) == names


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "diffusers"])
def test_a_full_disk_leaves_nothing(to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = GOLDEN / ("kohya.safetensors" if to in ("kohya", "diffusers") else "peft")
    out = tmp_path / ("out.safetensors" if to in ("kohya", "diffusers") else "out")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentProblem, match=r"out.* could not be written: the disk .* is full"):
        convert(ConvertOptions(source, out, to=to), console=Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["scale", "dropped", "magnitude"])
def test_a_writer_that_errs_is_caught_and_its_file_not_kept(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft.write(text_adapter(dora=True), tmp_path / "in")
    right = mlx.write

    def wrong(adapter: Adapter, folder: Path, **_: object) -> None:
        right(adapter, folder)
        tensors = load_file(folder / mlx.MODEL_NAME)
        name = "model.layers.1.mlp.up_proj"
        if fault == "scale":
            tensors[f"{name}.lora_b"] *= 1.00001
        elif fault == "magnitude":
            tensors[f"{name}.m"] *= 1.00001
        else:
            tensors = {key: value for key, value in tensors.items() if not key.startswith(name)}
        save_file(tensors, folder / mlx.MODEL_NAME)

    monkeypatch.setattr(mlx, "write", wrong)
    with pytest.raises(VerificationFailed, match=r"so .*out was not kept: .*model\.layers\.1\.mlp\.up_proj"):
        convert(ConvertOptions(tmp_path / "in", tmp_path / "out", to="mlx"), console=Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_file_that_looks_like_another_format_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kohya, "write", lambda adapter, path, **_: diffusers.write(adapter, path))
    with pytest.raises(VerificationFailed, match="written as kohya looks like diffusers"):
        convert(
            ConvertOptions(GOLDEN / "kohya.safetensors", tmp_path / "out.safetensors", to="kohya"), console=Console(quiet=True)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_rank_for_what_is_a_pair_already_is_refused_with_what_cuts_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft.write(text_adapter(), tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "mlx", "--rank", "2"]) == 2
    assert "every change in" in (said := capsys.readouterr().err) and "lorakeet merge" in said
    assert not (tmp_path / "out").exists()
    cut = ["merge", str(tmp_path / "in"), "--to", "adapter", "--rank", "2", "--out", str(tmp_path / "cut")]
    assert main(cut) == 0 and {pair.rank for pair in read_adapter(tmp_path / "cut").pairs.values()} == {2}
