"""`make gpu` runs its whole course with small sizes, on the CPU and on the simulated card; what a stage found stays if it fails
or is late."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structure.tree import ROOT
from tiny import simulated_card as simulated

BENCHMARKS = ROOT / "benchmarks"
PROGRAM = BENCHMARKS / "gpu_first_hour.py"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program is found, and what it sets in the environment ends with the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    given.pop("TRITON_INTERPRET", None)  # the program sets it itself, before Triton is imported
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=1800, check=False)


@pytest.mark.slow
def test_every_stage_runs_in_a_rehearsal(tmp_path: Path) -> None:
    ended = program("--rehearse", "--out", tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert ended.returncode == 0, ended.stdout + ended.stderr + log[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    stages = report["stages"]
    assert report["rehearsal"] and [*stages] == [*"abcdefghi"]
    assert {stage["ended"] for stage in stages.values()} == {"done"} and "failed" not in ended.stdout
    assert stages["a"]["found"]["product_flops"] > 0
    tests = stages["b"]["found"]["tests"]
    assert tests["tests_passed"] >= 15 and not tests["tests_failed"]
    assert stages["c"]["found"]["nf4, GPU, float32: largest gap"] == 0 and stages["c"]["found"]["fused modules"]["TrainedBlock"]
    speed = stages["d"]["found"]
    ours, peer = (speed[f"{name}, 1B, none"]["64"] for name in ("lorakeet", "PEFT + Liger"))
    assert ours["first_loss"] == pytest.approx(peer["first_loss"], abs=1e-4), "the same weights and rows"
    assert speed["planned, 8B, nf4, 64"]["train step"] > 0
    assert all(each["micro_batches"] >= 1 for each in stages["e"]["found"].values())
    assert stages["f"]["found"]["1B, none"]["longest"]
    run = stages["g"]["found"]["1B, whole"]
    assert run["certificate_passed"] and run["tokens_per_second"] > 0
    assert 0 < stages["h"]["found"]["largest gap"] < 1e-4
    assert stages["i"]["found"]["toy"]["seconds_a_step"] > 0
    written = (tmp_path / "index.html").read_text()
    assert "<h2>Goals</h2>" in written and "its numbers mean nothing" in written and "not measured" in written
    assert all(stage["title"] in written for stage in stages.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "log.txt", "report.json"]


@pytest.fixture
def on_card() -> Iterator[simulated.Card]:
    with simulated.simulated_card() as card:
        yield card


def found_on(card: simulated.Card, module: str, folder: Path) -> dict[str, Any]:
    """What a stage finds with small sizes on the simulated card, where the processes that it starts are forked with it."""
    found = import_module("first_hour.findings").Findings(folder / "found.json", folder, toy=True, ends=1e12)
    found.device = torch.device("cuda", 0)
    process = import_module("first_hour.process")
    os.environ.update({process.FORKED: "1", process.NESTED: "1"})
    import_module(f"first_hour.{module}").run(found)
    return dict(found.values)


def failed(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: each["failed"] for name, each in values.items() if isinstance(each, dict) and "failed" in each}


@pytest.mark.slow
def test_losses_on_the_simulated_card_are_those_of_the_cpu(on_card: simulated.Card, tmp_path: Path) -> None:
    values = found_on(on_card, "losses", tmp_path)
    assert not failed(values) and on_card.launches["mm"] > 0
    for base in ("dense", "nf4"):
        assert values[f"{base}, GPU, float32"] == pytest.approx(values[f"{base}, CPU, float32"], rel=2e-4)
        assert values[f"{base}, GPU, float32: largest gap"] < 1e-3
    assert values["fused modules"]["TrainedBlock"]


@pytest.mark.slow
def test_speed_is_measured_on_the_simulated_card(on_card: simulated.Card, tmp_path: Path) -> None:
    """It cannot stand for what other programs call in C."""
    values = found_on(on_card, "speed", tmp_path)
    assert all(name.startswith("PEFT + Liger") for name in failed(values)), failed(values)
    for case in ("1B, none", "8B, nf4"):
        run = values[f"lorakeet, {case}"]["64"]
        assert run["peak_bytes"] > 0 and run["gpu_seconds"] > 0 and math.isfinite(run["last_loss"])


def test_a_profiler_that_sees_no_kernel_is_said(on_card: simulated.Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container may not watch the GPU. torch's own profiler runs in the rehearsal on the CPU."""
    seen = SimpleNamespace(key_averages=list)
    monkeypatch.setattr(import_module("first_hour.kernels"), "profile", lambda activities: nullcontext(seen))
    values = found_on(on_card, "kernels", tmp_path)
    assert "saw no kernel" in values["1B, none"]["not_run"] and on_card.launches["mm"] > 0


