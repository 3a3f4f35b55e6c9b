"""`workflows.deploy`: asked of a run file before training, of a run after it; 3 where it would not load rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli.main import main
from lorakeet.errors import VerificationFailed
from lorakeet.workflows.deploy import check_deployment
from tiny.runs import quiet


def test_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("model: org/x\ndata: rows.jsonl\nlora: {rank: 32, variant: dora, extra_modules: [lm_head]}\n")
    assert main(["verify", str(plan), "--deploy", "vllm", "--json"]) == 3
    said = json.loads(capsys.readouterr().out)["message"]
    assert "would not load rightly in vllm" in said and "DoRA is refused" in said and "whole modules is refused" in said
    assert main(["verify", str(plan), "--deploy", "peft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == ["DoRA", "rank above 16", "whole modules"]
    with pytest.raises(VerificationFailed, match="Export the merged model"):
        check_deployment(plan, "llama.cpp", quiet())


def test_after_training(finished: Any) -> None:
    for runtime in ("vllm", "llama.cpp", "ollama", "peft"):
        found = check_deployment(finished.path, runtime, quiet())  # type: ignore[arg-type]
        assert found.to_mapping() == {"runtime": runtime, "loads": True, "features": [], "notes": []} and found.exit_code == 0
