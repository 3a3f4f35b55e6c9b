"""What a merge into a quantised model takes: the base as it is and one block, and a budget without that room is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from lorakeet.data.prepare import load_dataset
from lorakeet.errors import ConfigError
from lorakeet.models.layout import read_layout
from lorakeet.models.modules import find
from lorakeet.models.text import TextModel
from lorakeet.train.rehearsal import NotPlanned
from lorakeet.workflows import merge_packed, room_packed
from lorakeet.workflows.merge import merge
from lorakeet.workflows.merge_packed import Measured, Merging, PackedMerge
from lorakeet.workflows.opened import Opened, open_adapter
from lorakeet.workflows.quantize import quantize
from lorakeet.workflows.room_packed import layer_numbers, require_room
from tiny.held import HeldBytes
from tiny.models import save_tiny_llama, tiny_model
from tiny.runs import quiet, reviews, run, write_rows


@pytest.fixture(scope="module")
def on_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over six blocks, of which a plan rehearses a few."""
    folder = tmp_path_factory.mktemp("nf4")
    model = save_tiny_llama(folder / "model", num_hidden_layers=6)
    data = write_rows(folder / "rows.jsonl", reviews(60))
    quantize(str(model), method="nf4", out=folder / "nf4", console=quiet())
    run(folder / "nf4", data, folder / "run", {"train.steps": 2})
    return folder / "run"


def test_the_numbers_are_those_of_the_linear_layers_in_the_blocks() -> None:
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    assert layer_numbers(tiny_model("llama")) == 2 * block


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_what_rounding_holds_is_what_is_planned(
    method: Any, on_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in tensors, while blocks are folded and rounded: never more, and not half as much again."""
    wide = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
    source = save_tiny_llama(tmp_path / "source", **wide, num_hidden_layers=3)
    quantize(str(source), method="nf4", out=tmp_path / "nf4", console=quiet())
    base = tmp_path / "nf4" if method == "nf4" else source
    run(base, on_nf4.parent / "rows.jsonl", tmp_path / "run", {"train.steps": 2})
    opened = open_adapter(tmp_path / "run").within("8GiB")
    planned, held = [], HeldBytes()
    rehearse, real = room_packed.rehearse_rounding, merge_packed.pack_blocks
    monkeypatch.setattr(room_packed, "rehearse_rounding", lambda *given: planned.append(rehearse(*given)) or planned[0])

    def counted(text: TextModel, *given: Any, **more: Any) -> Any:
        held.know([*text.model.parameters(), *text.model.buffers()])
        with held:
            yield from real(text, *given, **more)

    monkeypatch.setattr(merge_packed, "pack_blocks", counted)
    spec = PackedMerge(calibration_rows=24)
    require_room(opened, rows=24, finish=False, micro_tokens=4096, console=quiet())
    dataset, layout = load_dataset(opened.config.data), read_layout(str(tmp_path / "nf4"), lambda line: None)
    Merging(opened, dataset, layout, spec, quiet(), Measured()).with_feedback()
    assert held.peak <= planned[0] <= 1.5 * held.peak


def room(opened: Opened, *, finish: bool = False, rows: int = 8) -> str:
    console = Console(record=True, width=300, file=io.StringIO())
    require_room(opened, rows=rows, finish=finish, micro_tokens=4096, console=console)
    return console.export_text()


def test_a_budget_with_room_is_said_and_one_without_is_refused(on_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_packed, "runtime_bytes", lambda _: 1 << 29)
    opened = open_adapter(on_nf4)
    assert room(opened) == ""
    assert "planned of 8.59 GB for a merge into packed weights" in room(opened.within("8GiB"))
    with pytest.raises(ConfigError, match=r"The budget is .*, but a merge into packed .* one block in fp32\. Fewer"):
        room(opened.within("100MiB"))
    with pytest.raises(ConfigError, match=r"its layers in fp32\. Without --finish-steps it takes less\..*--memory"):
        room(opened.within("100MiB"), finish=True)
    with pytest.raises(ConfigError, match="Fewer --calibration-rows"):
        room(opened.within("600MiB"), rows=100_000)
    assert "this machine has" in room(opened.within("900TiB"))


def test_a_model_that_cannot_be_planned_counts_as_whole(on_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise NotPlanned("This model cannot be planned.")

    monkeypatch.setattr(room_packed, "rehearse_judging", refused)
    opened = open_adapter(on_nf4)
    assert "cannot be planned" in room(opened.within("8GiB"))
    with pytest.raises(ConfigError, match="The budget is"):
        room(opened.within("20MiB"))


def test_one_block_at_a_time_is_dense(on_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer is rounded no layer of another block is plain numbers, and nothing of its size is kept after it."""
    held: list[set[str]] = []
    real = merge_packed.fold_layers

    def watched(model: nn.Module, name: str, paths: list[str]) -> None:
        real(model, name, paths)
        dense = {path for path in watching if type(find(model, path)) is nn.Linear}
        held.append({".".join(path.split(".")[:3]) for path in dense})

    watching = list(open_adapter(on_nf4).adapter.pairs)
    monkeypatch.setattr(merge_packed, "fold_layers", watched)
    rounding = merge_packed.round_with_feedback
    found = []

    def kept(*given: object, **more: object) -> object:
        found.append(rounding(*given, **more))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(merge_packed, "round_with_feedback", kept)
    merge([str(on_nf4)], out=tmp_path / "out", into="packed", keep=1e-6, memory="8GiB", console=quiet())
    assert max(map(len, held)) == 1 and len(held) == 6 * (7 + 1)
    assert len(found) == 6 * 7 and all(one.latent is None for one in found)


def test_a_merge_without_room_writes_nothing(on_nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a merge into packed weights takes about"):
        merge([str(on_nf4)], out=tmp_path / "out", into="packed", memory="64MiB", console=quiet())
    assert not (tmp_path / "out").exists()
