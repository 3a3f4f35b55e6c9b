"""Finding the adapter that a path means, and its format; every listed format is one that `convert --to` offers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorakeet.cli.main import main
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import DataError
from lorakeet.formats import mlx
from lorakeet.formats.adapter_format import AdapterFormat
from lorakeet.formats.compare import compare_adapters
from lorakeet.formats.detect import FORMATS, detect, format_of, read_adapter, surplus_rank
from lorakeet.formats.diffusion import kohya
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.peft import peft
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs.convert import Target
from lorakeet.verbs.merge import merge
from lorakeet.verbs.options import MergeOptions
from tiny.portable import llama_config

GOLDEN = Path(__file__).parents[1] / "golden"
KOHYA = "lora_unet_mid_block_resnets_0_conv1"


def test_a_folder_a_file_in_it_and_a_run_are_the_same_adapter(folder: Path) -> None:
    for path in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors", folder.parent):
        assert len(read_adapter(path).pairs) == 4


@pytest.mark.parametrize(
    ("name", "kind", "evidence"),
    [
        ("peft", "peft", "the folder holds adapter_model.safetensors"),
        ("mlx", "mlx", "the folder holds adapters.safetensors"),
        ("mlx/adapters.safetensors", "mlx", "the folder holds adapters.safetensors"),
        ("gguf.gguf", "gguf", "the file begins with GGUF"),
        ("kohya.safetensors", "kohya", r"\d+ of \d+ tensors are named like lora_"),
        ("diffusers.safetensors", "diffusers", r"tensors are named like (unet|text_encoder)\."),
        ("diffusers_spelled.safetensors", "diffusers", r"tensors are named like (unet|text_encoder)\."),
    ],
)
def test_real_files_are_distinguished(name: str, kind: str, evidence: str, tmp_path: Path) -> None:
    found = detect(GOLDEN / name)
    assert found.format == kind
    assert re.search(evidence, found.evidence)
    assert read_adapter(GOLDEN / name, base=open_base(llama_config(tmp_path))).pairs


def test_reads_what_peft_wrote() -> None:
    adapter = read_adapter(GOLDEN / "peft")
    expected = load_file(GOLDEN / "peft.delta.safetensors")
    assert adapter.pairs.keys() == expected.keys() and len({pair.scale for pair in adapter.pairs.values()}) == 3
    for path, delta in expected.items():
        torch.testing.assert_close(adapter.pairs[path].delta(), delta, atol=1e-6, rtol=1e-5)


def test_a_folder_with_one_adapter_file_means_that_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.safetensors").write_bytes((GOLDEN / "kohya.safetensors").read_bytes())
    assert compare_adapters(read_adapter(tmp_path / "one"), read_adapter(GOLDEN / "kohya.safetensors")).equal


def two_files(path: Path) -> None:
    path.mkdir()
    for name in ("a", "b"):
        save_file({f"{KOHYA}.alpha": torch.ones(1)}, path / f"{name}.safetensors")


def begun_run(path: Path) -> None:
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").touch()


def run_of_another_kind(path: Path) -> None:
    begun_run(path)
    (path / "adapter").mkdir()
    (path / "adapter" / "matrix.npy").touch()


def two_formats(path: Path) -> None:
    path.mkdir()
    for name in (mlx.MODEL_NAME, peft.MODEL_NAME):
        save_file({"a": torch.ones(1)}, path / name)


def mixed(path: Path) -> None:
    save_file({f"{KOHYA}.alpha": torch.ones(1), "unet.a.to_q.lora_A.weight": torch.ones(2, 2)}, path)


def hostile(header: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        raw = header.encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)

    return write


def spans(first: tuple[int, int], second: tuple[int, int]) -> str:
    names = (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight")
    both = zip(names, (first, second), strict=True)
    return json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": span} for name, span in both}) + " " * 16


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("nowhere", lambda path: None, r"does not exist; expected the folder of a run, of PEFT or of mlx-lm, or a \.safetensors"),
        ("old.bin", lambda path: path.write_bytes(b"\x80"), "is a pickle file, which can run code"),
        ("old.PT", lambda path: path.write_bytes(b"\x80"), "is a pickle file"),
        ("empty", lambda path: path.mkdir(), "holds no adapter: .* only nothing"),
        ("run", begun_run, "no adapter yet: .* finetune --resume .*run"),
        ("other", run_of_another_kind, r"has an adapter in the layout of its own kind of run, .* holds matrix\.npy\."),
        ("tuned", lambda path: (path.mkdir(), (path / "config.yaml").touch()), "holds no adapter: .* only config.yaml"),
        ("files", two_files, r"holds 2 adapter files \(a\.safetensors, b\.safetensors\); name one of them"),
        ("both", two_formats, r"holds two adapters: adapter_model\.safetensors of peft and adapters\.safetensors of mlx"),
        ("w.gguf", lambda path: path.write_bytes(b""), "is not a GGUF file: it does not begin with GGUF"),
        ("m.safetensors", mixed, r"mixes formats: 1 as in diffusers \(unet\.a.*; 1 as in kohya \(lora_unet_mid"),
        ("u.safetensors", lambda path: save_file({"conv.weight": torch.ones(2)}, path), r"format: .* called conv\.weight"),
        ("none.safetensors", lambda path: save_file({}, path), "its 0 tensors are called none at all"),
        ("p.safetensors", lambda path: save_file({"base_model.model.q.lora_A.weight": torch.ones(2)}, path),
         r"has tensors as in peft, but another name; rename it to adapter_model\.safetensors"),
        ("q.safetensors", lambda path: save_file({"model.q.lora_a": torch.ones(2)}, path), r"rename it to adapters\.safetensors"),
        ("cut.safetensors", lambda path: path.write_bytes((GOLDEN / "kohya.safetensors").read_bytes()[:-40]), "it was cut off"),
        ("half.safetensors", lambda path: path.write_bytes((GOLDEN / "kohya.safetensors").read_bytes()[:200]), "have been cut"),
        ("huge.safetensors", lambda path: path.write_bytes((2**63).to_bytes(8, "little") + b"{}"), "declares a header of 9,223"),
        ("shape.safetensors", hostile(spans((0, 8), (8, 16)).replace("[2]", "[4611686018427387904]")), "needs 18,446,744"),
        ("overlap.safetensors", hostile(spans((0, 8), (4, 12))), "overlaps another tensor"),
        ("hole.safetensors", hostile(spans((0, 8), (12, 20))), "leaves bytes before it"),
        ("negative.safetensors", hostile(spans((-8, 0), (0, 8))), "must be lists of whole numbers"),
        ("rows.jsonl", lambda path: path.write_text('{"text": "x"}\n' * 9), r"rows\.jsonl is no adapter: it begins with"),
        ("empty.txt", lambda path: path.write_bytes(b""), r"empty\.txt is no adapter.* Expected the folder of a run"),
        ("json.safetensors", hostile("[" * 100_000), "its header is not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_adapter(name: str, make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_adapter(tmp_path / name)


def pair(rank: int, out: int, *inner: int, kind: str = "linear") -> Pair:
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(rank, *inner, generator=generator), torch.randn(out, rank, generator=generator)
    return Pair(A, B if len(inner) == 1 else B[..., None, None], 3.0 * rank, kind)  # type: ignore[arg-type]


def experts(rank: int, out: int, width: int) -> Pair:
    return Pair(torch.randn(3, rank, width), torch.randn(3, out, rank), 3.0 * rank, "experts")


def test_every_pair_is_checked_by_its_own_matrix() -> None:
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


def test_a_scale_that_is_no_number_in_fp32_is_refused_whatever_the_format(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "kohya.safetensors")
    name = next(name for name in tensors if name.endswith(".alpha"))
    save_file(tensors | {name: torch.tensor(1e300, dtype=torch.float64)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"1 pairs whose scale is no finite number in fp32|NaN or infinite"):
        read_adapter(tmp_path / "a.safetensors", say=lambda line: None)


@pytest.mark.parametrize("alpha", [1e300, math.inf, math.nan])
def test_a_scale_that_a_format_lets_through_is_refused_here(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Adapter({"a": Pair(torch.ones(2, 3), torch.ones(3, 2), alpha)})
    monkeypatch.setattr(kohya, "read", lambda *given, **more: odd)
    with pytest.raises(DataError, match="1 pairs whose scale is no finite number in fp32"):
        read_adapter(GOLDEN / "kohya.safetensors", say=lambda line: None)


def test_it_is_said_once_at_every_reading_and_the_remedy_cuts_without_loss(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.k_proj"
    adapter = Adapter({path: pair(8, 4, 16), "model.layers.0.mlp.up_proj": pair(8, 24, 16)}, base="some/base")
    peft.write(adapter, tmp_path / "wide")
    heard: list[str] = []
    read_adapter(tmp_path / "wide", say=heard.append)
    open_adapter(tmp_path / "wide", say=heard.append)
    assert "not trained here" in heard.pop()
    assert len(heard) == 2 and set(heard) == {surplus_rank(adapter, str(tmp_path / "wide"))}
    merge(MergeOptions((str(tmp_path / "wide"),), out=tmp_path / "cut", to="adapter", rank=8), console=Console(quiet=True))
    cut = read_adapter(tmp_path / "cut", say=heard.append)
    assert len(heard) == 2 and {name: held.rank for name, held in cut.pairs.items()} == {path: 4, "model.layers.0.mlp.up_proj": 8}
    assert compare_adapters(adapter, cut).worst < 1e-6
    peft.write(Adapter({path: pair(4, 4, 16)}, base="some/base"), tmp_path / "fits")
    read_adapter(tmp_path / "fits", say=heard.append)
    assert len(heard) == 2


def test_convert_keeps_it_with_a_base_too(tmp_path: Path, tiny_llama_folder: Path) -> None:
    wide = Adapter({"model.layers.0.self_attn.k_proj": pair(20, 16, 32)}, base="some/base")
    peft.write(wide, tmp_path / "wide")
    given = ["convert", str(tmp_path / "wide"), str(tmp_path / "out.gguf"), "--to", "gguf", "--base", str(tiny_llama_folder)]
    assert main(given) == 0
    assert read_adapter(tmp_path / "out.gguf", say=lambda _: None).pairs["model.layers.0.self_attn.k_proj"].rank == 20


def test_the_names_are_the_choices_of_convert() -> None:
    assert sorted(one.NAME for one in FORMATS) == sorted(get_args(Target))


@pytest.mark.parametrize("module", FORMATS, ids=lambda one: str(one.NAME))
def test_a_format_is_a_folder_or_a_file(module: AdapterFormat) -> None:
    assert format_of(module.NAME) is module
    assert bool(module.WEIGHTS) != bool(module.SUFFIX)
    assert not module.owns("conv.weight")
