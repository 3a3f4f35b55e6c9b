"""`lorakeet finetune` with kind: image, start to end."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lorakeet.cli.main import main
from lorakeet.config import read_run
from lorakeet.errors import ConfigError, DataError, RunStopped
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.peft import peft
from lorakeet.kinds.images import kind as image
from lorakeet.kinds.images import plan as image_planning
from lorakeet.kinds.images.data import split
from lorakeet.kinds.images.kind import KIND, ImagePlanResult
from lorakeet.memory.cuda import CONTEXT
from lorakeet.train.checkpoint import require_same
from lorakeet.train.progress import Record, Reporter
from lorakeet.verbs import finetune as workflow
from lorakeet.verbs.finetune import FinetuneResult, finetune
from lorakeet.verbs.options import FinetuneOptions
from tiny.image_runs import image_config, image_run
from tiny.pictures import drawn
from tiny.pipelines import save_tiny_scorer

pytestmark = pytest.mark.slow  # they share what takes seconds to make


@pytest.fixture(scope="module")
def result(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    return image_run(tiny_sd_folder, tmp_path_factory.mktemp("run"))


def copied(result: FinetuneResult, folder: Path) -> Path:
    """A copy of the run, whose pictures stay where they are, for tests that write into it."""
    return Path(shutil.copytree(result.run.path, folder / "run"))


def test_the_run_folder_holds_what_it_should(result: FinetuneResult) -> None:
    run = result.run
    assert read_run(run.config).diffusion.prediction == "epsilon" and len(json.loads(run.split.read_text())["held_out"]) == 8
    assert (run.adapter / "adapter_config.json").is_file() and len(list((run.path / "samples").iterdir())) == 4
    assert read_certificate(run.certificate).passed


def test_the_report_tells_base_from_adapter(result: FinetuneResult) -> None:
    report = read_report(result.run.report)
    assert report == result.report and report.task == "image"
    assert report.comparisons[0].difference.value < 0, "of eight pictures no interval is claimed"
    assert report.samples is not None and report.samples.columns[0] == "base" and report.memorisation is not None
    assert "Not run" in report.facts and any("that it is evaluated on" in warning for warning in report.warnings)
    assert [command.command.split()[1] for command in report.next_commands] == ["generate", "convert"]
    mapping = result.to_mapping()
    assert mapping["pictures"] == {"train": 12, "held_out": 8, "test": 0} and mapping["outcome"]["steps"] == 8


def test_the_commands_that_are_printed_work(result: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert result.report is not None
    monkeypatch.chdir(tmp_path)
    for command in result.report.next_commands:
        program, *words = shlex.split(command.command)
        assert program == "lorakeet" and main(words) == 0, command.command
    assert (tmp_path / "run-pictures" / "000.png").is_file() and (tmp_path / "run.safetensors").is_file()


def test_a_finished_run_is_evaluated_again_with_a_scorer(tiny_sd_folder: Path, result: FinetuneResult, tmp_path: Path) -> None:
    run, scorer = copied(result, tmp_path), save_tiny_scorer(tmp_path / "clip")
    config = image_config(tiny_sd_folder, result.run.path.parent, diffusion__scorer=scorer, out=run)
    found = finetune(config, FinetuneOptions(resume=run), console=Console(quiet=True))
    assert found.report is not None and "Not run" not in found.report.facts
    assert str(scorer) in found.report.facts["Samples scored by"]
    metrics = [comparison.metric for comparison in read_report(found.run.report).comparisons]
    assert metrics == ["denoising_loss", "prompt_distance", "style_distance"]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_transformer_is_trained_proved_and_written(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{kind}_folder")
    found = image_run(folder, tmp_path, images__resolution=16, memory__budget="20GB", lora__target_modules="attention,mlp")
    report, run = found.report, found.run
    assert report is not None and report.comparisons[0].difference.value < 0 and read_certificate(run.certificate).passed
    assert read_run(run.config).diffusion.prediction == "flow" and len(list((run.path / "samples").iterdir())) == 4
    assert found.setup.residency.plan is not None and found.setup.residency.plan.tensors > 0
    names = peft.read(run.adapter).pairs
    assert names and all(name.startswith(("transformer_blocks", "single_transformer_blocks")) for name in names)
    assert main(["convert", str(run.path), str(tmp_path / "x.safetensors"), "--to", "diffusers"]) == 0
    assert main(["generate", "--adapter", str(run.path), "--prompt", "red box", "--size", "16x24", "--steps", "2",
                 "--out", str(tmp_path / "drawn")]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("diffusion.min_snr_gamma", "5", "weighted by how often"), ("diffusion.prediction", "epsilon", "use auto")],
)
def test_settings_of_diffusion_do_not_go_with_a_flow(
    flag: str, value: str, message: str, tiny_sd3_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        image_run(tiny_sd3_folder, tmp_path, images__resolution=16, **{flag.replace(".", "__"): value})


def test_a_finished_run_is_evaluated_again_to_the_same_numbers(result: FinetuneResult) -> None:
    config = read_run(result.run.config)
    again = finetune(config, FinetuneOptions(resume=result.run.path), console=Console(quiet=True))
    assert again.report is not None and result.report is not None
    assert again.report.comparisons == result.report.comparisons and again.report.samples == result.report.samples


def test_other_verbs_say_what_to_do_with_it(result: FinetuneResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(result.run.path), "--out", str(tmp_path / "x")]) == 2
    assert "is a run of kind image" in capsys.readouterr().err
    assert main(["plan", str(result.run.config)]) == 0
    assert "Peak of the run" in capsys.readouterr().out
    for kind in ("kohya", "diffusers"):
        assert main(["convert", str(result.run.path), str(tmp_path / f"{kind}.safetensors"), "--to", kind, "--base",
                     read_run(result.run.config).model.path]) == 0  # fmt: skip


def test_a_dry_run_writes_nothing_but_the_cache(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    found = finetune(image_config(tiny_sdxl_folder, tmp_path), FinetuneOptions(dry_run=True), console=Console(quiet=True))
    assert found.to_mapping()["dry_run"] and not (tmp_path / "run").exists()


def test_a_subject_with_its_kind_beside_it_and_samples_on_the_way(tiny_sd_folder: Path, tmp_path: Path) -> None:
    kind = {"images__prior_caption": "a box", "images__prior_count": 3, "diffusion__prior_weight": 0.5}
    found = image_run(tiny_sd_folder, tmp_path, **kind, diffusion__progress=True, train__steps=2, train__evaluate_every=2)
    assert found.report is not None
    assert "3 of the subject's class (drawn by the base of 'a box'), weight 0.5" in found.report.facts["Pictures"]
    assert sorted(path.name for path in (found.run.path / "progress").iterdir()) == ["step-000000", "step-000002"]
    pictures = [next(folder.iterdir()).read_bytes() for folder in sorted((found.run.path / "progress").iterdir())]
    assert pictures[0] != pictures[1]
    samples = {path.name: path.read_bytes() for path in (found.run.path / "samples").iterdir()}
    assert samples["0-seed0-base.png"] == pictures[0]
    resumed = finetune(read_run(found.run.config), FinetuneOptions(resume=found.run.path), console=Console(quiet=True))
    assert resumed.report is not None and resumed.report.comparisons == found.report.comparisons


def test_a_quantised_unet_is_trained_and_certified(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    changes = {"model__quantize": "nf4", "diffusion__checkpointing": True, "diffusion__seeds": 0, "train__steps": 4}
    found = image_run(tiny_sdxl_folder, tmp_path, **changes)
    assert found.outcome is not None and (found.outcome.best_loss or 9) < (found.outcome.base_loss or 0)
    assert read_certificate(found.run.certificate).passed
    assert found.report is not None and "linear layers of the UNet in nf4" in found.report.facts["Model"]


def test_float16_over_a_quantised_base_is_certified_and_reported(
    tiny_sd_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = {"model__dtype": "float16", "model__quantize": "int8", "diffusion__seeds": 0, "train__steps": 4}
    found = image_run(tiny_sd_folder, tmp_path, **few)
    assert found.outcome is not None and (found.outcome.best_loss or 9) < (found.outcome.base_loss or 0)
    certificate = read_certificate(found.run.certificate)
    assert certificate.passed and certificate.facts["dtype"] == "float16" and certificate.facts["rounding"].startswith("none")
    assert found.report is not None and "float16 weights" in found.report.facts["Model"]
    assert found.report.speed["Loss scale"] == "65,536 at the end; 0 of 4 steps overflowed float16 and were left out"
    assert "cannot run with" not in capfd.readouterr().err


def test_a_base_that_was_moved_is_known_by_its_content(tiny_sd_folder: Path, result: FinetuneResult, tmp_path: Path) -> None:
    run, moved = copied(result, tmp_path), Path(shutil.copytree(tiny_sd_folder, tmp_path / "elsewhere"))
    config = image_config(moved, result.run.path.parent, out=run)
    again = finetune(config, FinetuneOptions(resume=run), console=Console(quiet=True))
    assert again.outcome is not None and again.outcome.steps == 8


def test_a_run_started_with_other_arithmetic_is_not_resumed(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before it was in the identity, with an older number, or with an autoencoder that scales otherwise."""
    first = image_run(tiny_sd_folder, tmp_path, diffusion__seeds=0, train__steps=2)
    model = Path(shutil.copytree(tiny_sd_folder, tmp_path / "scaled"))
    settings = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.5}))
    other = image_config(model, tmp_path, diffusion__seeds=0, train__steps=2)
    with pytest.raises(ConfigError, match="latents and conditioning changed"):
        finetune(other, FinetuneOptions(resume=first.run.path), console=Console(quiet=True))
    config = read_run(first.run.config)
    monkeypatch.setattr(image, "ARITHMETIC", image.ARITHMETIC + 1)
    with pytest.raises(ConfigError, match="this version of Lorakeet computes pictures otherwise"):
        finetune(config, FinetuneOptions(resume=first.run.path), console=Console(quiet=True))
    monkeypatch.undo()
    now = image.KIND.identity(first.setup, {})
    before = {key: value for key, value in now.items() if not key.startswith(("image arithmetic", "latents"))}
    require_same(now, now, run=first.run.path)
    assert len(before) == len(now) - 2
    with pytest.raises(ConfigError, match="this version of Lorakeet computes pictures otherwise"):
        require_same(before, now, run=first.run.path)


