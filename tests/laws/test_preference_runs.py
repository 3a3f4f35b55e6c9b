"""Whole runs on preferences: proved against their reference, resumed to the bit, continued from an adapter, refused by name."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, DataError, RunStopped, VerificationFailed
from lorakeet.formats import detect
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.peft import peft
from lorakeet.kinds.preference.spec import OBJECTIVES
from lorakeet.kinds.preference.task import PreferenceTask
from lorakeet.models.files import fingerprint
from lorakeet.train import loop
from lorakeet.verbs.evaluate import evaluate
from lorakeet.verbs.finetune import FinetuneResult, finetune
from lorakeet.verbs.options import EvaluateOptions, FinetuneOptions
from tiny.exports import certified_anew
from tiny.models import save_tiny_llama
from tiny.runs import WORDS, adapter_bytes, quiet, run, sentence, settings, write_rows

PREFERENCES = list(OBJECTIVES)


def preferences(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with a word in capitals; the chosen answer repeats it, the rejected one has another."""
    chance, found = random.Random(seed), []
    for _ in range(count):
        word, other = chance.sample(WORDS, 2)
        prompt = f"{sentence(chance, 3)} {word.upper()}"
        found.append({"prompt": prompt, "chosen": word, "rejected": other})
    return found


def rated(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if number % 2 else "rejected"], "label": bool(number % 2)}
        for number, pair in enumerate(preferences(count))
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "pairs.jsonl", preferences(60))
    write_rows(folder / "rated.jsonl", rated(60))
    return folder


def data_for(objective: str, rows: Path) -> Path:
    return rows / ("rated.jsonl" if objective == "kto" else "pairs.jsonl")


