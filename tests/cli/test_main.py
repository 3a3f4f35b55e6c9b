"""`cli.main`: verbs, exit codes, and where each kind of output goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lorakeet.verbs.options as verbs_module
from lorakeet import __version__
from lorakeet.cli.main import main
from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, DataError, LorakeetError, Remedy, RunStopped, VerificationFailed
from lorakeet.verbs.early import checks as early_checks
from lorakeet.verbs.options import VERBS, MergeOptions


class Outcome:
    """What a workflow returns, as the command line sees it."""

    def __init__(self, mapping: dict[str, Any], exit_code: int = 0) -> None:
        self.mapping = mapping
        self.exit_code = exit_code

    def to_mapping(self) -> dict[str, Any]:
        return self.mapping


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig | None, Any]]:
    """Replaces the work of every verb by a note of the settings and options that it was called with."""
    calls: list[tuple[RunConfig | None, Any]] = []

    def note(self: verbs_module.Verb, options: Any, *, config: RunConfig | None, console: Console) -> Outcome:
        calls.append((config, options))
        console.print("working")
        return Outcome({"verb": self.name, "é": 1})

    monkeypatch.setattr(verbs_module.Verb, "run", note)
    monkeypatch.setattr(early_checks, "check_early", lambda verb, options, config: None)
    return calls


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(self: Any, options: Any, **rest: Any) -> None:
        raise error

    monkeypatch.setattr(verbs_module.Verb, "run", run)
    monkeypatch.setattr(early_checks, "check_early", lambda verb, options, config: None)


def test_help_lists_every_verb_and_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert f"{verb.name} " in text and verb.summary in text
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Verbs:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"Usage: lorakeet {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetun"], "No such verb 'finetun'. Did you mean 'finetune'?"),
        (["finetune", "--lora.rnak", "8"], "No such flag '--lora.rnak'. Did you mean '--lora.rank'?"),
        (["finetune", "--rank", "8"], "No such flag '--rank'. Did you mean '--lora.rank'?"),
        (["merge", "a", "--outt", "x"], "No such flag '--outt'. Did you mean '--out'?"),
        (["merge", "a"], "out is missing in the command lorakeet merge; expected a path."),
        (["evaluate", "a", "b"], "Got unexpected extra argument (b)"),
        (["finetune", "--lora.rank"], "Option '--lora.rank' requires an argument"),
        (["finetune", "--model", "m", "--data", "d", "--lora.rank", "x"], "lora.rank (flag --lora.rank) is 'x' (text)"),
        (["finetune", "--model", "m", "--data", "d", "--lora.rank", "-1"], "lora.rank is -1"),
        (["finetune", "none.yaml"], "none.yaml does not exist"),
        (["finetune", "--resume", "nowhere"], "--resume nowhere: this is no run folder"),
        (["finetune", "a.yaml", "--resume", "r", "--out", "x"], "Leave out a.yaml, --out"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.startswith("Error: ")
    assert "Traceback" not in output.err and output.out == ""


def test_flags_and_file_reach_the_workflow(called: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "drug.yaml"
    file.write_text("model: m\ndata: rows.jsonl\nlora: {rank: 4, alpha: 12}\n")
    flags = ["--lora.rank", "8", "--lora.target_modules", "q_proj", "--lora.target_modules", "k_proj", "--dry-run"]
    assert main(["finetune", str(file), *flags, "--lora.rank_pattern", "q=2,k=3", "--model.dtype", "float32"]) == 0
    config, options = called[0]
    assert isinstance(config, RunConfig)
    assert (config.lora.rank, config.lora.alpha, config.model.path, config.data.train) == (8, 12.0, "m", "rows.jsonl")
    assert config.lora.target_modules == ("q_proj", "k_proj") and config.lora.rank_pattern == {"q": 2, "k": 3}
    assert config.model.dtype == "float32"
    assert options.dry_run is True and options.resume is None
    assert capsys.readouterr().out == "working\n"


def test_a_resumed_run_keeps_its_own_settings(called: list[Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\ndata: rows.jsonl\ntrain: {seed: 9}\n")
    assert main(["finetune", "--resume", str(tmp_path)]) == 0
    config, options = called[0]
    assert config.train.seed == 9 and options.resume == tmp_path


def test_positional_arguments_and_options_are_passed_by_their_names(called: list[Any]) -> None:
    assert main(["merge", "runs/a", "--out", "merged"]) == 0
    assert called[0] == (None, MergeOptions(("runs/a",), out=Path("merged")))
    assert main(["merge", "runs/a,b", "runs/c", "--out", "merged", "--weights", "0.7,0.3"]) == 0
    assert called[1] == (None, MergeOptions(("runs/a,b", "runs/c"), out=Path("merged"), weights=(0.7, 0.3)))


def test_json_stands_alone_on_standard_output(called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "runs/a", "--out", "merged", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"verb": "merge", "é": 1} and output.err == "working\n"


def test_what_mends_an_error_is_said_to_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    remedy = Remedy("data.encoding", "cp1252", "Read it as cp1252")
    raising(monkeypatch, DataError(f"not utf-8; set {remedy.flag}", remedies=[remedy]))
    assert main(["doctor", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["error"]["code"] == "data-refused"
    assert found["error"]["remedies"] == [{"setting": "data.encoding", "value": "cp1252", "words": "Read it as cp1252"}]


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("bad [rank]"), 2), (VerificationFailed("bad [rank]"), 3), (RunStopped("bad [rank]"), 4)]
)
def test_errors_have_exit_codes_and_no_traceback(
    error: LorakeetError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    assert main(["doctor"]) == code
    assert capsys.readouterr() == ("", "Error: bad [rank]\n")
    assert main(["doctor", "--json"]) == code
    output = capsys.readouterr()
    said = {"code": type(error).CODE, "message": "bad [rank]", "values": {}, "remedies": []}
    assert json.loads(output.out) == {"error": said} and output.err == ""
    assert main(["doctor", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_wrong_flag_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--jsn", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["code"] == "setting-unknown" and found["values"] == {"setting": "--jsn", "nearest": "--json"}


@pytest.mark.parametrize(("words", "setting", "remedy"), [
    (["finetune", "--quick"], "--quick", "try-rates"), (["tune", "--quick"], "--quick", "try-rates"),
    (["finetune", "--model.kernels", "triton"], "--model.kernels", ""),
    (["plan", "--train.cuda_graphs"], "--train.cuda_graphs", ""),
])  # fmt: skip
def test_a_removed_flag_is_named_with_what_replaces_it(
    words: list[str], setting: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["code"] == "setting-removed" and found["values"] == {"setting": setting}
    assert [one["setting"] for one in found["remedies"]] == [remedy] * bool(remedy)


def test_a_wrong_verb_lists_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetnue", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["code"] == "verb-unknown" and {"finetune", "completion"} <= {*found["values"]["known"]}


def test_several_problems_are_said_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--context", "x", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["code"] == "several-problems"
    assert [(one["code"], one["values"]["setting"]) for one in found["values"]["problems"]] == [
        ("setting-missing", "model"), ("setting-wrong-type", "context")
    ]  # fmt: skip


def test_ctrl_c_leaves_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert "Stopped by Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_clear_away_too(
    which: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleared: list[bool] = []

    def run(self: Any, options: Any, **rest: Any) -> None:
        try:
            signal.raise_signal(which)
        finally:
            cleared.append(True)

    monkeypatch.setattr(verbs_module.Verb, "run", run)
    monkeypatch.setattr(early_checks, "check_early", lambda verb, options, config: None)
    before = signal.signal(which, signal.SIG_DFL)  # under nohup a hang-up is ignored
    try:
        assert main(["doctor"]) == code and cleared
        assert f"Stopped by {which.name}" in capsys.readouterr().err
        assert main(["doctor", "--json"]) == code
    finally:
        signal.signal(which, before)
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "stopped"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_a_result_may_set_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs_module.Verb, "run", lambda self, options, **rest: Outcome({}, exit_code=2))
    assert main(["doctor"]) == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_LORAKEET_COMPLETE" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shell_is_offered_verbs_flags_and_words() -> None:
    def offered(words: str, position: int) -> str:
        environment = {**os.environ, "_LORAKEET_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        command = [sys.executable, "-m", "lorakeet"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "plain,finetune" in offered("lorakeet fi", 1)
    assert "plain,--lora.rank\n" in offered("lorakeet finetune --lora.r", 2)
    assert offered("lorakeet finetune --model.dtype b", 3).split() == ["plain,bfloat16"]


def test_the_process_ends_without_a_search_for_cycles() -> None:
    """With torch loaded the interpreter's last search takes seconds, for which a server that was stopped would still be there."""
    ending = """
import atexit, sys
from lorakeet import __main__

class Knot:
    def __del__(self):
        print("searched", flush=True)

def run():
    knot = Knot()
    knot.itself = knot
    return 3

atexit.register(print, "at exit", flush=True)
__main__.run = run
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", ending], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and done.stdout == "at exit\n", done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["finetune", "--help"]])
def test_output_to_a_full_disk_is_one_message(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "lorakeet", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("Error: The disk (or the quota) is full")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