def test_a_resumed_run_with_other_pictures_or_settings_is_refused(
    tiny_sd_folder: Path, result: FinetuneResult, tmp_path: Path
) -> None:
    run = copied(result, tmp_path)
    other = image_config(tiny_sd_folder, result.run.path.parent, diffusion__min_snr_gamma=5, out=run)
    with pytest.raises(ConfigError, match="diffusion settings"):
        finetune(other, FinetuneOptions(resume=run), console=Console(quiet=True))


class _AfterThree(Reporter):
    def step(self, record: Record) -> None:
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_is_not_split_anew(tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later rules call all pictures copies, and a picture came that is none of the run: the result is that of a run unbroken."""
    few = {"diffusion__seeds": 0, "train__steps": 6}
    whole = image_run(tiny_sd_folder, tmp_path, **few, out=tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(RunStopped):
        patched.setattr(workflow, "reporter_for", lambda *_, **__: _AfterThree())
        image_run(tiny_sd_folder, tmp_path, **few)
    monkeypatch.setattr(split, "duplicate_groups", lambda rows, bits: [0] * len(rows))
    Image.fromarray(drawn(90)[0]).save(tmp_path / "photos" / "000-came.png")
    console = Console(record=True, width=300, file=io.StringIO())
    resumed = finetune(read_run(tmp_path / "run" / "config.yaml"), FinetuneOptions(resume=tmp_path / "run"), console=console)
    assert "pictures added to their folders since are not part of this run" in console.export_text()
    assert resumed.report is not None and whole.report is not None
    file = Path("adapter") / "adapter_model.safetensors"
    assert (whole.run.path / file).read_bytes() == (resumed.run.path / file).read_bytes()
    assert resumed.report.comparisons == whole.report.comparisons and resumed.report.warnings == whole.report.warnings
    gone = resumed.setup.dataset.train[0].path
    gone.unlink()
    with pytest.raises(DataError, match=rf"{gone.name} is gone\. Restore the old pictures, or start a new run"):
        finetune(read_run(tmp_path / "run" / "config.yaml"), FinetuneOptions(resume=tmp_path / "run"), console=console)


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds beside tensors is a number, and not measured by running a small model."""
    monkeypatch.setattr(image_planning, "image_runtime_bytes", lambda config, dtype: 10**9)


@pytest.fixture
def configurations(tiny_sdxl_folder: Path, tmp_path: Path) -> Path:
    """A pipeline without any weights."""
    for file in tiny_sdxl_folder.rglob("*.json"):
        copy = tmp_path / "shapes" / file.relative_to(tiny_sdxl_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path / "shapes"


def planned(folder: Path, room: Path, budget: str = "", device: str = "cpu", **changes: Any) -> tuple[ImagePlanResult, str]:
    text = io.StringIO()
    changes = {"lora__target_modules": "all-linear", **changes}
    config = image_config(folder, room, memory__budget=budget, model__device=device, **changes)
    return KIND.plan(config, Console(file=text, width=200)), text.getvalue()


def test_neither_weights_nor_pictures_are_needed(configurations: Path, tmp_path: Path) -> None:
    result, text = planned(configurations, tmp_path, diffusion__scorer="some/clip")
    assert "Not counted: diffusion.scorer some/clip" in text
    assert "Peak of the run" in text and "train step" in text and result.advice == ()
    mapping = result.to_mapping()
    assert mapping["fits"] is None and mapping["micro_batch"] == {"pictures": 4, "size": [16, 16]}
    assert mapping["peak"] == max(phase["bytes"] for phase in mapping["phases"]) > mapping["card_tensors"] > 0


@pytest.mark.usefixtures("no_probe")
def test_gpu_memory_is_planned_without_a_gpu(configurations: Path, tmp_path: Path) -> None:
    result, text = planned(configurations, tmp_path, device="cuda:1")
    assert "Memory on cuda:1" in text and result.to_mapping()["device"] == "cuda:1"
    phases = {phase.name: phase for phase in result.planned.forecast.phases}
    assert "load" not in phases and all(phase.kinds["runtime"] == CONTEXT for phase in phases.values())
    beside = result.peak - result.planned.tensors
    assert CONTEXT < beside < CONTEXT + (256 << 20), "the context, and what torch's allocator keeps around the tensors"
    on_cpu, _ = planned(configurations, tmp_path)
    assert on_cpu.planned.tensors == result.planned.tensors
    assert phases["certify"].kinds["base"] == phases["final eval"].kinds["base"], "one base is away before another comes"


def test_what_finetune_refuses_is_not_planned(configurations: Path, tmp_path: Path) -> None:
    config = image_config(configurations, tmp_path, ranks__choose="prune")
    with pytest.raises(ConfigError, match=r"ranks\.choose is prune, which is for text models"):
        KIND.plan(config, Console(file=io.StringIO()))


@pytest.mark.usefixtures("no_probe")
def test_a_budget_is_answered_with_what_helps(configurations: Path, tmp_path: Path) -> None:
    result, text = planned(configurations, tmp_path, budget="64MB")
    assert "more than the budget" in text and "is still too much" in text
    changes = [item.change for item in result.advice]
    assert changes == ["--diffusion.at_once 1", "--diffusion.at_once 1 --diffusion.checkpointing true", "--model.dtype bfloat16",
                       "--model.quantize.method nf4", "--lora.target_modules attention"]  # fmt: skip
    enough, text = planned(configurations, tmp_path, budget="100TB")
    assert enough.to_mapping()["fits"] and "less than the budget" in text and "this machine has" in text
