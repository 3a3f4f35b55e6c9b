"""`studio.index`: run folders are the database; the index is a cache that may be deleted or damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorakeet.evaluate.certificate import Certificate, Check
from lorakeet.studio import index as module
from lorakeet.studio.index import Index, summary_of, tags_of


def made_run(folder: Path, *, losses: list[float], held_out: list[float], report: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model:\n  path: package:tiny\ndata: rows.jsonl\n")
    lines: list[dict[str, float]] = [{"step": 0, "held_out_loss": held_out[0]}] if held_out else []
    lines += [{"step": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    lines += [{"step": len(losses), "held_out_loss": value} for value in held_out[1:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99')
    if report:
        verdict = {"phrases": [{"text": "The adapter beats its base", "interval": "+0.1 to +0.2"}], "tone": "better"}
        (folder / "report.json").write_text(json.dumps({"title": "x", "verdict": verdict}))
        check = Check("saved file", "a", "b", {"difference": 0.0}, {"difference": 0.0}, True)
        Certificate("The run", (check,)).write(folder / "certificate.json")
    return folder


def test_a_summary_says_what_the_files_say(tmp_path: Path) -> None:
    found = summary_of(made_run(tmp_path / "a", losses=[3.0, 2.0, 1.0], held_out=[3.5, 1.5, 1.75], report=True))
    assert (found.model, found.rows, found.step, found.loss) == ("package:tiny", "rows.jsonl", 3, 1.0)
    assert (found.base, found.best, found.held_out, found.ended, found.passed) == (3.5, 1.5, 1.75, "done", True)
    assert found.verdict == "The adapter beats its base (+0.1 to +0.2)." and found.tone == "better"
    assert found.spark == (3.0, 2.0, 1.0)
    bare = summary_of(made_run(tmp_path / "b", losses=[], held_out=[]))
    assert (bare.ended, bare.loss, bare.passed, bare.problem) == ("", None, None, "")


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["better", "no difference shown"], "better than one, no difference from another shown"),
        (["no difference shown", "worse"], "worse than one, no difference from another shown"),
        (["better", "better"], "better than all, not in another metric"),
        (["better", "worse", "better"], "better than one, worse than another"),
    ],
)
def test_a_mixed_verdict_says_how_it_is_mixed(tmp_path: Path, verdicts: list[str], said: str) -> None:
    """In the metric of the headline; another metric does not count."""
    folder = made_run(tmp_path / "a", losses=[1.0], held_out=[], report=True)
    comparisons = [{"metric": "accuracy", "verdict": verdict} for verdict in verdicts] + [{"metric": "loss", "verdict": "worse"}]
    report = {"verdict": {"phrases": [], "tone": "mixed"}, "comparisons": comparisons}
    (folder / "report.json").write_text(json.dumps(report))
    assert summary_of(folder).against == said


def test_broken_files_are_named_and_do_not_end_the_list(tmp_path: Path) -> None:
    made_run(tmp_path / "good", losses=[1.0], held_out=[1.0])
    broken = made_run(tmp_path / "broken", losses=[1.0], held_out=[])
    (broken / "report.json").write_text("{")
    (broken / "config.yaml").write_text("a: [")
    (tmp_path / "no run").mkdir()
    (tmp_path / ".hidden").mkdir()
    found = {one.name: one for one in Index(tmp_path, tmp_path / "index").summaries()}
    assert set(found) == {"good", "broken"} and "not valid YAML" in found["broken"].problem and not found["good"].problem


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(folder: Path) -> module.RunSummary:
        read.append(folder.name)
        return summary_of(folder)

    monkeypatch.setattr(module, "summary_of", counted)
    for name in "abc":
        made_run(tmp_path / "runs" / name, losses=[1.0], held_out=[2.0])
    index = Index(tmp_path / "runs", tmp_path / "index")
    assert len(index.summaries()) == 3 and sorted(read) == ["a", "b", "c"]
    (tmp_path / "runs" / "b" / ".studio.json").write_text('{"tags": ["best", "keep"]}')
    assert {one.name: one.tags for one in Index(index.runs, index.cache).summaries()}["b"] == ("best", "keep")
    assert read[3:] == ["b"]
    index.cache.write_bytes(b"no database" * 1000)
    assert len(index.summaries()) == 3 and len(index.summaries()) == 3 and len(read) == 7
    index.cache.unlink()
    assert len(index.summaries(most=2)) == 2 and len(index.summaries(most=2)) == 3


BROKEN = [
    ("report.json", "[1]"), ("report.json", '{"verdict": "x"}'), ("report.json", '{"verdict": {"phrases": 1}}'),
    ("report.json", "[" * 100_000), ("metrics.jsonl", '{"step": null}\n'), ("metrics.jsonl", "[1]\n"),
    ("metrics.jsonl", '{"step": 1, "loss": {}}\n'), ("metrics.jsonl", "{}\n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_a_file_that_no_run_writes_is_a_problem_of_its_run_alone(tmp_path: Path, name: str, text: str) -> None:
    made_run(tmp_path / "good", losses=[1.0], held_out=[1.0])
    (made_run(tmp_path / "broken", losses=[1.0], held_out=[]) / name).write_text(text)
    found = {one.name: one for one in Index(tmp_path, tmp_path / "index").summaries()}
    assert found["broken"].problem and found["broken"].model == "package:tiny" and not found["good"].problem


def test_the_newest_runs_are_read_first(tmp_path: Path) -> None:
    for number, name in enumerate("abc", 1):
        os.utime(made_run(tmp_path / name, losses=[1.0], held_out=[]) / "config.yaml", (number, number))
    assert [one.name for one in Index(tmp_path, tmp_path / "index").summaries(most=2)] == ["c", "b"]


def test_only_a_loss_before_the_first_step_is_that_of_the_base(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "a", losses=[1.0], held_out=[])
    (folder / "metrics.jsonl").write_text('{"step": 50, "held_out_loss": 2.0}\n')
    assert (summary_of(folder).base, summary_of(folder).best) == (None, 2.0)


def test_a_run_that_vanished_is_forgotten(tmp_path: Path) -> None:
    index = Index(tmp_path / "runs", tmp_path / "index")
    assert index.summaries() == []
    made_run(tmp_path / "runs" / "a", losses=[1.0], held_out=[])
    assert len(index.summaries()) == 1
    os.rename(tmp_path / "runs" / "a", tmp_path / "a")
    assert index.summaries() == [] and tags_of(tmp_path / "a") == ()
