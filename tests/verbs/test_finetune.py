"""`verbs.finetune`: a whole run over the tiny Llama, what it leaves on disk, and that going on ends in the same bytes."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.core.adapter import Adapter
from lorakeet.data.split import read_split_record
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, RunStopped, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate, tolerance_check
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.peft import peft
from lorakeet.kinds.text import assemble as assembling
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.kind import TextRunKind
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import TextModel
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.train.checkpoint import found
from lorakeet.train.log import read_metrics
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.options import FinetuneOptions
from tiny.models import save_tiny_llama
from tiny.peft_oracle import into_peft
from tiny.runs import adapter_bytes, chats, quiet, reviews, run, settings, tree, write_rows

PROMPT = "alder birch cedar <|im_end|> quince"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(40))


def logits_of(text: TextModel, ids: torch.Tensor) -> torch.Tensor:
    """What the model, with its active adapter, answers through transformers' own forward."""
    set_attention(text.model, "sdpa")
    with torch.no_grad():
        return text.model(input_ids=ids).logits


def test_the_run_folder_holds_what_the_contract_says(finished: Any) -> None:
    path = finished.path
    assert {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} == {
        "config.yaml", "split.json", "adapter", "checkpoints", "metrics.jsonl", "report.json", "report.html", "certificate.json"
    }  # fmt: skip
    held = sorted(file.name for file in (path / "adapter").iterdir())
    assert held == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert [folder.name for folder in found(path / "checkpoints")] == ["step-000005", "step-000006"]
    record = read_split_record(path / "split.json")
    assert record["held_out"] == sorted(row.key for row in finished.result.setup.dataset.held_out)
    assert record["train_rows"] == 53 and record["test_rows"] == 13  # 60 rows, 6 held out, one dropped as a leak
    losses = [record for record in read_metrics(path / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4, 5, 6]
    certificate = read_certificate(path / "certificate.json")
    assert certificate.passed and [check.name for check in certificate.checks] == [
        "adapter on disk",
        "base untouched",
        "frozen weights",
        "trained = saved = loaded",
        f"adapter/ in PEFT {version('peft')}: logits",
        "own code",
    ]
    assert all(check.measured.get("loss", 0.0) == 0 for check in certificate.checks)
    assert peft.read(path / "adapter").base == str(finished.model)


@pytest.mark.slow
def test_many_dropped_rows_stand_in_the_verdict_and_the_warnings(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """A newcomer's case: 71 % of the rows were dropped as near-copies, and only the terminal said so."""
    given = reviews(20)
    near = [{**row, "text": f"{row['text']} zinnia"} for row in given[:5]]
    test = write_rows(tmp_path / "test.jsonl", [*reviews(4, seed=7), *near])
    data = write_rows(tmp_path / "rows.jsonl", given)
    held_out = write_rows(tmp_path / "held_out.jsonl", reviews(6, seed=8))
    changes = {"data.test": str(test), "data.held_out": str(held_out), "train.steps": "1"}
    report = run(tiny_llama_folder, data, tmp_path / "run", changes).report
    said = "5 of 20 training rows were DROPPED as copies of held-out or test rows, 5 of them near-copies"
    assert report.verdict is not None and f". {said}." in report.verdict.sentence
    assert [line for line in report.warnings if line.startswith(f"{said}; 15 were trained.")]
    assert said in (tmp_path / "run" / "report.html").read_text()


def test_the_report_is_filled_and_self_contained(finished: Any) -> None:
    report = read_report(finished.path / "report.json")
    assert report == finished.result.report
    assert [system.role for system in report.systems] == ["adapter", "base", "floor", "floor"]
    assert all({"accuracy", "macro_f1", "log_loss"} <= system.metrics.keys() for system in report.systems)
    assert "fitted to 59 rows" in report.systems[2].note  # training and held-out rows
    assert report.drift is not None and report.drift.texts == 4 and report.drift.mean_kl.value > 0
    assert report.curves is not None and len(report.curves.train) == 6 and report.curves.held_out[0].step == 0
    assert report.leaks is not None and [leak.action for leak in report.leaks] == ["dropped from training"]
    assert report.leak_search.startswith("Searched 54 training, 6 held-out, 13 test rows for texts that share 80 % of their")
    assert len(report.rows) == report.rows_of == 13
    assert {"Model", "Adapter", "Rows", "Seeds", "Versions", "Machine"} <= report.facts.keys()
    assert report.verdict is not None and report.memory[0].used and report.speed["Steps"] == "6 of 6 (all steps done)"
    assert report.certificate is not None and report.certificate.passed
    page = (finished.path / "report.html").read_text()
    assert "<svg" in page and not re.search(r"(src|href)=.?https?:", page)
    mapping = finished.result.to_mapping()
    assert mapping["rows"] == {"train": 53, "held_out": 6, "test": 13} and mapping["outcome"]["steps"] == 6
    json.dumps(mapping)
    assert finished.result.exit_code == 0


@pytest.mark.slow
def test_the_saved_settings_can_be_run_again_and_give_the_same_bytes(finished: Any, tmp_path: Path) -> None:
    config = read_run(finished.path / "config.yaml", {"out": str(tmp_path / "again")})
    assert "auto" not in (config.model.device, config.model.attention, config.model.dtype, config.model.products)
    finetune(config, console=quiet())
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(finished.path)
    assert (tmp_path / "again" / "split.json").read_bytes() == (finished.path / "split.json").read_bytes()


@pytest.mark.slow
def test_what_the_loop_says_reaches_the_person(finished: Any, tmp_path: Path) -> None:
    """Also where no terminal is, as in a log file: steps and held-out losses, and that a checkpoint was damaged."""
    copy, said = tmp_path / "copy", io.StringIO()
    shutil.copytree(finished.path, copy)
    (copy / "checkpoints" / "step-000006" / "trained.safetensors").write_bytes(b"x")
    finetune(read_run(copy / "config.yaml"), FinetuneOptions(resume=copy), console=Console(file=said, width=200))
    assert "The checkpoint step-000006 is damaged" in said.getvalue()
    assert "step 6/6 · loss " in said.getvalue() and "step 6: held-out loss " in said.getvalue()
    evaluated = ["Evaluation: base, adapter", "Drift: the base samples 4 texts"]
    before = ["step 6: held-out", *evaluated, "Certificate: what was", "pass  adapter on disk", "Report:"]
    places = [said.getvalue().find(words) for words in before]
    assert -1 not in places and places == sorted(places), "each long work is said before it begins"
    assert adapter_bytes(copy) == adapter_bytes(finished.path)


@pytest.mark.slow
def test_resuming_a_finished_run_evaluates_it_again_and_changes_no_adapter(finished: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    (copy / "report.json").unlink()
    config = read_run(copy / "config.yaml")
    result = finetune(config, FinetuneOptions(resume=copy), console=quiet())
    assert adapter_bytes(copy) == adapter_bytes(finished.path)
    assert result.report is not None and result.report.systems == finished.result.report.systems
    assert read_report(copy / "report.json").systems == finished.result.report.systems


@pytest.mark.slow
def test_a_run_without_its_last_steps_is_resumed_to_the_same_bytes(finished: Any, tmp_path: Path) -> None:
    """What a kill leaves: an older checkpoint, an older adapter, metrics that go too far, and nothing after training."""
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    for name in ("report.json", "report.html", "certificate.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints" / "step-000006")
    shutil.rmtree(copy / "adapter")
    finetune(read_run(copy / "config.yaml"), FinetuneOptions(resume=copy), console=quiet())
    assert adapter_bytes(copy) == adapter_bytes(finished.path)
    steps = [[record["step"] for record in read_metrics(path / "metrics.jsonl")] for path in (copy, finished.path)]
    assert steps[0] == steps[1]


def test_a_resumed_run_wants_the_rows_that_it_began_with(finished: Any, tmp_path: Path) -> None:
    copy, data = tmp_path / "copy", tmp_path / "rows.jsonl"
    shutil.copytree(finished.path, copy)
    before = tree(copy)
    write_rows(data, reviews(61, seed=9))
    config = read_run(copy / "config.yaml", {"data.train": str(data)})
    with pytest.raises(DataError, match="data has changed since this run started"):
        finetune(config, FinetuneOptions(resume=copy), console=quiet())
    assert tree(copy) == before


@pytest.mark.slow
def test_a_resumed_run_wants_the_model_that_it_began_with(finished: Any, tmp_path: Path) -> None:
    """Other weights of the same shapes under the same path: nothing but their content tells them apart."""
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(finished.model, model)
    run(model, finished.data, out)
    before = tree(out)
    shutil.rmtree(model)
    save_tiny_llama(model, seed=1)
    with pytest.raises(ConfigError, match=r"files of the base model changed since .* started \(sha256 .*; restore the old ones"):
        finetune(read_run(out / "config.yaml"), FinetuneOptions(resume=out), console=quiet())
    assert tree(out) == before


@pytest.mark.slow
def test_a_resumed_run_finds_its_model_at_another_place(finished: Any, tmp_path: Path) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished.path, out)
    shutil.copytree(finished.model, moved)
    config = read_run(out / "config.yaml", {"model.path": str(moved)})
    result = finetune(config, FinetuneOptions(resume=out), console=quiet())
    assert result.outcome is not None and result.outcome.steps == 6
    weights = "adapter_model.safetensors"  # the other file names the model's new place
    assert adapter_bytes(out)[weights] == adapter_bytes(finished.path)[weights]


def test_a_dry_run_writes_nothing(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = finetune(settings(tiny_llama_folder, rows, out), FinetuneOptions(dry_run=True), console=quiet())
    mapping = result.to_mapping()
    assert mapping["dry_run"] is True and mapping["steps"] == 6 and mapping["pairs"] == len(mapping["plan"]["entries"]) == 14
    assert mapping["trained_parameters"] == 3712 and mapping["tokens_per_epoch"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_run_to_go_on_with_writes_nothing(finished: Any) -> None:
    before = tree(finished.path)
    result = finetune(
        read_run(finished.path / "config.yaml"), FinetuneOptions(resume=finished.path, dry_run=True), console=quiet()
    )
    assert result.to_mapping()["dry_run"] is True and tree(finished.path) == before


@pytest.mark.slow
def test_rows_without_labels_are_evaluated_by_their_loss(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "chats.jsonl", chats(30))
    result = run(tiny_llama_folder, data, tmp_path / "run", {"train.steps": 12})
    assert result.report is not None and result.outcome is not None
    assert result.report.task == "language"
    adapter, base, *others = result.report.systems
    assert not any("loss" in system.metrics for system in others)
    assert (adapter.role, base.role) == ("adapter", "base") and {"loss", "perplexity"} <= adapter.metrics.keys()
    assert base.metrics["loss"].value == pytest.approx(result.outcome.base_loss, abs=1e-6)
    assert adapter.metrics["loss"].value == pytest.approx(result.outcome.best_loss, abs=1e-6)
    assert adapter.metrics["loss"].value < base.metrics["loss"].value
    assert "no test rows" in result.report.warnings[0]


def test_every_turn_of_the_assistant_is_a_target_through_the_template(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "chats.jsonl", chats(30))
    setup = finetune(settings(tiny_llama_folder, data, tmp_path / "run"), FinetuneOptions(dry_run=True), console=quiet()).setup
    example = setup.train.examples[0]
    row = next(row for row in setup.dataset.train if row.key == example.key)
    learnt = setup.text.tokenizer.decode(example.ids[example.supervised].tolist())
    assert learnt == "".join(f"{turn.text}<|im_end|>" for turn in row.turns if turn.supervised)
    assert setup.text.tokenizer.decode(example.ids.tolist()).startswith("<|im_start|>user\n")


@pytest.mark.slow
def test_new_tokens_are_opened_again_here_and_in_peft(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    result = run(tiny_llama_folder, rows, tmp_path / "run", {"lora.new_tokens": "<plant>,<stone>"})
    folder = tmp_path / "run" / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<plant> oak <stone>")["input_ids"]
    assert ids[0] == 320 and ids[-1] == 321 and tokenizer.chat_template
    again = open_adapter(folder).text_model(quiet(), dtype="float32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        ours = logits_of(result.setup.text, torch.tensor([ids]))
        theirs = into_peft(base, folder)(torch.tensor([ids])).logits
    torch.testing.assert_close(logits_of(again, torch.tensor([ids])), ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora.variant": "dora"},
        {"lora.start": "pissa"},
        {"lora.start": "olora"},
        {"lora.rank_pattern": r"q_proj=2,layers\.1\.mlp\..*=3", "lora.alpha_pattern": "q_proj=5"},
        {"lora.scale_rule": "alpha/sqrt(rank)", "lora.target_modules": "embed_tokens,q_proj"},
        {"lora.extra_modules": "model.norm"},
    ],
    ids=["dora", "pissa", "olora", "patterns", "rslora-embedding", "whole-norm"],
)
def test_what_a_run_leaves_loads_in_peft_with_equal_logits(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    result = run(tiny_llama_folder, rows, tmp_path / "run", {**changes, "evaluate.drift_texts": 0, "train.steps": 4})
    ids = result.setup.text.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        before = base(ids).logits
        ours = logits_of(result.setup.text, ids)
        theirs = into_peft(base, tmp_path / "run" / "adapter")(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert float((ours - before).abs().max()) > 1e-3
    assert result.report is not None and result.report.drift is None


@pytest.mark.slow
def test_ranks_on_disk_follow_the_patterns(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    run(tiny_llama_folder, rows, tmp_path / "run", {"lora.rank_pattern": "q_proj=2", "train.steps": 1})
    pairs: Adapter = peft.read(tmp_path / "run" / "adapter")
    assert {path.rpartition(".")[2]: pair.rank for path, pair in pairs.pairs.items() if "self_attn" in path} == {
        "q_proj": 2, "k_proj": 4, "v_proj": 4, "o_proj": 4
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "named"), [(KeyboardInterrupt(), "Ctrl-C"), (KeyboardInterrupt("SIGTERM"), "SIGTERM")])
def test_ctrl_c_during_evaluation_says_how_to_go_on(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: KeyboardInterrupt, named: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise stop

    monkeypatch.setattr(TextEvaluator, "report", interrupted)
    out = tmp_path / "run"
    with pytest.raises(RunStopped, match=f"^{named}: the training is done and .*adapter is whole") as stopped:
        run(tiny_llama_folder, rows, out, {"train.steps": 2})
    assert f"lorakeet finetune --resume {out}" in str(stopped.value) and stopped.value.__cause__ is None
    monkeypatch.undo()
    adapter = adapter_bytes(out)
    finetune(read_run(out / "config.yaml"), FinetuneOptions(resume=out), console=quiet())
    assert adapter_bytes(out) == adapter and (out / "report.html").is_file()


@pytest.mark.slow
def test_a_second_ctrl_c_in_training_says_how_to_go_on(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakeet.verbs.finetune.train", interrupted)
    out = tmp_path / "run"
    with pytest.raises(RunStopped) as stopped:
        run(tiny_llama_folder, rows, out, {"train.steps": 2})
    again = f"Resume with: lorakeet finetune --resume {out}"
    assert str(stopped.value) == f"Ctrl-C: stopped at once, and no checkpoint was written yet. {again}"
    (out / "checkpoints" / "step-000002").mkdir(parents=True)
    with pytest.raises(RunStopped, match=r"the newest checkpoint is .*step-000002\. Resume with"):
        finetune(read_run(out / "config.yaml"), FinetuneOptions(resume=out), console=quiet())


@pytest.mark.slow
def test_a_failed_check_is_raised_after_everything_is_written_and_shown(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, bad = tmp_path / "copy", tolerance_check("base untouched", {"x": 2.0}, tolerance={"x": 1.0}, between=("a", "b"), n=3)
    shutil.copytree(finished.path, copy)
    monkeypatch.setattr(TextRunKind, "certify", lambda *_: Certificate("x", (bad,)))
    console = Console(record=True, width=200, file=io.StringIO())
    with pytest.raises(VerificationFailed, match="base untouched"):
        finetune(read_run(copy / "config.yaml"), FinetuneOptions(resume=copy), console=console)
    written = read_certificate(copy / "certificate.json")
    assert replace(written, report="") == read_report(copy / "report.json").certificate
    assert written.identity and replace(written, identity={}, report="") == Certificate("x", (bad,))
    text = console.export_text()
    assert text.index("McNemar") < text.index("FAIL  base untouched") < text.index("Report: ") and "Next: " not in text


@pytest.mark.slow
def test_the_recommended_commands_are_printed_last(finished: Any, tmp_path: Path) -> None:
    copy, console = tmp_path / "copy", Console(record=True, width=200, file=io.StringIO())
    shutil.copytree(finished.path, copy)
    report = finetune(read_run(copy / "config.yaml"), FinetuneOptions(resume=copy), console=console).report
    assert report is not None
    text = console.export_text()
    assert re.search(r"Time: training .+, \d+ % of the run; evaluation .+ of the run; certificate .+, \d+ % of the run\.", text)
    last = text.splitlines()[-len(report.next_commands) :]
    assert [line.removeprefix("Next: ").partition("   (")[0] for line in last] == [item.command for item in report.next_commands]


def test_a_run_that_cannot_be_injected_writes_nothing(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("no")

    monkeypatch.setattr(assembling, "initialise_adapter", refuse)
    with pytest.raises(ConfigError):
        run(tiny_llama_folder, rows, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_sink_that_is_not_installed_is_said_before_anything_is_written(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakeet.train.log.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"train\.log_to is wandb, but the package wandb is not installed"):
        run(tiny_llama_folder, rows, tmp_path / "run", {"train.log_to": "wandb"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_best_checkpoint_is_what_is_kept_and_evaluated(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """A rate that overshoots in the end: an earlier adapter is the best, and it is the one in the report and on disk."""
    data = write_rows(tmp_path / "chats.jsonl", chats(30))
    changes = {"lora.alpha": 200, "train.learning_rate": 0.05, "train.schedule": "constant", "train.evaluate_every": 1}
    result = run(tiny_llama_folder, data, tmp_path / "run", {**changes, "train.steps": 8, "train.patience": 0})
    held_out = [r["held_out_loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "held_out_loss" in r]
    best = min(range(9), key=held_out.__getitem__)
    assert 0 < best < 8
    assert result.outcome is not None and result.report is not None
    assert (result.outcome.best_step, result.outcome.best_loss) == (best, held_out[best])
    assert result.report.systems[0].metrics["loss"].value == pytest.approx(held_out[best], abs=1e-6) != held_out[-1]


@pytest.mark.slow
def test_states_below_the_lowest_pair_are_kept_and_change_nothing_but_rounding(rows: Path, tmp_path: Path) -> None:
    """With lora.layers top:1: losses as without, said once, and a resumed run ends in the same bytes."""
    model, said = save_tiny_llama(tmp_path / "model"), io.StringIO()
    top = {"lora.layers": "top:1", "train.steps": 16, "train.checkpoint_every": 8, "train.evaluate_every": 8}
    top["train.keep_prefix_states"] = "true"
    kept = settings(model, rows, tmp_path / "kept", top)
    finetune(kept, console=Console(file=said, width=300))
    assert re.search(r"lowest 1 blocks train nothing: their output for \d+ rows is cached", said.getvalue())
    plain = run(model, rows, tmp_path / "plain", {**top, "train.keep_prefix_states": "false"})
    assert plain.outcome is not None
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in record]
        for name in ("kept", "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "kept", copy)
    shutil.rmtree(copy / "checkpoints" / "step-000016")
    finetune(read_run(copy / "config.yaml"), FinetuneOptions(resume=copy), console=quiet())
    assert adapter_bytes(copy) == adapter_bytes(tmp_path / "kept")
