"""A pipe, a device or an endless link at each name that is read of folders and files of strangers: one message, and no wait."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakeet.api.run import open_run
from lorakeet.config import read_run
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import read_split_record
from lorakeet.errors import LorakeetError
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.identity import identity_of, require_certified
from lorakeet.kinds.images.data.folder import png_of, read_album
from lorakeet.kinds.images.spec import ImageSpec
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.run_folder import rates_of
from lorakeet.studio.index import summary_of
from lorakeet.train.checkpoint import load_newest
from lorakeet.train.log import read_metrics
from lorakeet.train.run import RunFolder
from tiny.runs import reviews, run, write_rows

KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "link to a pipe": lambda place: (os.mkfifo(place.with_name("elsewhere")), place.symlink_to(place.with_name("elsewhere"))),
    "device": lambda place: place.symlink_to("/dev/zero"),
    "itself": lambda place: place.symlink_to(place),
}
SECONDS = 60.0  # until a call counts as hung


def ends(call: Callable[[], Any], place: Path) -> None:
    """Calls it in a thread: it returns, or raises what is one message. A reader that waits at a pipe is let go."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not found:
        os.close(os.open(place, os.O_RDWR | os.O_NONBLOCK))
        pytest.fail(f"it waits at {place.name}")
    assert found[0] is None or isinstance(found[0], (LorakeetError, OSError)), repr(found[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A small run with an adapter."""
    folder = tmp_path_factory.mktemp("whole")
    run(tiny_llama_folder, write_rows(folder / "rows.jsonl", reviews(40)), folder / "run", {"train.steps": "2"})
    return folder / "run"


def _silent(*_: object) -> None:
    """Takes what a reader says."""


READERS: tuple[Callable[[Path], Any], ...] = (
    lambda run: read_adapter(run, say=_silent),
    lambda run: identity_of(run / "adapter"),
    require_certified,
    lambda run: open_run(run).config,
    lambda run: read_report(run / "report.json"),
    lambda run: read_certificate(run / "certificate.json"),
    lambda run: read_split_record(run / "split.json"),
    lambda run: rates_of(RunFolder(run)),
    lambda run: load_newest(run / "checkpoints", say=_silent),
    lambda run: load_tokenizer(run / "adapter"),
    summary_of,
    lambda run: read_metrics(run / "metrics.jsonl"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_name_of_a_run_folder(whole: Path, tmp_path: Path, kind: str) -> None:
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert len(names) > 15
    for number, name in enumerate(names):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        (folder / name).unlink()
        KINDS[kind](folder / name)
        for read in READERS:
            ends(partial(read, folder), folder / name)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_each_name_of_a_tokenizer(tiny_llama_folder: Path, tmp_path: Path, kind: str) -> None:
    names = sorted(path.name for path in tiny_llama_folder.iterdir() if path.is_file())
    for number, name in enumerate([*names, "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json"]):
        folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / str(number)))
        (folder / name).unlink(missing_ok=True)
        KINDS[kind](folder / name)
        ends(partial(load_tokenizer, folder), folder / name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.json", "x.txt", "x.parquet", "x.xlsx", "x.gz", "x.zip", "run.yaml"])
def test_files_of_the_command_line(tmp_path: Path, name: str, kind: str) -> None:
    place = tmp_path / name
    KINDS[kind](place)
    ends(partial(read_run, place) if name == "run.yaml" else partial(read_rows, str(place), DataSpec(train=str(place))), place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl"])
def test_each_name_of_a_folder_of_pictures(tmp_path: Path, name: str, kind: str) -> None:
    pytest.importorskip("PIL")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png_of(np.zeros((8, 8, 3), np.uint8)))
        (tmp_path / f"{number}.txt").write_text("a picture")
    KINDS[kind](tmp_path / name)
    ends(partial(read_album, tmp_path, ImageSpec()), tmp_path / name)