@pytest.mark.slow
def test_images_are_trained_on_the_simulated_card(on_card: simulated.Card, tmp_path: Path) -> None:
    values = found_on(on_card, "images", tmp_path)
    assert not failed(values) and on_card.launches["mm"] > 0
    assert values["toy"]["seconds_a_step"] > 0 and all(map(math.isfinite, values["toy"]["losses"]))


@pytest.mark.slow
def test_without_a_cuda_device_it_says_so_and_an_earlier_report_stays(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    ended = program("--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 2 and not ended.stdout
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("Nothing was measured: ") and "CUDA" in line
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"] and (tmp_path / "report.json").read_text() == "{}"


@pytest.mark.slow
def test_wheels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torn-1.0-py3-none-any.whl").write_bytes(b"PK")
    ended = program("--out", tmp_path / "out", "--wheels", tmp_path / "wheels")
    assert ended.returncode == 2 and "make gpu-wheels" in ended.stderr and not (tmp_path / "out").exists()


# What a machine may lack.


def test_packages_that_are_missing_or_of_another_version_are_named_together() -> None:
    environment = import_module("first_hour.environment")
    here = {"torch": "2.11.0+cu130", "transformers": "5.17.0"}
    lines = ["torch>=2.11,<2.15", "transformers>=5.24,<6", "scipy>=1.14", "tomli; python_version < '3.0'"]
    assert environment.packages_lacking(lines, here.get) == [
        "transformers is 5.17.0 (expected <6,>=5.24)", "scipy is missing (expected >=1.14)",
    ]  # fmt: skip


class Card:
    """What the check of a machine asks of torch."""

    __version__ = "2.11.0+cu130"

    def __init__(self, capability: tuple[int, int] | None) -> None:
        self.cuda = SimpleNamespace(is_available=lambda: capability is not None)
        self.version = SimpleNamespace(cuda="13.0")


def test_cards_and_drivers_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, nvidia = import_module("first_hour.environment"), import_module("lorakeet.models.nvidia")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    assert "compute capability 7.0; expected 7.5" in environment.gpu_refusal(Card((7, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert environment.gpu_refusal(Card((7, 5))) == ""
    monkeypatch.setattr(nvidia, "find_nvidia_gpus", lambda: nvidia.NvidiaGpus(("Tesla T4",), "535.1"))
    assert "needs driver 580" in environment.gpu_refusal(Card(None))
    monkeypatch.setattr(nvidia, "find_nvidia_gpus", nvidia.NvidiaGpus)
    assert "sees no CUDA device here" in environment.gpu_refusal(Card(None))


# Stages that fail or are late.

STAGES = {
    "quick": "found.add('number', 1)",
    "late": "import time\n    found.add('number', 2)\n    time.sleep(60)",
    "broken": "found.add('number', 3)\n    raise ValueError('no such card')",
    "partly": "found.attempt('one', lambda: 1 / 0)\n    found.add('two', 2)",
    "killed": "import os, signal\n    found.add('number', 4)\n    os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program with stages that end in each way, each in a fork of this process."""
    first_hour, runner, kinds = (import_module(name) for name in ("first_hour", "gpu_first_hour", "first_hour.stages"))
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, code in STAGES.items():
        (folder / f"{name}.py").write_text(f"def run(found):\n    {code}\n")
    monkeypatch.setattr(first_hour, "__path__", [*first_hour.__path__, str(folder)])
    made = [kinds.Stage(name[0], name, 1 if name == "late" else 60, f"the {name} one") for name in STAGES]
    monkeypatch.setattr(runner, "STAGES", made)
    monkeypatch.setattr(runner, "prepared", lambda *_: "")
    monkeypatch.setenv("LORAKEET_HOUR_FORKED", "1")
    import_module("first_hour.stage")
    yield runner
    for name in STAGES:
        sys.modules.pop(f"first_hour.{name}", None)


@pytest.mark.slow
def test_a_stage_that_fails_or_is_late_is_kept_and_the_next_goes_on(
    stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert stages.main(["--rehearse", "--out", str(out)]) == 1
    assert capsys.readouterr().out.count("failed: ") == 2, "of the parts, each is said"
    found = json.loads((out / "report.json").read_text())["stages"]
    assert [stage["ended"] for stage in found.values()] == ["done", "out of time", "failed", "done", "failed"]
    assert [stage["found"].get("number") for stage in found.values()] == [1, 2, 3, None, 4], "what was found before stays"
    assert {stage["card"] for stage in found.values()} == {"none: a rehearsal on the CPU"}
    assert len({stage["commit"] for stage in found.values()}) == 1
    assert found["b"]["found"]["failed"] == "ValueError: no such card" and "no such card" in found["b"]["said"]
    assert found["p"]["found"] == {"one": {"failed": "ZeroDivisionError: division by zero"}, "two": 2}
    page = (out / "index.html").read_text()
    assert "out of time" in page and "no such card" in page
    again = stages.Report(out, rehearsal=True)
    again.put(stages.STAGES[0], {"number": 9}, seconds=0, limit=1, ended="done")
    kept = json.loads((out / "report.json").read_text())["stages"]
    assert kept["q"]["found"] == {"number": 9} and kept["l"] == found["l"], "a stage that is run again replaces its own findings"


NEST = """
import os, signal, sys, time
from pathlib import Path
from first_hour.process import Started, wait

def main(arguments):
    depth, folder = int(arguments[0]), Path(arguments[1])
    (folder / f"{depth}.pid").write_text(str(os.getpid()))
    if depth == 0:
        time.sleep(30)
    below = Started("nest", [str(depth - 1), str(folder)], folder / "below.log")
    while not (folder / "0.pid").is_file():
        time.sleep(0.01)
    if depth == 2:
        (folder / "ready").touch()
    time.sleep(30)

if __name__ == "__main__":
    main(sys.argv[1:])
"""


def computes(pid: int) -> bool:
    """Whether it is there, and does not only wait for its parent."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("forked", [True, False])
@pytest.mark.parametrize("orphaned", [True, False])
def test_what_a_stage_has_started_ends_with_it(
    forked: bool, orphaned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A contender that a late stage has started would stay on the GPU, and spoil what the next stages measure."""
    process = import_module("first_hour.process")
    (tmp_path / "nest.py").write_text(NEST)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LORAKEET_HOUR_FORKED", "1") if forked else monkeypatch.delenv("LORAKEET_HOUR_FORKED", raising=False)
    outer = process.Started("nest", ["2", str(tmp_path)], tmp_path / "log")
    late: list[int] = []

    def ready() -> None:
        if (tmp_path / "ready").is_file() and not late:
            late.extend(int((tmp_path / f"{depth}.pid").read_text()) for depth in (0, 1, 2))
            if orphaned:
                os.kill(late[1], signal.SIGKILL)  # the process between has ended: the innermost one has another parent
            raise TimeoutError

    with pytest.raises(TimeoutError):
        process.wait(outer, 60, ready)
    assert len(late) == 3 and not any(map(computes, late)), "all three have ended when the wait is over"
    sys.modules.pop("nest", None)


def test_a_stage_knows_when_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it began: its imports count."""
    stage = import_module("first_hour.stage")
    (tmp_path / "quick.py").write_text("def run(found):\n    found.add('ends', found.ends)\n")
    monkeypatch.setattr(import_module("first_hour"), "__path__", [str(tmp_path)])
    stage.main(["quick", str(tmp_path / "found.json"), str(tmp_path), "12345.5", "toy"])
    assert json.loads((tmp_path / "found.json").read_text()) == {"ends": 12345.5}
    sys.modules.pop("first_hour.quick", None)


def test_goals_are_met_missed_or_not_measured() -> None:
    goals = import_module("first_hour.goals")
    speed = {"4096": {"tokens_per_second": 16000.0, "process_bytes": 100}}
    found = {
        "lorakeet, 8B, none": speed,
        "lorakeet, 8B, nf4": {"4096": {"tokens_per_second": 9000.0, "process_bytes": 100}},
        "planned, 8B, none, 4096": {"train step": 105}, "planned, 8B, nf4, 4096": {"train step": 95},
        "planned, 1B, nf4, 4096": {"failed": "x"},
    }  # fmt: skip
    stages = {"d": {"found": found}, "c": {"found": {"dense: largest gap": 0.01, "nf4: largest gap": 0.2}}}
    met = {goal.words: goal.compared(stages)["met"] for goal in goals.GOALS}
    assert [*met.values()][:4] == [True, False, None, None]
    assert met["largest gap between losses on the CPU and on the GPU, nats"] is False
    assert met["smallest surplus of a plan over what was taken"] is False, "a plan that was too small"
    assert met["median surplus of a plan over what was taken"] is None, "one plan failed"
    assert met["most waits of the host in a step"] is None
    assert goals.failures(stages["d"]["found"]) == ["planned, 1B, nf4, 4096: x"]


def compared(goal: str, **stages: dict[str, Any]) -> dict[str, Any]:
    goals = import_module("first_hour.goals")
    (found,) = (each.compared(stages) for each in goals.GOALS if each.words == goal)
    return found  # type: ignore[no-any-return]


def test_a_goal_is_not_met_by_the_parts_that_did_not_fail() -> None:
    waits = "most waits of the host in a step"
    good, bad = {"waits_a_step": 1.0}, {"failed": "RuntimeError: x"}
    assert compared(waits, e={"found": {"rows alone, none": good}, "ended": "done"})["met"] is True
    partly = compared(waits, e={"found": {"rows alone, none": good, "rows alone, nf4": bad}, "ended": "done"})
    assert partly["met"] is None and partly["measured"] == 1 and partly["lacks"] == ["rows alone, nf4: failed"]
    late = compared(waits, e={"found": {"rows alone, none": good}, "ended": "out of time"})
    assert late["met"] is None and late["lacks"] == ["stage e: out of time"]
    assert compared(waits, e={"found": {"a": {"waits_a_step": 4.0}, "b": bad}, "ended": "done"})["met"] is False
    assert compared(waits, e={"found": {"a": bad}, "ended": "done"})["met"] is False, "nothing was measured, since it failed"
    gap = "largest gap between losses on the CPU and on the GPU, nats"
    found = {"dense, GPU, bfloat16: largest gap": 0.01, "nf4, GPU, bfloat16": bad, "fused modules": {"failed": "other"}}
    assert compared(gap, c={"found": found, "ended": "done"})["lacks"] == ["nf4, GPU, bfloat16: failed"]
    page = import_module("first_hour.page")
    assert "met by what was measured: rows alone, nf4: failed" in page._goals([partly])


@pytest.mark.parametrize(("program", "kept"), [("lorakeet", "failed"), ("PEFT + Liger", "not_run")])
def test_too_little_memory_for_lorakeet_is_a_failure(
    program: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender = import_module("first_hour.contender")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    for name in ("_ours", "_peer"):
        monkeypatch.setattr(contender, name, full)
    (tmp_path / "asked.json").write_text(json.dumps({"program": program, "device": "cpu"}))
    contender.main([str(tmp_path / "asked.json"), str(tmp_path / "found.json")])
    assert list(json.loads((tmp_path / "found.json").read_text())) == [kept]


def test_waits_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of each wait while it watches; the place is that of the code that waited."""
    waits = import_module("first_hour.waits")
    watched: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watched.append)

    def step() -> None:
        import warnings

        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    places = waits.waits_of(step, torch.device("cuda"))
    assert [*places.values()] == [3] and next(iter(places)).startswith("test_gpu_first_hour.py:")
    assert watched == ["warn", "default"]


def test_flat_rows_by_hand_are_rows_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's attention reads where rows begin: torch's varlen function is written out here, for it needs a GPU."""
    varlen = import_module("torch.nn.attention.varlen")
    contender, workload = import_module("first_hour.contender"), import_module("contenders.packed_workload")
    models, losses = import_module("harness.made_up_model"), import_module("first_hour.losses")

    def by_rows(q: Any, k: Any, v: Any, starts: Any, _: Any, longest: int, __: int, *, scale: float, window_size: Any) -> Any:
        assert longest == int(starts.diff().max()) and window_size == (-1, 0)
        parts = []
        for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            states = (each[begin:end].transpose(0, 1)[None] for each in (q, k, v))
            found = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, scale=scale)
            parts.append(found[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", by_rows)
    shape = losses.small_shape(toy=True)
    (rows,) = workload.drawn_steps(64, 1, 0, words=(3, 300))
    flat = contender._flat(list(rows), torch.device("cpu"))
    starts = torch.tensor([0, *(len(row.ids) for row in rows)]).cumsum(0, dtype=torch.int32)
    longest = max(len(row.ids) for row in rows)
    flat |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    model = models.dense_model(shape, "cpu", torch.float32, attn_implementation=contender._attention())
    plain = models.dense_model(shape, "cpu", torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = model(**flat).loss
        alone = [plain(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.ids])).loss * len(row.targets) for row in rows]
    assert float(found) == pytest.approx(float(sum(alone)) / sum(len(row.targets) for row in rows), abs=1e-5)


# The wheels.


def test_bitsandbytes_keeps_one_library(tmp_path: Path) -> None:
    wheels = import_module("gpu_wheels")
    path = tmp_path / "bitsandbytes-0.50.2-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{each}.so" for each in ("cpu", "cuda126", "cuda130", "rocm62")]
    names = ["bitsandbytes/__init__.py", *libraries]
    record = "bitsandbytes-0.50.2.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, name)
        wheel.writestr(record, "".join(f"{name},sha256=x,1\n" for name in [*names, record]))
    wheels.keep_library(path, "cuda130")
    with zipfile.ZipFile(path) as wheel:
        kept = [names[0], names[1], names[3], record]
        assert wheel.namelist() == kept and wheel.read(names[3]).decode() == names[3]
        assert [line.partition(",")[0] for line in wheel.read(record).decode().splitlines()] == kept
    with pytest.raises(ValueError, match="no library bitsandbytes/libbitsandbytes_cuda150"):
        wheels.keep_library(path, "cuda150")
