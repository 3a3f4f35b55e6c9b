"""A merge into a quantised model within a budget: the same bytes each way, planned against held, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn

from lorakeet.data.prepare import load_dataset
from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed
from lorakeet.memory.allocator import slack
from lorakeet.memory.budget import BETWEEN_PROCESSES, Budget
from lorakeet.models.modules import find
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.packed_layout import read_layout
from lorakeet.planning import fit, packed_merge
from lorakeet.planning.check import FP32
from lorakeet.planning.packed_merge import (
    SPILLED,
    STREAMED,
    PackedMergeJob,
    PackedMerging,
    fit_packed_merge,
    outlined_grid,
)
from lorakeet.quant import gguf_codes
from lorakeet.quant.construct import empty_base
from lorakeet.quant.gguf_codes import HIGHEST
from lorakeet.quant.grids import FixedGrid, Nf4Grid, UniformGrid, grid_of
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase
from lorakeet.runs.open_adapter import Opened, open_adapter
from lorakeet.runs.output_paths import folder_above
from lorakeet.runs.residency import RESIDENT, MemoryPlan, Residency, Way, require_planned_attention
from lorakeet.verbs.merge import merge
from lorakeet.verbs.merges import into_packed as merge_packed
from lorakeet.verbs.merges import packing_steps
from lorakeet.verbs.options import MergeOptions, QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.gguf_file import write_tiny_gguf
from tiny.held import HeldBytes, counted_from
from tiny.memory_plans import same_runtime
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, run, write_rows

pytestmark = pytest.mark.slow  # they share what takes seconds to make

HIDDEN, INNER = 128, 384
WIDE = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
FEW_ROWS: dict[str, Any] = {"into": "packed", "keep": 1e-6, "calibration_rows": 12}
WAYS = [RESIDENT, STREAMED, SPILLED]
NAMES = ["resident", "streamed", "spilled"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs over six blocks, of which a plan rehearses a few: on a dense model, and on its NF4 form."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_llama(folder / "model", num_hidden_layers=6)
    data = write_rows(folder / "rows.jsonl", reviews(60))
    quantize(QuantizeOptions(str(model), method="nf4", out=folder / "nf4"), console=quiet())
    quantize(
        QuantizeOptions(str(model), method="gptq", out=folder / "gptq", group_size=16, calibration=str(data)), console=quiet()
    )
    run(folder / "nf4", data, folder / "on_nf4", {"train.steps": 2})
    run(model, data, folder / "on_dense", {"train.steps": 8})
    return folder


@pytest.fixture(scope="module")
def wide(runs: Path) -> Path:
    """Runs over three wide blocks, whose tensors are most of what is held: on a dense model, and on its NF4 form."""
    folder, data, settings = runs / "wide", runs / "rows.jsonl", {"train.steps": 8}
    model = save_tiny_llama(folder / "model", **WIDE)
    more = write_rows(folder / "more.jsonl", reviews(90))
    quantize(QuantizeOptions(str(model), method="nf4", out=folder / "nf4"), console=quiet())
    quantize(
        QuantizeOptions(str(model), method="gptq", out=folder / "gptq", group_size=64, calibration=str(more)), console=quiet()
    )
    run(folder / "nf4", data, folder / "on_nf4", settings)
    run(model, data, folder / "on_dense", settings)
    return folder


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tensors are planned."""
    same_runtime(monkeypatch, -slack(0))
    monkeypatch.setattr(packed_merge, "TOKENIZER_ENTRY", 0)
    monkeypatch.setattr(packed_merge, "INTERVALS", 0)


@pytest.fixture
def going(monkeypatch: pytest.MonkeyPatch) -> Callable[[Way], list[int]]:
    """Leaves this way alone; what is planned for it is in the list afterwards."""
    real = PackedMerging.plan

    def going(wanted: Way) -> list[int]:
        planned: list[int] = []

        def plan(merging: PackedMerging, way: Way) -> MemoryPlan:
            planned.append((found := real(merging, way)).peak)
            return found

        monkeypatch.setattr(PackedMerging, "ways", lambda merging, budget: iter([wanted]))
        monkeypatch.setattr(PackedMerging, "plan", plan)
        return planned

    return going


