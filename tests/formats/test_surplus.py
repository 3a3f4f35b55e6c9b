"""`formats.surplus`: ranks larger than the layer are said in one sentence, and its remedy loses nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from lorakeet.cli.main import main
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.formats.compare import compare_adapters
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.diffusion import kohya
from lorakeet.formats.peft import peft
from lorakeet.formats.surplus import surplus_rank
from lorakeet.workflows.merge import merge
from lorakeet.workflows.options import MergeOptions
from lorakeet.workflows.runs.open_adapter import open_adapter


def pair(rank: int, out: int, *inner: int, kind: str = "linear") -> Pair:
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(rank, *inner, generator=generator), torch.randn(out, rank, generator=generator)
    return Pair(A, B if len(inner) == 1 else B[..., None, None], 3.0 * rank, kind)  # type: ignore[arg-type]


def experts(rank: int, out: int, width: int) -> Pair:
    return Pair(torch.randn(3, rank, width), torch.randn(3, out, rank), 3.0 * rank, "experts")


def test_every_pair_is_judged_by_its_own_matrix() -> None:
    fits = {
        "a": pair(4, 4, 9), "c": pair(8, 8, 1, 3, 3, kind="conv2d"), "e": pair(5, 6, 5, kind="embedding"), "x": experts(4, 4, 7),
    }  # fmt: skip
    assert surplus_rank(Adapter(fits), "it") == ""
    wide = {
        "a": pair(4, 3, 9), "b": pair(4, 3, 9), "c": pair(10, 32, 1, 3, 3, kind="conv2d"),
        "e": pair(6, 6, 5, kind="embedding"), "x": experts(4, 7, 3), "ok": pair(2, 3, 9),
    }  # fmt: skip
    said = surplus_rank(Adapter(wide, base="base"), "it")
    assert said.startswith("it has a rank larger than the layer in 5 of 6 pairs: a, b (rank 4, 3 × 9); c (rank 10, 32 × 9)")
    assert "x (rank 4, 7 × 3)" in said and "ok" not in said
    assert said.endswith("lorakeet merge it --to adapter --rank 10 --out OUT")
    assert "--base MODEL" in surplus_rank(Adapter(wide), "it")


def test_it_is_said_once_at_every_reading_and_the_remedy_cuts_without_loss(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.k_proj"
    adapter = Adapter({path: pair(8, 4, 16), "model.layers.0.mlp.up_proj": pair(8, 24, 16)}, base="some/base")
    peft.write(adapter, tmp_path / "wide")
    heard: list[str] = []
    read_adapter(tmp_path / "wide", say=heard.append)
    open_adapter(tmp_path / "wide", say=heard.append)
    assert len(heard) == 2 and set(heard) == {surplus_rank(adapter, str(tmp_path / "wide"))}
    merge(MergeOptions((str(tmp_path / "wide"),), out=tmp_path / "cut", to="adapter", rank=8), console=Console(quiet=True))
    cut = read_adapter(tmp_path / "cut", say=heard.append)
    assert len(heard) == 2 and {name: held.rank for name, held in cut.pairs.items()} == {path: 4, "model.layers.0.mlp.up_proj": 8}
    assert compare_adapters(adapter, cut).worst < 1e-6
    peft.write(Adapter({path: pair(4, 4, 16)}, base="some/base"), tmp_path / "fits")
    read_adapter(tmp_path / "fits", say=heard.append)
    assert len(heard) == 2


def test_files_of_other_programs_are_read_with_it(tmp_path: Path) -> None:
    heard: list[str] = []
    narrow = Adapter({"unet.conv_out": pair(16, 4, 8, 3, 3, kind="conv2d")}, metadata={"sd_family": "sd1"})
    kohya.write(narrow, tmp_path / "a.safetensors", base=None)
    found = read_adapter(tmp_path / "a.safetensors", say=heard.append)
    assert found.pairs["unet.conv_out"].rank == 16 and "unet.conv_out (rank 16, 4 × 72)" in heard[-1]


def test_convert_keeps_it_with_a_base_too(tmp_path: Path, tiny_llama_folder: Path) -> None:
    wide = Adapter({"model.layers.0.self_attn.k_proj": pair(20, 16, 32)}, base="some/base")
    peft.write(wide, tmp_path / "wide")
    given = ["convert", str(tmp_path / "wide"), str(tmp_path / "out.gguf"), "--to", "gguf", "--base", str(tiny_llama_folder)]
    assert main(given) == 0
    assert read_adapter(tmp_path / "out.gguf", say=lambda _: None).pairs["model.layers.0.self_attn.k_proj"].rank == 20