@pytest.fixture(scope="module")
def dpo(rows: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A finished run on pairs, evaluated after every other step. Do not write into it."""
    out = tmp_path_factory.mktemp("dpo") / "run"
    return run(tiny_llama_folder, rows / "pairs.jsonl", out, {"train.objective": "dpo", "train.evaluate_every": 2})


@pytest.mark.slow
@pytest.mark.parametrize("objective", PREFERENCES)
def test_every_objective_ends_in_proof(
    objective: str, dpo: FinetuneResult, rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    if objective == "dpo":
        found = dpo
    else:
        found = run(tiny_llama_folder, data_for(objective, rows), tmp_path / "run", {"train.objective": objective})
    report = found.report
    assert report is not None and report.task == "preference" and report.certificate is not None and report.certificate.passed
    checks = {check.name: check for check in report.certificate.checks}
    assert ("reference" in checks) == (objective not in ("orpo", "simpo"))
    if "reference" in checks:
        assert checks["reference"].measured == {"difference": 0.0}
        assert checks["reference is the base"].measured["mean_difference"] < 1e-5
        assert checks["reference of training rows"].measured["mean_difference"] < 1e-5
    assert {"preferred", "lead"} <= report.systems[0].metrics.keys()
    assert report.comparisons[0].metric == "preferred" and report.comparisons[0].right == "base" and report.verdict is not None
    assert report.facts["Objective"].startswith(f"{objective} (beta ")
    assert all("reply_words" in system.metrics for system in report.systems[:2]), "whether answers grew longer"
    first = json.loads((found.run.path / "metrics.jsonl").read_text().splitlines()[0])
    expected = {"dpo": math.log(2), "cdpo": math.log(2), "ipo": 25.0, "kto": 0.5}.get(objective)
    assert expected is None or first["held_out_loss"] == pytest.approx(expected, rel=1e-4)


def test_simple_baselines_are_beside_the_adapter(dpo: FinetuneResult) -> None:
    report = dpo.report
    assert report is not None
    assert [system.name for system in report.systems][:2] == ["adapter", "base"]
    assert {"longer answer", "TF-IDF of the answers"} <= {system.name for system in report.systems}
    assert report.curves is not None and [point.step for point in report.curves.preferred] == [
        point.step for point in report.curves.held_out
    ]  # fmt: skip
    assert "whose chosen answer is preferred; the line is a half" in (dpo.run.path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto"])
def test_an_adapter_that_learned_nothing_prefers_nothing(
    objective: str, rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Though its base finds most rejected answers likelier: those are shorter."""
    changes = {"train.objective": objective, "train.steps": 1, "train.learning_rate": 1e-9}
    pairs = [{**pair, "chosen": f"{pair['chosen']} and so on", "rejected": "no"} for pair in preferences(60)]
    data = write_rows(tmp_path / "pairs.jsonl", pairs) if objective != "kto" else data_for(objective, rows)
    report = run(tiny_llama_folder, data, tmp_path / "run", changes).report
    assert report is not None and report.verdict is not None
    assert report.systems[0].metrics["preferred"].value == 0.5 and report.comparisons[0].verdict == "no difference shown"
    assert report.verdict.tone != "better"


@pytest.mark.slow
def test_rated_answers_are_ranked_however_many_are_wanted(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Nine in ten are wanted; an adapter that learns to tell them apart is not worse than one verdict on all."""
    chance, records = random.Random(2), []
    for number in range(120):
        wanted = number % 10 != 0
        records.append({"prompt": sentence(chance, 3), "completion": "oak oak" if wanted else "fern fern", "label": wanted})
    changes = {"train.objective": "kto", "train.steps": 12, "preference.beta": 0.5, "data.held_out_fraction": 0.3,
               "data.near_duplicates": 0}  # fmt: skip
    report = run(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl", records), tmp_path / "run", changes).report
    assert report is not None and report.systems[0].metrics["preferred"].value > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora.layers": "top:1", "train.keep_prefix_states": True}])
def test_prompts_that_are_shared_or_cached_keep_the_reference_to_the_bit(
    changes: dict[str, Any], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    long = [{**pair, "prompt": f"{'word ' * 60}{pair['prompt']}"} for pair in preferences(40)]
    data = write_rows(tmp_path / "pairs.jsonl", long)
    given = {"train.objective": "dpo", "train.steps": 2, "data.max_tokens": 600, "data.near_duplicates": 0, **changes}
    report = run(tiny_llama_folder, data, tmp_path / "run", given).report
    assert report is not None and report.certificate is not None and report.certificate.passed


@pytest.mark.slow
def test_the_reference_stays_what_it_was_when_its_run_changes(
    taught: Path, rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(taught, earlier)
    changes = {"train.objective": "dpo", "lora.continue_from": earlier, "train.steps": 3}
    run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", changes)
    other = write_rows(tmp_path / "other.jsonl", preferences(30, seed=8))
    ask = EvaluateOptions(str(tmp_path / "run"), data=str(other))
    before = evaluate(ask, console=quiet()).report.systems[0].metrics["lead"]
    shutil.rmtree(earlier)
    assert evaluate(ask, console=quiet()).report.systems[0].metrics["lead"] == before


@pytest.mark.slow
def test_a_reference_of_other_rows_is_found_in_the_first_step(
    rows: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The margins of the first step are 0: nothing is trained yet."""
    roll_reference(monkeypatch)
    for reference in ("start", "base"):
        changes = {"train.objective": "dpo", "train.steps": 1, "train.reference": reference}
        with pytest.raises(VerificationFailed, match="In the first step the answers' log-probabilities differ from the refer"):
            run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / reference, changes)


@pytest.mark.slow
def test_a_named_reference_of_other_rows_is_found_by_the_certificate(
    taught: Path, rows: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where margins need not be 0 at the start."""
    roll_reference(monkeypatch)
    changes = {"train.objective": "dpo", "train.steps": 1, "train.reference": taught}
    with pytest.raises(VerificationFailed, match="reference of training rows"):
        run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", changes)


def test_a_reference_that_is_not_finite_is_named(
    rows: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, and before it is kept."""
    computed = PreferenceTask.log_probs
    monkeypatch.setattr(PreferenceTask, "log_probs", lambda self, given: (computed(self, given)[0] * np.nan, None))
    with pytest.raises(VerificationFailed, match="log-probabilities of 108 of 120 answers are NaN"):
        run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", {"train.objective": "dpo"})
    assert not (tmp_path / "run" / "reference.safetensors").exists()


def roll_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on training rows have the reference of the pair before."""
    computed = PreferenceTask.log_probs

    def rolled(self: PreferenceTask, given: Any) -> Any:
        sums, tokens = computed(self, given)
        return (np.roll(sums, 2) if given is self.train else sums), tokens

    monkeypatch.setattr(PreferenceTask, "log_probs", rolled)


def test_an_adapter_of_another_base_is_refused(
    taught: Path, rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=5)
    for changes in ({"lora.continue_from": taught}, {"train.reference": taught}):
        with pytest.raises(VerificationFailed, match="base weights has changed"):
            run(other, rows / "pairs.jsonl", tmp_path / "run", {"train.objective": "dpo", **changes})
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_held_out_answers_of_which_none_is_wanted_are_refused_before_training(
    rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    pairs = preferences(8, seed=6)
    unwanted = [{"prompt": f"{pair['prompt']} now", "completion": pair["rejected"], "label": False} for pair in pairs]
    changes = {"train.objective": "kto", "data.held_out": write_rows(tmp_path / "unwanted.jsonl", unwanted)}
    with pytest.raises(DataError, match="None of the 8 held-out rows has an answer that is wanted"):
        run(tiny_llama_folder, rows / "rated.jsonl", tmp_path / "run", changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wanted_answers_that_are_all_too_long_are_refused_before_training(
    rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    pairs = preferences(8, seed=6)
    held_out = [{"prompt": f"{pair['prompt']} now", "completion": pair["rejected"], "label": False} for pair in pairs]
    held_out.append({"prompt": "which", "completion": "oak " * 300, "label": True})
    changes = {
        "train.objective": "kto", "data.held_out": write_rows(tmp_path / "held_out.jsonl", held_out), "data.too_long": "drop"
    }  # fmt: skip
    with pytest.raises(DataError, match=r"None of the 9 held-out rows has an answer that is wanted that fits data\.max_tokens"):
        run(tiny_llama_folder, rows / "rated.jsonl", tmp_path / "run", changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_base_is_hashed_once_and_an_earlier_adapter_read_as_often_as_its_numbers_are_needed(
    taught: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its facts, its values in the model, those of the reference, and the certificate, which reads it again."""
    base, hashed, read = save_tiny_llama(tmp_path / "base"), list[Path](), list[Path]()
    add_file, detected = fingerprint.add_file, detect.detect
    monkeypatch.setattr(fingerprint, "add_file", lambda found, shard: (hashed.append(shard), add_file(found, shard)))
    monkeypatch.setattr(detect, "detect", lambda path: (read.append(path), detected(path))[1])
    earlier = tmp_path / "earlier"
    shutil.copytree(taught, earlier)
    changes = {"train.objective": "dpo", "lora.on_top_of": earlier, "lora.rank": 2, "train.steps": 2}
    run(base, rows / "pairs.jsonl", tmp_path / "run", changes)
    assert [shard.parent for shard in hashed].count(base) == 1
    assert read.count(earlier) == 4


@pytest.mark.slow
def test_rows_of_another_shape_are_refused_by_evaluate(rows: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    run(tiny_llama_folder, rows / "rated.jsonl", tmp_path / "run", {"train.objective": "kto", "train.steps": 2})
    with pytest.raises(DataError, match="no verdict on its answer"):
        evaluate(EvaluateOptions(str(tmp_path / "run"), data=str(rows / "pairs.jsonl")), console=quiet())


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(
    dpo: FinetuneResult, rows: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train.objective": "dpo", "train.evaluate_every": 2, "train.checkpoint_every": 2}
    original, stopped = loop.Training.evaluate, list[bool]()

    def evaluate_once(self: Any) -> None:
        if self.at.step >= 4 and not stopped:
            stopped.append(True)
            raise RunStopped("made up")
        original(self)

    monkeypatch.setattr(loop.Training, "evaluate", evaluate_once)
    with pytest.raises(RunStopped):
        run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "broken", changes)
    assert max(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()) < "step-000006", "steps are left to train"
    resumed = settings(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "broken", changes)
    finetune(resumed, FinetuneOptions(resume=tmp_path / "broken"), console=quiet())
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(dpo.run.path)
    last = "checkpoints/step-000006/trained.safetensors"  # the adapter may be of an earlier step
    assert (tmp_path / "broken" / last).read_bytes() == (dpo.run.path / last).read_bytes()


@pytest.mark.slow
def test_the_reference_of_another_run_is_refused(dpo: FinetuneResult, tiny_llama_folder: Path, tmp_path: Path) -> None:
    changes = {"train.objective": "dpo", "train.steps": 2}
    other = write_rows(tmp_path / "other.jsonl", preferences(60, seed=5))
    run(tiny_llama_folder, other, tmp_path / "two", changes)
    shutil.copy(dpo.run.path / "reference.safetensors", tmp_path / "two" / "reference.safetensors")
    resumed = settings(tiny_llama_folder, other, tmp_path / "two", changes)
    with pytest.raises(DataError, match="another reference model or of other rows"):
        finetune(resumed, FinetuneOptions(resume=tmp_path / "two"), console=quiet())


@pytest.fixture(scope="module")
def taught(rows: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the chosen answers alone."""
    folder = tmp_path_factory.mktemp("taught")
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences(60, seed=3)]
    run(tiny_llama_folder, write_rows(folder / "rows.jsonl", answers), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_which_is_the_reference(
    taught: Path, rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    changes = {"train.objective": "dpo", "lora.continue_from": taught, "lora.rank": 9}  # the adapter's own rank wins
    found = run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", changes)
    report = found.report
    assert report is not None and report.certificate is not None and report.certificate.passed
    assert report.facts["Reference"] == f"the adapter {taught}"
    assert report.drift is not None and "From the reference, on the same texts: " in report.drift.detail
    assert "reference" in {system.name for system in report.systems}
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["held_out_loss"] == pytest.approx(math.log(2), abs=1e-5)
    before, after = read_adapter(taught), read_adapter(tmp_path / "run")
    assert before.pairs.keys() == after.pairs.keys() and {pair.rank for pair in after.pairs.values()} == {4}
    changed = [path for path in before.pairs if not torch.equal(before.pairs[path].B, after.pairs[path].B)]
    near = max(float((before.pairs[path].A - after.pairs[path].A).abs().max()) for path in before.pairs)
    assert changed and near < 0.2


@pytest.mark.slow
def test_an_adapter_on_top_of_another_is_their_sum(
    taught: Path, rows: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train.objective": "dpo", "lora.on_top_of": taught, "lora.rank": 2}
    report = run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", changes).report
    assert report is not None and report.certificate is not None and report.certificate.passed
    assert "earlier adapter" in {check.name for check in report.certificate.checks}
    assert report.facts["Reference"] == f"the adapter {taught}" and str(taught) in report.facts["Adapter"]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["held_out_loss"] == pytest.approx(math.log(2), abs=1e-5)
    before, after = read_adapter(taught), read_adapter(tmp_path / "run")
    for path, pair in before.pairs.items():
        assert after.pairs[path].rank == 6 and torch.equal(after.pairs[path].A[:4], pair.A)
        assert after.pairs[path].B[:, 4:].any()

    monkeypatch.setattr(loop.gradients, "hold_terms", lambda *_: None)  # then the earlier terms are trained too
    with pytest.raises(VerificationFailed, match="earlier adapter: the first terms"):
        run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "moved", {**changes, "train.steps": 2})


@pytest.mark.slow
def test_a_broken_run_on_top_of_another_goes_on_to_the_same_bytes(taught: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences(60, seed=4)]
    data = write_rows(tmp_path / "rows.jsonl", answers)
    changes = {"lora.on_top_of": taught, "lora.rank": 2, "train.steps": 4, "train.checkpoint_every": 2}
    run(tiny_llama_folder, data, tmp_path / "whole", changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for left in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(tmp_path / "broken" / left)
    for left in ("report.html", "report.json", "certificate.json"):
        (tmp_path / "broken" / left).unlink()
    resumed = settings(tiny_llama_folder, data, tmp_path / "broken", changes)
    finetune(resumed, FinetuneOptions(resume=tmp_path / "broken"), console=quiet())
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_on_top_of_an_adapter_that_changed_is_not_resumed(taught: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(taught, earlier)
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences(60, seed=4)]
    data = write_rows(tmp_path / "rows.jsonl", answers)
    changes = {"lora.on_top_of": earlier, "lora.rank": 2, "train.steps": 2, "train.checkpoint_every": 1}
    run(tiny_llama_folder, data, tmp_path / "run", changes)
    changed = read_adapter(earlier)
    first = next(iter(changed.pairs.values()))
    first.A.mul_(2)
    shutil.rmtree(earlier / "adapter")
    (earlier / "adapter").mkdir()
    peft.write(changed, earlier / "adapter")
    certified_anew(earlier)  # or its certificate would find the change first
    with pytest.raises(ConfigError, match="the earlier adapter"):
        resumed = settings(tiny_llama_folder, data, tmp_path / "run", changes)
        finetune(resumed, FinetuneOptions(resume=tmp_path / "run"), console=quiet())


def test_targets_that_leave_an_earlier_pair_out_are_named(taught: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences(60, seed=4)]
    changes = {"lora.on_top_of": taught, "lora.target_modules": "q_proj"}
    with pytest.raises(ConfigError, match="that lora's targets leave out"):
        run(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl", answers), tmp_path / "run", changes)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["continue_from", "on_top_of"])
def test_without_a_reference_the_adapter_is_compared_with_the_one_that_it_began_with(
    setting: str, taught: Path, rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    changes = {"train.objective": "simpo", f"lora.{setting}": taught, "train.steps": 2}
    report = run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", changes).report
    assert report is not None and report.certificate is not None and report.certificate.passed
    assert ("earlier adapter", "preferred") in {(one.right, one.metric) for one in report.comparisons}


@pytest.mark.slow
def test_sft_goes_on_from_an_adapter(taught: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences(60, seed=4)]
    changes = {"lora.continue_from": taught, "train.steps": 1, "train.learning_rate": 1e-9}
    run(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl", answers), tmp_path / "run", changes)
    before, after = read_adapter(taught), read_adapter(tmp_path / "run")
    for path, pair in before.pairs.items():
        torch.testing.assert_close(after.pairs[path].B, pair.B, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_reference_beside_the_start_is_said_and_used(taught: Path, rows: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    changes = {"train.objective": "dpo", "train.reference": taught, "train.steps": 2}
    report = run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", changes).report
    assert report is not None and report.certificate is not None
    checks = [check.name for check in report.certificate.checks]
    assert "reference" in checks and "reference is the base" not in checks
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["held_out_loss"] - math.log(2)) > 1e-3


@pytest.mark.slow
def test_a_run_is_evaluated_again_and_merged(
    dpo: FinetuneResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dpo.run.path, tmp_path / "run")
    other = write_rows(tmp_path / "other.jsonl", preferences(30, seed=8))
    ask = EvaluateOptions(str(tmp_path / "run"), data=str(other), judge="http://127.0.0.1:9#none")
    found = evaluate(ask, console=quiet())
    assert "The judge none gave a vote in both orders for 0 of" in " ".join(found.report.warnings)
    assert found.report.task == "preference" and 20 < found.report.rows_of <= 30  # without near-copies of training rows
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert main(["compress", str(tmp_path / "run"), "--out", str(tmp_path / "small")]) == 2
    assert "was trained by dpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.objective": "dpo", "train.reference": "/nowhere"}, "The reference /nowhere does not exist"),
        ({"train.objective": "dpo", "data.supervise": "all"}, "dpo compares answers alone"),
        ({"train.objective": "dpo", "lora.start": "gradient"}, "measures gradients of the sft loss"),
        ({"train.reference": "base/line"}, "train.objective sft has no reference"),
        ({"preference.beta": 0.5}, "preference.beta is set, but train.objective is sft"),
        ({"train.objective": "dpo", "preference.beta": 0}, "preference.beta is 0; expected above 0"),
        ({"train.objective": "dpo", "kind": "image"}, "which needs text, but kind is image"),
        ({"lora.continue_from": "/nowhere", "lora.start": "pissa"}, "which begins anew"),
        ({"lora.on_top_of": "/nowhere", "lora.continue_from": "/other"}, "Leave one of them out"),
        ({"lora.on_top_of": "/nowhere", "lora.dropout": 0.1}, "would change the earlier adapter too"),
        ({"lora.on_top_of": "/nowhere", "train.weight_decay": 0.1}, "would change the earlier adapter too"),
        ({"lora.on_top_of": "/nowhere", "ranks.choose": "prune"}, "would change the earlier adapter too"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], said: str, rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tiny_llama_folder, rows / "pairs.jsonl", tmp_path / "run", changes)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_preference_run_is_planned(rows: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(tiny_llama_folder), "--model.dtype", "float32", "--data.train", str(rows / "pairs.jsonl")]
    assert main(["plan", *given, "--train.objective", "dpo", "--json"]) == 0
    pair = json.loads(capsys.readouterr().out)
    assert main(["finetune", *given, "--train.objective", "dpo", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "with its chosen answer" in said and "with its rejected answer" in said
    assert re.search(r"tokens an epoch, \d+\.\d % of them targets", " ".join(said.split()))
    assert pair["micro_batch"]["rows"] >= 2