def contents(out: Path) -> dict[str, bytes]:
    """What was written, the certificate aside, which names the folder."""
    files = [path for path in out.iterdir() if path.name != "certificate.json"] if out.is_dir() else [out]
    return {path.name.replace(out.name, "out"): path.read_bytes() for path in files}


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize(
    ("base", "like", "ways"), [("on_dense", "gptq", WAYS), ("on_nf4", None, [SPILLED])]
)
def test_the_same_bytes_are_written_each_way(
    base: str, like: str | None, ways: list[Way], runs: Path, going: Any, tmp_path: Path
) -> None:
    """And the same shares survive, number by number. A spilled merge streams too, so it stands for both on the other bases."""
    words: dict[str, Any] = {**FEW_ROWS, "like": str(runs / like) if like else None}
    free = merge(MergeOptions((str(runs / base),), out=tmp_path / "free", **words), console=quiet())
    for way in ways:
        going(way)
        out = tmp_path / f"way{way.streamed + way.spilled}"
        merged = merge(MergeOptions((str(runs / base),), out=out, memory="8GiB", **words), console=quiet())
        assert contents(out) == contents(tmp_path / "free")
        assert merged.surviving == free.surviving
    written = {"free", *(f"way{way.streamed + way.spilled}" for way in ways)}
    assert {path.name for path in tmp_path.iterdir()} == written


