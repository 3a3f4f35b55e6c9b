"""A quantised model written again: other packed layers, everything else as it was, whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.export import repack_model
from lorakeet.export.repack_model import write_repacked
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.models.text.packed_layout import PackedLayout, read_layout
from lorakeet.quant.grids import requantise_like
from lorakeet.quant.packed import PackedBase
from lorakeet.workflows.options import QuantizeOptions
from lorakeet.workflows.quantize import quantize
from tiny.gguf_file import write_tiny_gguf
from tiny.runs import quiet, reviews, write_rows

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

    monkeypatch.setattr(repack_model.shutil, "copyfile", full)
    with pytest.raises(EnvironmentProblem, match=r"needs [\d,]+ bytes on the disk"):
        write_repacked(layout, changed(layout), tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []
