"""On a full disk, whatever is written is whole or not there, and what to do is one message; links are not followed.

A limit on the size of files is what a full disk or quota is to a process: the last write is short, and the next one is refused.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.data.split import write_split_record
from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.values import put_text
from lorakeet.exporting import gguf_model
from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.exporting.llama_cpp import quantise
from lorakeet.formats.files.safetensors_file import save_tensors, save_text
from lorakeet.formats.peft import peft
from lorakeet.merging.merged_folder import merge_into
from lorakeet.models.text.load import load_tokenizer
from lorakeet.train.durable import new_folder
from lorakeet.train.log import MetricsLog, read_metrics
from lorakeet.train.run import RunFolder
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions
from tiny.full_disk import files_up_to
from tiny.models import save_tiny_llama
from tiny.portable import text_adapter

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("disks") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disks") / "adapter"
    peft.write(text_adapter(), folder)
    return folder


Verb = Callable[[Path, Path, Path], None]  # base, adapter, OUT


def _converted(to: str) -> Verb:
    def run(base: Path, adapter: Path, out: Path) -> None:
        convert(ConvertOptions(adapter, out, to=to, base=base if to == "gguf" else None), console=QUIET)  # type: ignore[arg-type]

    return run


def _exported(quant: str) -> Verb:
    return lambda base, adapter, out: void(write_gguf(base, None, out, tokenizer=load_tokenizer(base), quant=quant))


def void(_: Any) -> None:
    """Drops a result."""


VERBS: dict[str, tuple[Verb, str]] = {
    "gguf adapter": (_converted("gguf"), "out.gguf"),
    "mlx adapter": (_converted("mlx"), "out"),
    "peft adapter": (_converted("peft"), "out"),
    "gguf model in f32": (_exported("f32"), "out.gguf"),
    "gguf model in q8_0": (_exported("q8_0"), "out.gguf"),
    "merged folder": (lambda base, adapter, out: void(merge_into(base, peft.read(adapter), out)), "out"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_whole_or_not_there(verb: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    run, name = VERBS[verb]
    whole = tmp_path / "whole"
    whole.mkdir()
    run(base, adapter, whole / name)
    files = [path for path in (whole / name, *(whole / name).rglob("*")) if path.is_file()]
    contents = {path.relative_to(whole): path.read_bytes() for path in files}
    largest = max(map(len, contents.values()))
    place = tmp_path / "place"
    place.mkdir()
    for size in (0, 1, 7, 64, largest // 7, largest // 2, largest - 8193, largest - 4097, largest - 33, largest - 1):
        with files_up_to(size), pytest.raises(EnvironmentProblem) as refused:
            run(base, adapter, place / name)
        said = str(refused.value)
        assert "Free some space" in said and "Fetch" not in said and len(said) < 500, said
        assert os.listdir(place) == []
    with files_up_to(largest):
        run(base, adapter, place / name)
    assert {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()} == contents


def test_the_space_of_a_gguf_model_is_counted_to_the_byte(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(gguf_model, "require_free", lambda folder, needed, what, written: counted.append(needed))
    for number, quant in enumerate(("f32", "f16", "q8_0")):
        found = write_gguf(base, None, tmp_path / f"{number}.gguf", tokenizer=load_tokenizer(base), quant=quant)
        assert counted == [found.bytes] == [(tmp_path / f"{number}.gguf").stat().st_size]
        counted.clear()


def test_llama_cpps_quantiser_leaves_nothing_at_the_name(base: Path, tmp_path: Path) -> None:
    wide = write_gguf(base, None, tmp_path / "wide", tokenizer=load_tokenizer(base), quant="f32").path
    quantise(wide, tmp_path / "whole", "q8_0")
    size = (tmp_path / "whole").stat().st_size
    for most in (64, size // 2, size - 1):
        with files_up_to(most), pytest.raises(EnvironmentProblem):
            quantise(wide, tmp_path / "out", "q8_0")
        assert not (tmp_path / "out").exists()


SAVED: dict[str, Callable[[Path], None]] = {
    "tensors": lambda path: save_tensors(path, {"a": torch.ones(9)}, metadata={}),
    "text": lambda path: save_text(path, "text"),
    "values": lambda path: put_text(path, "text"),
    "split": lambda path: write_split_record(path, {"format": 1}),
    "run file": lambda path: RunFolder(path.parent).write(path, "text"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_no_link_beside_an_output_is_followed(kind: str, tmp_path: Path) -> None:
    """Somebody else may write to the folder: what waits there under a name that was once used is left alone."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    place = tmp_path / "place"
    place.mkdir()
    for name in (".out.partial", ".out.wide", ".out.ready", ".out.old"):
        (place / name).symlink_to(victim)
    SAVED[kind](place / "out")
    assert victim.read_bytes() == b"precious"
    assert (place / "out").is_file() and not (place / "out").is_symlink()


@pytest.mark.parametrize("verb", VERBS)
def test_no_link_beside_the_output_of_a_verb_is_followed(verb: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    run, name = VERBS[verb]
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(b"precious")
    folder.mkdir()
    place = tmp_path / "place"
    place.mkdir()
    (place / f".{name}.partial").symlink_to(victim if name.endswith(".gguf") else folder)
    (place / f".{name}.wide").symlink_to(victim)
    run(base, adapter, place / name)
    assert victim.read_bytes() == b"precious" and os.listdir(folder) == []
    assert (place / f".{name}.partial").is_symlink()


def test_a_folder_that_replaces_another_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    place = tmp_path / "place"
    place.mkdir()
    for state in ("partial", "ready", "old"):
        (place / f".adapter.{state}").symlink_to(precious)
    for text in ("one", "two"):
        with new_folder(place / "adapter") as made:
            (made / "file").write_text(text)
    assert os.listdir(precious) == ["file"] and (place / "adapter" / "file").read_text() == "two"


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_files_of_a_run_folder_from_elsewhere_are_no_links(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    run = RunFolder.create(tmp_path / "run")
    (run.path / name).symlink_to(victim)
    if name == ".lock":
        with pytest.raises(EnvironmentProblem, match=r"\.lock could not be opened: the system refused \("), run.locked():
            pass
    else:
        with pytest.raises(OSError):
            MetricsLog(run.metrics)
    assert victim.read_bytes() == b"precious"


def test_metrics_on_a_full_disk_keep_every_whole_line_and_close(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    with files_up_to(100):
        with pytest.raises(OSError):
            for step in range(50):
                log.write({"step": step, "loss": 1.5})
        log.close()  # writes nothing more, so it cannot be refused
    kept = read_metrics(path)
    assert path.stat().st_size == 100 and [record["step"] for record in kept] == list(range(len(kept))) and kept
    again = MetricsLog(path, keep=log.offset)
    again.write({"step": len(kept), "loss": 1.5})
    again.close()
    assert len(read_metrics(path)) == len(kept) + 1