@pytest.mark.usefixtures("no_runtime")
def test_a_gguf_file_is_patched_to_the_same_bytes(
    runs: Path, going: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0", hidden_size=64, intermediate_size=64)
    run(tmp_path / "tiny.gguf", runs / "rows.jsonl", tmp_path / "run", {"train.steps": 2})  # on the dense copy
    words: dict[str, Any] = {**FEW_ROWS, "like": str(tmp_path / "tiny.gguf")}
    merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "free.gguf", **words), console=quiet())
    going(SPILLED)
    merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "kept.gguf", memory="8GiB", **words), console=quiet())
    assert (tmp_path / "kept.gguf").read_bytes() == (tmp_path / "free.gguf").read_bytes()
    assert (tmp_path / "kept.gguf").read_bytes() != (tmp_path / "tiny.gguf").read_bytes()
    laid_out = [path.name.rpartition("-")[0].rpartition("-")[0] for path in (tmp_path / "cache" / "gguf-packed").iterdir()]
    assert laid_out == ["tiny"], "what was written is laid out to be measured, and that copy goes"


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldBytes]:
    """Counts tensors from the first model of a merge on; micro-batches are small, as there are few tokens."""
    for module in (merge_packed, packing_steps):
        monkeypatch.setattr(module, "MICRO_TOKENS", 256)
    with counted_from(packing_steps.Merging, "measure_live") as counting:
        yield counting


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize(
    ("way", "base"), [(RESIDENT, "on_nf4"), (RESIDENT, "on_dense"), (SPILLED, "on_dense")], ids=["nf4", "dense", "dense spilled"]
)
def test_memory_in_use_is_what_is_planned(way: Way, base: str, wide: Path, going: Any, held: HeldBytes, tmp_path: Path) -> None:
    """Not more, but for a matrix that Python may not have let go yet, and not half as much again. A spilled merge streams too,
    so on NF4 it stands for both."""
    planned = going(way)
    words: dict[str, Any] = {"into": "packed", "keep": 1e-6, "like": str(wide / "nf4")}
    with suppress(VerificationFailed):  # how much survives of such an adapter is chance
        merge(
            MergeOptions((str(wide / base),), out=tmp_path / "out", memory="8GiB", calibration_rows=24, **words), console=quiet()
        )
    assert held.peak - FP32 * HIDDEN * HIDDEN <= planned[0] <= 1.5 * held.peak


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize("like", ["gptq"])
def test_what_a_finish_holds_is_what_is_planned(
    like: str, wide: Path, held: HeldBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole merge with its steps; the numbers before rounding of all layers are most of it."""
    planned, real = [], PackedMerging.plan

    def noted(merging: PackedMerging, way: Way) -> MemoryPlan:
        planned.append(found := real(merging, way))
        return found

    monkeypatch.setattr(PackedMerging, "plan", noted)
    words: dict[str, Any] = {"into": "packed", "keep": 1e-6, "like": str(wide / like)}
    with suppress(VerificationFailed):
        merge(
            MergeOptions(
                (str(wide / "on_dense"),), out=tmp_path / "out", memory="8GiB", finish_steps=3, calibration_rows=26, **words
            ),
            console=quiet(),
        )
    assert planned[0].highest.name == "finish"
    assert held.peak <= planned[0].peak <= 1.3 * held.peak


def job(opened: Opened, like: Path, *, finishes: bool = False, rows: int = 8) -> PackedMergeJob:
    layout = read_layout(str(like), lambda line: None)
    return PackedMergeJob(opened, load_dataset(opened.config.data), layout, rows, finishes, 4096)


def said(opened: Opened, like: Path, **more: Any) -> str:
    console = Console(record=True, width=300, file=io.StringIO())
    fit_packed_merge(job(opened, like, **more), like.parent / "out", console)
    return console.export_text()


def test_a_budget_that_is_enough_is_said_and_one_that_is_not_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_runtime(monkeypatch, 1 << 29)
    opened, like = open_adapter(runs / "on_nf4"), runs / "nf4"
    assert said(opened, like) == ""
    assert "planned of 8GiB for a merge into packed weights: all weights stay in memory" in said(opened.within("8GiB"), like)
    with pytest.raises(ConfigError, match=r"budget is 100MiB, but a merge into packed .* at least \d+ MiB.*Fewer --calib"):
        said(opened.within("100MiB"), like)
    with pytest.raises(ConfigError, match=r"all of which are in memory\. Leave it out.*be streamed.*with --memory"):
        said(opened.within("100MiB"), like, finishes=True)
    assert "this machine has" in said(opened.within("900TiB"), like)


def test_a_gguf_file_that_is_still_to_be_laid_out_is_refused_before_that(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")
    words: dict[str, Any] = {"into": "packed", "like": str(tmp_path / "tiny.gguf"), "memory": "8MiB"}
    with pytest.raises(ConfigError, match=r"but unpacking .*tiny\.gguf, which is done once, takes about"):
        merge(MergeOptions((str(runs / "on_nf4"),), out=tmp_path / "out.gguf", **words), console=quiet())
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(fit, "bytes_to_unpack", lambda spec: 1 << 50)
    with pytest.raises(ConfigError, match=r"but unpacking .*nf4, which is done once"):
        said(open_adapter(runs / "on_nf4").within("8GiB"), runs / "nf4")


def test_the_least_that_is_named_is_enough(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_runtime(monkeypatch, 1 << 29)
    opened, like = open_adapter(runs / "on_dense"), runs / "nf4"
    with pytest.raises(ConfigError) as caught:
        said(opened.within("300MiB"), like)
    least = int(str(caught.value).partition("at least ")[2].partition(" MiB")[0])
    assert " for a merge into packed weights: " in said(opened.within(f"{least}MiB"), like)  # the models are that small
    with pytest.raises(ConfigError):
        said(opened.within(f"{least - 1 - (BETWEEN_PROCESSES >> 20)}MiB"), like)


def test_another_attention_than_the_planned_one_is_refused_under_a_budget() -> None:
    by_row = cast(TextModel, SimpleNamespace(name="a model", attention="sdpa"))
    limited: Residency[MemoryPlan] = Residency(Budget.parse("1GiB"))
    require_planned_attention(Residency(), by_row)
    with pytest.raises(ConfigError, match="a model attends with sdpa, row by row, but --memory is planned for attention varlen"):
        require_planned_attention(limited, by_row)
    require_planned_attention(limited, by_row, "sdpa")
    require_planned_attention(limited, cast(TextModel, SimpleNamespace(attention="varlen")))


@pytest.mark.usefixtures("no_runtime")
def test_the_result_is_counted_on_its_own_disk(runs: Path, going: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going(SPILLED)
    opened = open_adapter(runs / "on_dense")
    opened = opened.within("8GiB")
    memory = replace(opened.config.memory, store=str(tmp_path / "fast" / "stores"))
    given = job(replace(opened, config=replace(opened.config, memory=memory)), runs / "nf4")
    for folder in ("fast", "large"):
        (tmp_path / folder).mkdir()
    free = {"fast": 1 << 40, "large": 1000}
    monkeypatch.setattr(fit, "disk_of", lambda path: folder_above(path).name)
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place.name]))
    with pytest.raises(EnvironmentProblem, match=r"needs .* in .*large/out on disk, where 1000 bytes are free.*or --out"):
        fit_packed_merge(given, tmp_path / "large" / "out", quiet())
    free.update(fast=1000, large=1 << 40)
    with pytest.raises(EnvironmentProblem, match=r"needs [^,]* in .*fast/stores/\.out-.*\.blocks on disk, where 1000 bytes"):
        fit_packed_merge(given, tmp_path / "large" / "out", quiet())


def test_one_layer_at_a_time_is_dense(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer is rounded no other is plain numbers, and nothing of its size is kept after it."""
    held: list[set[str]] = []
    real = packing_steps.fold_layers

    def watched(model: nn.Module, name: str, paths: list[str]) -> None:
        real(model, name, paths)
        held.append({path for path in watching if type(find(model, path)) is nn.Linear})

    watching = list(open_adapter(runs / "on_nf4").adapter.pairs)
    monkeypatch.setattr(packing_steps, "fold_layers", watched)
    rounding = packing_steps.round_with_feedback
    found = []

    def kept(*given: object, **more: object) -> object:
        found.append(rounding(*given, **more))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(packing_steps, "round_with_feedback", kept)
    merge(MergeOptions((str(runs / "on_nf4"),), out=tmp_path / "out", memory="8GiB", **FEW_ROWS), console=quiet())
    assert all(len(dense) == 1 for dense in held) and len(held) == 6 * (7 + 7)
    assert len(found) == 6 * 7 and all(one.latent is None for one in found)


WEIGHT = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


def shapes(grid: FixedGrid) -> list[Any]:
    if isinstance(grid, Nf4Grid):
        return [grid.largest.shape]
    assert isinstance(grid, UniformGrid)
    return [part.shape for part in (grid.step, grid.inverse, grid.offset)] + [grid.group_of]


def gptq(groups: int) -> PackedBase:
    base = empty_base({"method": "gptq", "shape": (64, 512), "bits": 4, "groups": groups, "sym": True, "zero_format": "gptq"})
    base.store(WEIGHT)
    return base


@pytest.mark.parametrize("base", [Nf4Base.of(WEIGHT), gptq(8), gptq(1)], ids=["nf4", "gptq", "whole rows"])
def test_a_grid_of_shapes_is_as_large_as_the_real_one(base: PackedBase) -> None:
    assert shapes(outlined_grid(base)) == shapes(grid_of(base))


@pytest.mark.parametrize("kind", list(HIGHEST))
def test_so_is_that_of_each_type_of_gguf(kind: str) -> None:
    base = gguf_codes.fit_gguf_scales(WEIGHT, kind)
    assert shapes(outlined_grid(base)) == shapes(grid_of(base))
