"""Fixtures that several folders of tests share. Puts `tests/` on the import path, so that `from tiny.models import …` works."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_STATE_HOME"] = str(Path(tempfile.gettempdir()) / "lorakeet-tests-state")  # the studio's secret, of no user
sys.path.insert(0, str(Path(__file__).parent))

from tiny.triton_device import interpret_without_a_card

LONGEST = 15.0  # seconds of a processor that an unmarked test may take: the first of a process pays for what others share

interpret_without_a_card()
gc.disable()  # until all tests are collected: imports leave no cycles, and the searches took a quarter of the time


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are left out without one. Files with slow tests come first, so that no process has one left
    when the others are done."""
    left = [item for item in items if item.get_closest_marker("gpu")] if why_no_gpu() else []
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that is not quick and not marked `slow` fails: `make test` stays a matter of minutes."""
    began = sum(os.times()[:4])
    yield
    took = sum(os.times()[:4]) - began
    if took > LONGEST and not any(map(item.get_closest_marker, ("slow", "fuzz", "families", "gpu"))):
        pytest.fail(f"This test took {took:.1f} s of a processor. Mark it slow: it then belongs to make test-all.", pytrace=False)


def why_no_gpu() -> str:
    """Why tests that need a CUDA device are left out here; empty if they are run."""
    import torch

    if torch.cuda.is_available() or os.environ.get("LORAKEET_GPU_TESTS") == "cpu":
        return ""
    return f"torch {torch.__version__} sees no CUDA device here"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line where all tests were to be run and those of a GPU were not."""
    every = {Path(argument.partition("::")[0]).resolve() for argument in config.args} & {Path(__file__).parent, config.rootpath}
    if every and (why := why_no_gpu()):
        terminalreporter.write_line(f"tests/gpu was not run: {why}. On a machine with one: make gpu")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage has to look through it again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What is there after the last test of a file stays too: what later files share, and what this one imported."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def rehearsals_once() -> Iterator[None]:
    """Each run on shapes alone is rehearsed once in a process, however many tests begin the same run (tiny/rehearsals)."""
    if not any(name.startswith(("lorakeet.planning.", "lorakeet.kinds.")) for name in sys.modules):  # none was asked for
        yield
        return
    from tiny.rehearsals import remembered

    with remembered():
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_compiled_once() -> None:
    """The C kernels are loaded before a test names a cache of its own, where they would be compiled again."""
    module = sys.modules.get("lorakeet.kernels.cpu.compile")
    if module is not None:
        module.why_not()


@pytest.fixture(scope="session", autouse=True)
def disk_not_awaited() -> Iterator[None]:
    """No test waits until the disk has what it wrote: a run syncs 50 files, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.fstat(handle) and None)  # an error for what is no open file
        yield


@pytest.fixture
def flash() -> Iterator[Any]:
    """torch's flash kernel, written out for the CPU, which stands for a card (tiny/flash.Flash)."""
    from tiny.flash import on_a_card

    with on_a_card() as kernel:
        yield kernel


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module kernels/liger, whose kernels Triton interprets on the CPU, which stands for a GPU (tiny/liger_kernels)."""
    from tiny.liger_kernels import interpreted

    return interpreted(monkeypatch)


@pytest.fixture
def second_generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A generator on the CPU that torch takes for that of a CUDA device."""
    import torch

    make, found = torch.Generator, torch.Generator()
    monkeypatch.setattr(torch, "Generator", lambda _="cpu": make())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: found.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: found.set_state(state))
    return found


@pytest.fixture(scope="session")
def forked(prepared: Any) -> Iterator[Any]:
    """A process that forks several, as torchrun starts them (tiny/together.Together)."""
    from tiny.together import together

    with together(prepared) as found:
        yield found


@pytest.fixture(scope="session")
def prepared() -> Iterator[Any]:
    """Starts processes that find their libraries imported (tiny/prepared.Prepared)."""
    from tiny.prepared import prepared as forking

    with forking() as found:
        yield found


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`tiny_model("llama", seed=0, **config_changes)` builds a tiny random frozen model (names: tiny.models.FAMILIES)."""
    from tiny.models import tiny_model as build

    return build


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama (hidden 32, 2 layers, tied head) with byte-level tokenizer and chat template. Do not write into it."""
    from tiny.models import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Stable Diffusion 1.x (16×16 pixels). Do not write into it."""
    from tiny.pipelines import save_tiny_sd

    return save_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny SDXL (16×16 pixels, two text encoders). Do not write into it."""
    from tiny.pipelines import save_tiny_sdxl

    return save_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny SD3 (16×16 pixels, T5 beside two CLIP encoders). Do not write into it."""
    from tiny.pipelines import save_tiny_sd3

    return save_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny FLUX (guidance as a number, T5 states). Do not write into it."""
    from tiny.pipelines import save_tiny_flux

    return save_tiny_flux(tmp_path_factory.mktemp("tiny") / "flux")


@dataclass(frozen=True)
class Finished:
    """A run and what went in."""

    result: Any  # FinetuneResult
    path: Path
    model: Path
    data: Path
    test: Path


@pytest.fixture(scope="session")
def finished(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One finished run over labelled rows, with a test file. Do not write into it."""
    from tiny.runs import reviews, run, write_rows

    folder = tmp_path_factory.mktemp("finished")
    records = reviews(60)
    test = [*reviews(12, seed=1), records[0]]  # the last row stands in both files
    data, judged = write_rows(folder / "rows.jsonl", records), write_rows(folder / "judged.jsonl", test)
    result = run(tiny_llama_folder, data, folder / "run", {"data.test": judged})
    return Finished(result, folder / "run", tiny_llama_folder, data, judged)


@pytest.fixture(scope="session")
def loud(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run with an adapter whose effect is visible: 14 pairs on 2 blocks. Do not write into it."""
    from tiny.exports import loud_run

    return loud_run(finished.path, tmp_path_factory.mktemp("loud") / "run")


@pytest.fixture
def card() -> Iterator[Any]:
    """The simulated card (tiny/simulated_card.Card)."""
    from tiny.simulated_card import simulated_card

    with simulated_card() as found:
        yield found


@pytest.fixture
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config.json and nothing else; the order to the C library would outlast the test."""
    from lorakeet.kinds.text import plan as text
    from tiny.configs import SMALL

    monkeypatch.setattr(text, "return_freed_memory", lambda: True)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path
