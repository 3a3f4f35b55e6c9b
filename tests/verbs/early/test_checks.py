"""What is refused before torch is imported, in the words of the check that comes later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakeet.config import dump_yaml, read_run
from lorakeet.errors import ConfigError, DataError
from lorakeet.registry import function_at
from lorakeet.verbs.early import checks as early_checks
from lorakeet.verbs.options import VERBS, FinetuneOptions, PlanOptions
from lorakeet.verbs.quickstart import config_path
from tiny.forked import Workers, forking

RECORD = json.dumps({"text": "good film", "label": "yes"}) + "\n"


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """A process that has imported the command line alone, and forks one for each command."""
    with forking(Path(__file__).with_name("refusal_worker.py")) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows, an earlier run with these rows, an adapter folder, and a folder that stands for a model."""
    (tmp_path / "rows.jsonl").write_text(RECORD)
    (tmp_path / "broken.jsonl").write_text(f"{RECORD}{{\n")
    (tmp_path / "rows.ods").write_text("a")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").mkdir()
    settings = {"model": str(tmp_path / "model"), "data.train": str(tmp_path / "gone.jsonl")}
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(read_run(None, settings)))
    return tmp_path


TRAIN = ["--model", "model", "--data.train"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", *TRAIN, "rows.jsonk"], "'rows.jsonk' does not exist in"),
        (["finetune", *TRAIN, "rows.ods"], "rows.ods ends in '.ods', which has no reader"),
        (["finetune", *TRAIN, "rows.jsonl", "--data.text_column", "review"], "the columns 'text', 'label' match no known shape"),
        (["finetune", *TRAIN, "rows.jsonl", "--data.group_column", "patient"], "rows.jsonl has no column 'patient'"),
        (["finetune", *TRAIN, "broken.jsonl"], "broken.jsonl:2: broken JSON at column"),
        (["tune", *TRAIN, "rows.jsonl", "--data.test", "broken.jsonl"], "broken.jsonl:2: broken JSON at column"),
        (["finetune", *TRAIN, "rows.jsonl", "--data.test", "gone.csv"], "'gone.csv' does not exist in"),
        (["finetune", *TRAIN, "rows.jsonl", "--out", "run"], "The run folder run exists already"),
        (["finetune", "--model", "./modle", "--data.train", "rows.jsonl"], "'./modle' does not exist in"),
        (["finetune", "--resume", "run"], "gone.jsonl' does not exist in"),
        (["finetune", "--kind", "image", *TRAIN, "pictures"], "data.train pictures is not a folder"),
        (["plan", "--model", "./modle"], "'./modle' does not exist in"),
        (["tune", *TRAIN, "gone.jsonl"], "'gone.jsonl' does not exist in"),
        (["tune", *TRAIN, "rows.jsonl", "--results", "run"], "run exists already and is no empty folder"),
        (["evaluate", "runs/nope"], "runs/nope does not exist; expected the folder of a run"),
        (["evaluate", "run"], "gone.jsonl' does not exist in"),
        (["evaluate", "adapter", "--data", "gone.jsonl"], "'gone.jsonl' does not exist in"),
        (["evaluate", "adapter", "--out", "run"], "run exists already and is no empty folder"),
        (["predict", "run", "--data", "/dev/null", "--out", "new.csv"], "/dev/null is a pipe or a device; expected a regular"),
        (["predict", "run", "--data", "gone.jsonl", "--out", "new.csv"], "'gone.jsonl' does not exist in"),
        (["predict", "run", "--data", "rows.jsonl", "--out", "new.ods"], "ends in '.ods'; expected one of .csv, .tsv, .xlsx"),
        (["predict", "run", "--data", "rows.jsonl", "--out", "rows.jsonl"], "rows.jsonl exists already"),
        (["merge", "runs/nope", "--out", "merged"], "runs/nope does not exist"),
        (["merge", "run", "--out", "adapter"], "adapter exists already and is never overwritten"),
        (["export", "runs/nope", "--out", "model.gguf"], "runs/nope does not exist"),
        (["export", "run", "--out", "adapter"], "adapter exists already and is never overwritten"),
        (["compress", "runs/nope", "--out", "small"], "runs/nope does not exist"),
        (["compress", "run", "--out", "small"], "gone.jsonl' does not exist in"),
        (["verify", "runs/nope"], "runs/nope does not exist"),
        (["verify", "run"], "gone.jsonl' does not exist in"),
        (["convert", "runs/nope", "out", "--to", "peft"], "runs/nope does not exist"),
        (["extract", "./tuned", "model", "--out", "new"], "'./tuned' does not exist in"),
        (["quantize", "./modle", "--method", "nf4", "--out", "new"], "'./modle' does not exist in"),
        (["quantize", "model", "--method", "gptq", "--out", "new", "--calibration", "gone.txt"], "'gone.txt' does not exist in"),
        (["generate", "--prompt", "x", "--out", "run"], "run exists already and is no empty folder"),
        (["generate", "--prompt", "x", "--out", "new", "--adapter", "a=runs/nope"], "runs/nope does not exist"),
        (["generate", "--prompt", "x", "--out", "new", "--model", "./modle"], "'./modle' does not exist in"),
        (["generate", "--prompt", "x", "--out", "new", "--adapter", "a=run", "--each", "b"], "No adapter is called 'b'"),
        (["serve", "--model", "./modle", "--port", "0"], "'./modle' does not exist in"),
        (["serve", "--model", "model", "--port", "0", "--adapter", "a=runs/nope"], "runs/nope does not exist"),
        (["serve", "--model", "model", "--port", "70000"], "--port is 70000; expected 0 to 65535"),
        (["serve", "--model", "model", "--port", "0", "--keys", "gone.json"], "gone.json"),
        (["serve", "--model", "org/base", "--engine", "vllm", "--adapter", "a=runs/nope"], "runs/nope does not exist"),
        (["serve", "--model", "model", "--engine", "llama"], "expected one of 'lorakeet', 'vllm'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_refused_without_torch(arguments: list[str], words: str, folder: Path, workers: Workers) -> None:
    workers.start(words=arguments, folder=str(folder))
    ended = workers.end()
    said, _, imported = ended["said"].strip().rpartition("\n")
    assert words in said and imported == "2 False False" and ended["code"] == 2


def test_each_verb_that_reads_files_has_its_check() -> None:
    named = {verb.name: verb.early_checks for verb in VERBS if verb.early_checks}
    assert {verb.name for verb in VERBS} - set(named) == {"doctor", "check"}  # these import no torch at all
    assert {one for one in named.values() if ":" not in one} == set(early_checks._CHECKS)
    assert all(callable(function_at(one)) for one in named.values() if ":" in one), "those of kinds"
    assert {name for name, check in named.items() if check != name and ":" not in check} == set()


def test_the_quickstart_is_refused_an_old_folder_before_it_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched first; and a dry run is told so by the verb."""
    monkeypatch.setattr("lorakeet.verbs.packages.installed_version", lambda need: None)
    config = read_run(config_path(), {"out": str(tmp_path / "new")})
    early_checks.check_early("quickstart", FinetuneOptions(), config)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match="old"):
        early_checks.check_early("quickstart", FinetuneOptions(), read_run(config_path(), {"out": str(tmp_path / "old")}))


def test_a_plan_needs_no_rows_on_this_machine(folder: Path) -> None:
    """Its rows may be on the machine of the run; a column that is missing in rows that are here is refused."""
    place, options = {"model": str(folder / "model")}, PlanOptions()
    early_checks.check_early("plan", options, read_run(None, {**place, "data.train": str(folder / "gone.jsonl")}))
    wrong = {**place, "data.train": str(folder / "rows.jsonl"), "data.text_column": "review"}
    with pytest.raises(DataError, match="match no known shape"):
        early_checks.check_early("plan", options, read_run(None, wrong))
