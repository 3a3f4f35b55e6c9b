"""`workflows.deploy`: asked of a run file before training, of a run after it; 3 where it would not load rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from lorakeet.cli.main import main
from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.export.runtime_support import Runtime
from lorakeet.formats.peft import peft
from lorakeet.workflows.verification.deployment import check_deployment
from tiny.adapters import random_adapter
from tiny.models import FAMILIES, tiny_model
from tiny.runs import quiet


def run_file(room: Path, lora: str, family: str = "llama", more: str = "", **changes: Any) -> Path:
    """A run file whose model is a config.json and nothing else."""
    model = room / family
    model.mkdir(exist_ok=True)
    kind = {"model_type": family, **FAMILIES[family][2], **changes}
    (model / "config.json").write_text(json.dumps(kind))
    path = room / "plan.yaml"
    path.write_text(f"model: {model}\ndata: rows.jsonl\nlora: {lora}\n{more}")
    return path


def loads(path: Path, runtime: Runtime, **more: Any) -> set[str]:
    return set(check_deployment(path, runtime, quiet(), **more).features)


def test_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = run_file(tmp_path, "{rank: 24, variant: dora, target_modules: [q_proj], extra_modules: [lm_head]}")
    assert main(["verify", str(plan), "--deploy", "vllm", "--json"]) == 3
    said = json.loads(capsys.readouterr().out)["message"]
    assert "would not load rightly in vllm" in said and "DoRA is refused" in said and "whole modules is refused" in said
    assert main(["verify", str(plan), "--deploy", "peft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == ["DoRA", "rank above 16", "whole modules"]
    with pytest.raises(VerificationFailed, match="Export the merged model"):
        check_deployment(plan, "llama.cpp", quiet())


def test_ranks_that_are_yet_to_be_chosen_will_differ(tmp_path: Path) -> None:
    plan = run_file(tmp_path, "{rank: 8}", more="ranks: {choose: auto, max_rank: 16}\n")
    with pytest.raises(VerificationFailed, match=r"several scales is computed wrongly.*\(ranks\.choose given\), or merge"):
        check_deployment(plan, "vllm", quiet())
    assert loads(plan, "llama.cpp") == {"several ranks", "several scales"}


def test_ranks_that_will_fall_will_differ(tmp_path: Path) -> None:
    plan = run_file(tmp_path, "{rank: 8}", more="ranks: prune\n")
    assert "several ranks" in loads(plan, "llama.cpp")


@pytest.mark.parametrize("target", ["all-linear", "gate_up_proj"])
def test_experts_are_found_among_the_targets(tmp_path: Path, target: str) -> None:
    plan = run_file(tmp_path, f"{{rank: 4, target_modules: [{target}]}}", "mixtral")
    for runtime in ("vllm", "llama.cpp", "ollama"):
        with pytest.raises(VerificationFailed, match="expert pairs is "):
            check_deployment(plan, runtime, quiet())
    assert loads(plan, "peft") == {"expert pairs"}
    assert loads(run_file(tmp_path, "{rank: 4, target_modules: [attention]}", "mixtral"), "vllm") == set()


def test_only_a_tied_head_is_refused(tmp_path: Path) -> None:
    asked = "{rank: 4, target_modules: [q_proj, lm_head]}"
    assert loads(run_file(tmp_path, asked), "llama.cpp") == set()
    with pytest.raises(VerificationFailed, match="tied head pairs is refused"):
        check_deployment(run_file(tmp_path, asked, tie_word_embeddings=True), "llama.cpp", quiet())


def test_settings_that_do_not_fit_the_model_or_no_model_are_said(tmp_path: Path) -> None:
    plan = run_file(tmp_path, "{target_modules: [nonsense]}")
    with pytest.raises(ConfigError, match="No module matches target 'nonsense'"):
        check_deployment(plan, "peft", quiet())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no configuration that could be read"):
        check_deployment(plan, "peft", quiet(), base=str(tmp_path / "empty"))


def test_pictures_are_planned_from_their_pipeline(tiny_sd_folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"kind: image\nmodel: {tiny_sd_folder}\ndata: photos\nlora: {{rank: 4, target_modules: [attention, conv]}}\n")
    assert loads(plan, "peft") == {"convolution pairs"}
    with pytest.raises(VerificationFailed, match="convolution pairs is refused"):
        check_deployment(plan, "vllm", quiet())


def test_after_training(finished: Any) -> None:
    for runtime in get_args(Runtime):
        found = check_deployment(finished.path, runtime, quiet())
        assert found.to_mapping() == {"runtime": runtime, "loads": True, "features": [], "notes": []} and found.exit_code == 0


def test_the_base_of_a_finished_adapter_says_whether_its_head_is_tied(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model("llama"), "lm_head")
    peft.write(Adapter(adapter.pairs), tmp_path / "adapter")
    assert loads(tmp_path / "adapter", "vllm") == set(), "no base is asked for where it makes no difference"
    with pytest.raises(ConfigError, match="name it with --base"):
        check_deployment(tmp_path / "adapter", "llama.cpp", quiet())
    run_file(tmp_path, "{}")
    assert loads(tmp_path / "adapter", "llama.cpp", base=str(tmp_path / "llama")) == set()
    run_file(tmp_path, "{}", tie_word_embeddings=True)
    with pytest.raises(VerificationFailed, match="tied head pairs is refused"):
        check_deployment(tmp_path / "adapter", "llama.cpp", quiet(), base=str(tmp_path / "llama"))
