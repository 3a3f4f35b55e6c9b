"""`lorakeet evaluate --tasks`: base and adapter answer the same rows of lm-evaluation-harness, with paired intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.replying.harness import HarnessTasks, TaskScores, require_tasks, task_scores, tasks_report
from tiny.harness_tasks import write_tasks
from tiny.runs import run, write_rows

SPEC = EvaluateSpec(resamples=500)
installed = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('lm_eval')", reason="lorakeet[tasks] is not here")


def test_values_of_rows_are_distinguished_from_values_of_all_rows() -> None:
    first = {"doc_id": 0, "acc": 0.0, "ppl": (-2.0, 3), "words": -3.0}
    second = {"doc_id": 1, "acc": 1.0, "ppl": (-1.0, 3), "words": -1.0}
    samples = [second, first, {"doc_id": 0, "acc": 1.0}]  # the last one by another filter
    results = {
        "samples": {"quiz": samples}, "higher_is_better": {"quiz": {"acc": True, "ppl": False, "words": False}},
        "results": {"quiz": {"acc,none": 0.5, "ppl,none": 7.5, "words,none": 7.39, "acc,other": 1.0}},
        "groups": {"all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": 0.1}},
    }  # fmt: skip
    found = task_scores(results)
    assert found.by_row["quiz acc"].tolist() == [0.0, 1.0], "in the order of rows, by the first filter"
    assert found.whole == {"quiz ppl": 7.5, "quiz words": 7.39, "all acc": 0.5}


def test_a_report_compares_both_on_the_same_rows() -> None:
    def scores(values: list[float]) -> TaskScores:
        return TaskScores({"quiz acc": np.array(values)}, {"quiz ppl": 7.5}, {"quiz acc": True})

    found = {"adapter": scores([1.0] * 20), "base": scores([0.0] * 18 + [1.0] * 2)}
    report = tasks_report("t", found, SPEC)
    (compared,) = report.comparisons
    assert compared.verdict == "better" and compared.test == "McNemar" and compared.difference.value == pytest.approx(0.9)
    assert "quiz ppl has no value for each row" in report.warnings[0]


def test_several_tasks_are_adjusted_for_their_number_and_all_decide() -> None:
    better, worse, same = np.array([1.0] * 20), np.array([0.0] * 20), np.array([1.0, 0.0] * 10)
    names = {"one acc": True, "two acc": True, "three acc": True}
    mine = TaskScores(dict(zip(names, (better, worse, same), strict=True)), {}, names, shortened=3)
    base = TaskScores(dict(zip(names, (worse, better, same), strict=True)), {}, names)
    report = tasks_report("t", {"adapter": mine, "base": base}, SPEC)
    assert all("Holm over 3" in one.test for one in report.comparisons)
    assert report.verdict is not None and report.verdict.tone == "mixed"
    assert "better than its base in 1 and worse in 1" in report.verdict.phrases[0].text
    assert "3 prompts were longer" in report.warnings[-1]


def test_without_the_harness_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EnvironmentProblem, match=r'pip install "lorakeet\[tasks\]"'):
        require_tasks(HarnessTasks(("arc_easy",)))


def test_task_files_that_the_harness_fails_at_are_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class TaskManager:
        """Fails as the harness does at a task file without a name."""

        def __init__(self, include_path: str) -> None:
            raise KeyError("task")

    tasks = ModuleType("lm_eval.tasks")
    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    with pytest.raises(EnvironmentProblem, match=f"cannot list its tasks and those of {tmp_path}: KeyError: 'task'"):
        require_tasks(HarnessTasks(("a",), tmp_path))


@installed
def test_an_unknown_task_and_folder_are_named(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    with pytest.raises(ConfigError, match=r"no task 'tiny_choise'.*tiny_choice"):
        require_tasks(HarnessTasks(("tiny_choise",), folder))
    with pytest.raises(ConfigError, match="does not exist; name a folder"):
        require_tasks(HarnessTasks(("tiny_choice",), tmp_path / "none"))


@installed
def test_a_run_is_evaluated_on_tasks(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Is {n} even? Answer:", "completion": " yes" if n % 2 == 0 else " no"} for n in range(20, 80)]
    run(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", {"train.steps": 3})
    folder = write_tasks(tmp_path / "tasks")
    command = ["evaluate", str(tmp_path / "run"), "--tasks", "tiny_choice,tiny_written,tiny_read", "--task-folder", str(folder)]
    assert main([*command, "--task-rows", "8", "--out", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "tiny_read word_perplexity has no value for each row" in " ".join(said.split())
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {one["metric"]: one["difference"]["n"] for one in report["comparisons"]}
    assert found == {"tiny_choice acc": 8, "tiny_written exact_match": 8}
    assert main([*command, "--data", str(tmp_path / "rows.jsonl")]) == 2 and "--data stands beside it" in capsys.readouterr().err
