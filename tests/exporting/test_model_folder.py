"""A model folder written shard by shard: each part made once, little held, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.exporting import model_folder
from lorakeet.exporting.model_folder import TensorGroup, write_model, write_repacked
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.memory.spill import Spill
from lorakeet.models.text.packed_layout import PackedLayout, read_layout
from lorakeet.quant.grids import requantise_like
from lorakeet.quant.packed import PackedBase
from lorakeet.verbs.options import QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.gguf_file import write_tiny_gguf
from tiny.runs import quiet, reviews, write_rows


def parts_of(count: int, made: list[str]) -> list[TensorGroup]:
    """Parts of two tensors, 400 and 10 bytes."""

    def part(number: int) -> TensorGroup:
        tensors = {f"w{number}": torch.full((100,), float(number)), f"w{number}.code": torch.full((10,), number).byte()}

        def make() -> dict[str, Tensor]:
            made.append(f"w{number}")
            return tensors

        return TensorGroup({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, make)

    return [part(number) for number in range(count)]


def test_one_file_where_it_fits(tmp_path: Path) -> None:
    made: list[str] = []
    along = tmp_path / "tokenizer.json"
    along.write_text("{}")
    seen: list[tuple[int, int, str]] = []
    size = write_model(
        tmp_path / "out", parts_of(3, made), config={"a": 1}, along=[along], on_progress=lambda *step: seen.append(step)
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json"}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["w2"].eq(2).all() and tensors["w1.code"].dtype == torch.uint8 and len(tensors) == 6
    assert made == ["w0", "w1", "w2"] and [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size + 2


def test_shards_and_their_index(tmp_path: Path) -> None:
    write_model(tmp_path / "out", parts_of(5, []), config={}, shard_bytes=900)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 5 * 410
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


def test_tensors_that_wait_on_disk_make_the_same_file(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    write_model(tmp_path / "one", parts_of(4, []), config={})
    made: list[str] = []
    write_model(tmp_path / "other", parts_of(4, made), config={}, waiting=Spill(scratch))
    one, other = (tmp_path / name / "model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes() and len(made) == 4 and list(scratch.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="never overwritten"):
        write_model(tmp_path / "out", parts_of(1, []), config={})


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_full_disk_leaves_nothing_behind(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(2, [])
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    else:

        def refused() -> dict[str, Tensor]:
            raise OSError(errno.ENOSPC, "No space left on device")

        parts[1] = TensorGroup(parts[1].shapes, refused)
    with pytest.raises(EnvironmentProblem, match=r"needs [\d,]+ bytes"):
        write_model(tmp_path / "out", parts, config={})
    assert list(tmp_path.iterdir()) == []


CHANGED = "model.layers.1.self_attn.q_proj"


def silent(line: str) -> None:
    pass


def made(kind: str, dense: Path, folder: Path) -> Path:
    """A tiny quantised model."""
    if kind == "gguf":
        write_tiny_gguf(folder / "model.gguf", "Q4_0")
        return folder / "model.gguf"
    rows = write_rows(folder / "rows.jsonl", reviews(40))
    quantize(QuantizeOptions(str(dense), method=kind, out=folder / kind, group_size=16, calibration=str(rows)), console=quiet())  # type: ignore[arg-type]
    return folder / kind


def changed(layout: PackedLayout) -> dict[str, PackedBase]:
    """Every layer as it is but one, which is turned round."""
    bases = {path: read() for path, read in layout.layers.items()}
    return {**bases, CHANGED: requantise_like(bases[CHANGED], -bases[CHANGED].dense())}


@pytest.mark.parametrize("kind", ["gptq", "nf4", "gguf"])
def test_one_layer_changes_and_all_else_stays(
    kind: str, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    source = made(kind, tiny_llama_folder, tmp_path)
    layout = read_layout(str(source), silent)
    bases, out = changed(layout), tmp_path / ("out.gguf" if kind == "gguf" else "out")
    size = write_repacked(layout, bases, out)
    again = read_layout(str(out), silent)
    assert list(again.layers) == list(layout.layers)
    for path, read in again.layers.items():
        assert torch.equal(read().dense(), bases[path].dense())
    if kind == "gguf":
        assert size == source.stat().st_size == out.stat().st_size
        both = zip(GgufFile(source).tensors(), GgufFile(out).tensors(), strict=True)
        moved = [name for (name, old), (_, new) in both if (old.data != new.data).any()]
        assert moved == ["blk.1.attn_q.weight"]
        return
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(old) == set(new) and {name for name in old if not torch.equal(old[name], new[name])} <= {
        name for name in old if name.startswith(CHANGED)
    }
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes() or name == "config.json"
    assert (out / "config.json").read_text().split() == (source / "config.json").read_text().split()


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    layout = read_layout(str(made("gguf", tmp_path, tmp_path)), silent)
    with pytest.raises(ConfigError, match="exists already and is never overwritten"):
        write_repacked(layout, changed(layout), tmp_path / "model.gguf")

    def full(source: Path, out: Path) -> None:
        out.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_folder.shutil, "copyfile", full)
    with pytest.raises(EnvironmentProblem, match=r"needs [\d,]+ bytes on the disk"):
        write_repacked(layout, changed(layout), tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []
