"""Quantising within a budget: the same bytes each way, what is planned against what is held, and what is refused."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.exporting import model_folder
from lorakeet.memory.allocator import slack
from lorakeet.memory.store import WeightStore
from lorakeet.memory.stream import RecordStream
from lorakeet.models.streaming import load as streamed_load
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.planning.packed_merge import SPILLED, STREAMED
from lorakeet.planning.quantizing import QuantizeJob, Quantizing
from lorakeet.runs.residency import RESIDENT, MemoryPlan, Way
from lorakeet.verbs import quantize as quantizer
from lorakeet.verbs.options import QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.held import HeldBytes, counted_from
from tiny.memory_plans import same_runtime
from tiny.models import save_tiny_llama, tiny_model
from tiny.runs import quiet, reviews, write_rows

GPTQ: dict[str, Any] = {"method": "gptq", "group_size": 16}
HIDDEN, INNER = 128, 384
WIDE = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(60)))


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tensors are planned."""
    same_runtime(monkeypatch, -slack(0))
    monkeypatch.setattr(QuantizeJob, "beside", 0)


@pytest.fixture
def going(monkeypatch: pytest.MonkeyPatch) -> Callable[[Way], list[int]]:
    """Leaves this way alone; what is planned for it is in the list afterwards."""
    real = Quantizing.plan

    def going(wanted: Way) -> list[int]:
        planned: list[int] = []

        def plan(job: Quantizing, way: Way) -> MemoryPlan:
            found = real(job, way)
            planned.append(found.peak)
            return found

        monkeypatch.setattr(Quantizing, "ways", lambda job, budget: iter([wanted]))
        monkeypatch.setattr(Quantizing, "plan", plan)
        return planned

    return going


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_gptq_writes_the_same_bytes_each_way(family: str, rows: str, going: Any, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source", family=family)
    quantize(QuantizeOptions(str(source), out=tmp_path / "free", calibration=rows, **GPTQ), console=quiet())
    for way in (RESIDENT, STREAMED, SPILLED):
        going(way)
        out = tmp_path / str(way.streamed + way.spilled)
        quantize(QuantizeOptions(str(source), out=out, calibration=rows, memory="8GiB", **GPTQ), console=quiet())
        assert contents(out) == contents(tmp_path / "free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "free", "source"]


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_packing_each_weight_writes_the_same_bytes_each_way(method: Any, going: Any, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    quantize(QuantizeOptions(str(source), method=method, out=tmp_path / "free"), console=quiet())
    for way in (RESIDENT, STREAMED):
        going(way)
        quantize(QuantizeOptions(str(source), method=method, out=tmp_path / str(way.streamed), memory="8GiB"), console=quiet())
        assert contents(tmp_path / str(way.streamed)) == contents(tmp_path / "free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False", "True", "free", "source"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize("way", [RESIDENT, STREAMED, SPILLED], ids=["resident", "streamed", "spilled"])
def test_memory_in_use_is_what_is_planned(way: Way, rows: str, going: Any, tmp_path: Path) -> None:
    """Counted in tensors, after the rehearsal: never more, and not half as much again."""
    source, planned = save_tiny_llama(tmp_path / "source", **WIDE), going(way)
    settings = {"method": "gptq", "group_size": 64, "calibration": rows, "memory": "8GiB"}
    with counted_from(quantizer, "load_text_model") as held:
        quantize(QuantizeOptions(str(source), out=tmp_path / "out", **settings), console=quiet())
    mapped = 0 if way.streamed else (source / "model.safetensors").stat().st_size  # the weights are pages of the file
    assert held.peak + mapped <= planned[0] <= 1.5 * (held.peak + mapped)


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_store_of_a_check_is_in_the_plan(method: Any, going: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is mostly vocabulary, whose dtype changes on the way into the store."""
    model = tiny_model("llama", vocab_size=20_000, hidden_size=64, intermediate_size=64).to(torch.float16)
    source, held, real = save_tiny_llama(tmp_path / "tokenizer"), HeldBytes(), streamed_load.write_store
    model.save_pretrained(source)

    def counted(*given: Any, **more: Any) -> Any:
        with held:
            return real(*given, **more)

    monkeypatch.setattr(streamed_load, "write_store", counted)
    planned = going(STREAMED)
    quantize(QuantizeOptions(str(source), method=method, out=tmp_path / "out", memory="8GiB"), console=quiet())
    mapped = 2 * 20_000 * 64  # a matrix as it is read is pages of the file
    assert held.peak + mapped <= planned[0] <= 1.5 * (held.peak + mapped)


@pytest.mark.slow
@pytest.mark.usefixtures("no_runtime")
def test_with_more_blocks_a_streamed_model_takes_no_more(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in memory takes more by all of them, and by what they become: their pages stay while the packed layers wait."""
    planned: dict[Way, list[int]] = {}

    def plan(job: Quantizing, way: Way) -> MemoryPlan:
        planned.setdefault(way, []).append((found := real(job, way)).peak)
        return found

    real = Quantizing.plan
    monkeypatch.setattr(Quantizing, "plan", plan)
    settings = {"method": "gptq", "group_size": 64, "calibration": rows, "memory": "1KiB"}
    for blocks in (6, 12):
        source = save_tiny_llama(tmp_path / str(blocks), **{**WIDE, "num_hidden_layers": blocks})
        with pytest.raises(ConfigError, match="takes at least"):
            quantize(QuantizeOptions(str(source), out=tmp_path / "out", **settings), console=quiet())
    numbers = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
    block, packed = 4 * numbers, numbers // 2
    few, many = zip(*(planned[way] for way in (RESIDENT, STREAMED)), strict=True)
    assert many[0] - few[0] >= 6 * (block + packed) and many[1] - few[1] < block / 50


@pytest.mark.parametrize("method", ["gptq", "nf4", "int8"])
def test_a_budget_below_the_least_is_refused_with_it(
    method: Any, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_runtime(monkeypatch, 400 << 20)
    source = save_tiny_llama(tmp_path / "source")
    settings = {**GPTQ, "calibration": rows} if method == "gptq" else {"method": method}
    with pytest.raises(ConfigError, match=r"budget is 100MiB, but quantising .* takes at least 4\d\d MiB .*--memory"):
        quantize(QuantizeOptions(str(source), out=tmp_path / "out", memory="100MiB", **settings), console=quiet())
    for wrong, said in (("3", "without a unit"), ("-1GiB", "must be above 0"), ("2 lots", "no unit of memory")):
        with pytest.raises(ConfigError, match=said):
            quantize(QuantizeOptions(str(source), out=tmp_path / "out", memory=wrong, **settings), console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("method", ["gptq", "nf4"])
def test_a_model_that_cannot_be_streamed_is_in_memory_or_refused_by_the_option_of_this_verb(
    method: Any, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Quantizing.plan

    def plan(job: Quantizing, way: Way) -> MemoryPlan:
        if way.streamed:
            raise NotStreamed("It has no blocks.")
        return real(job, way)

    same_runtime(monkeypatch, 400 << 20)
    monkeypatch.setattr(Quantizing, "plan", plan)
    source = save_tiny_llama(tmp_path / "source")
    settings = {**GPTQ, "calibration": rows} if method == "gptq" else {"method": method}
    with pytest.raises(
        ConfigError, match=r"at least 4\d\d MiB .*in memory\. It has no blocks\. Give that with --memory"
    ) as caught:
        quantize(QuantizeOptions(str(source), out=tmp_path / "out", memory="100MiB", **settings), console=quiet())
    assert "memory.budget" not in str(caught.value)
    quantize(QuantizeOptions(str(source), out=tmp_path / "out", memory="12GiB", **settings), console=quiet())


@pytest.mark.usefixtures("no_runtime")
@pytest.mark.parametrize("method", ["gptq", "nf4"])
@pytest.mark.parametrize("full", [False, True], ids=["done", "disk full"])
def test_every_store_is_closed(
    method: Any, full: bool, rows: str, going: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[RecordStream] = []
    closed: list[RecordStream] = []
    begin, end = RecordStream.__init__, RecordStream.close

    def begun(stream: RecordStream, store: Any, *given: Any, **more: Any) -> None:
        begin(stream, store, *given, **more)
        if type(store) is WeightStore:  # not a rehearsal's
            opened.append(stream)

    monkeypatch.setattr(RecordStream, "__init__", begun)
    monkeypatch.setattr(RecordStream, "close", lambda stream: (closed.append(stream), end(stream)))
    source = save_tiny_llama(tmp_path / "source")
    going(STREAMED)
    settings = {**GPTQ, "calibration": rows} if method == "gptq" else {"method": method}
    ends: Any = nullcontext()
    if full:
        monkeypatch.setattr(model_folder, "stream_safetensors", failing)
        ends = pytest.raises(EnvironmentProblem)
    with ends:
        quantize(QuantizeOptions(str(source), out=tmp_path / "out", memory="8GiB", **settings), console=quiet())
    assert len(opened) == (method == "gptq") + (not full) and closed == opened


def failing(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
