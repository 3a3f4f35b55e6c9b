"""`verbs.merge`: a merged model and its certificate; a merge that went wrong is exit code 3 and names the worst layer."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.formats.peft import peft
from lorakeet.verbs.merge import merge
from lorakeet.verbs.options import MergeOptions
from tiny.models import save_tiny_llama
from tiny.peft_oracle import by_peft
from tiny.runs import quiet, reviews, run, write_rows

Mend = Callable[[Adapter], Adapter]


def test_a_merged_run_is_a_model_that_transformers_loads(finished: Any, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merged = merge(MergeOptions((str(finished.path),), out=out), console=Console(file=(said := io.StringIO()), width=200))
    lines = said.getvalue().splitlines()
    assert lines.index("Comparing the written model with base and adapter.") < len(lines) - 2, "before the check, not after it"
    assert merged.to_mapping()["passed"] is True
    certificate = read_certificate(out / "certificate.json")
    assert certificate == merged.certificate and [check.passed for check in certificate.checks] == [True, True]
    logits, weights = certificate.checks
    assert logits.n > 100 and logits.measured["effect"] < 1e-6 and weights.measured["mean_difference"] < 1e-6
    assert weights.n == 21  # 20 tensors, of which the head stands for the tied embedding a second time
    model = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="sdpa")
    live = merged_by_hand(finished)
    ids = torch.tensor([[5, 9, 70, 33, 12, 40]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, live(ids).logits, atol=1e-5, rtol=0)
    assert (out / "tokenizer.json").read_bytes() == (finished.model / "tokenizer.json").read_bytes()
    json.dumps(merged.to_mapping())


def merged_by_hand(finished: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(finished.model)
    with torch.no_grad():
        for path, pair in peft.read(finished.path / "adapter").pairs.items():
            model.get_submodule(path).weight += pair.alpha / pair.rank * pair.B @ pair.A
    return model


def test_a_bare_adapter_of_peft_is_certified_on_texts_of_its_base(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    by_peft(tmp_path / "adapter", transformers.AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj", "up_proj"])
    merged = merge(MergeOptions((str(tmp_path / "adapter"),), out=tmp_path / "merged"), console=quiet())
    assert merged.certificate.passed and merged.certificate.facts["rows"] == "32"
    assert merged.result.changed == 4


@pytest.mark.slow
def test_new_tokens_are_in_the_merged_tokenizer(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reviews(30))
    run(tiny_llama_folder, data, tmp_path / "run", {"lora.new_tokens": "<plant>", "train.steps": 2})
    merged = merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "merged"), console=quiet())
    assert merged.certificate.passed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids("<plant>") == 320 and model.config.vocab_size == 321


def test_a_budget_too_small_for_the_check_is_refused_before_anything_is_written(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="but the check of a merged model takes at least"):
        merge(MergeOptions((str(finished.path),), out=tmp_path / "merged", into="original", memory="50MiB"), console=quiet())
    assert not (tmp_path / "merged").exists()


def test_what_is_in_the_way_is_said_before_anything_is_written(finished: Any, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    with pytest.raises(ConfigError, match="exists already and is never overwritten"):
        merge(MergeOptions((str(finished.path),), out=out), console=quiet())
    with pytest.raises(ConfigError, match=r"a folder is written\. For a GGUF file: lorakeet export .*/m\.gguf"):
        merge(MergeOptions((str(finished.path),), out=tmp_path / "m.gguf"), console=quiet())
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match="is a file"):
        merge(MergeOptions((str(finished.path),), out=tmp_path / "file" / "merged"), console=quiet())
    assert list(out.iterdir()) == []


def test_a_disk_that_is_full_after_the_model_is_said_in_words(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Certificate, "write", full)
    with pytest.raises(EnvironmentProblem, match=r"merged model .*/m could not be written: .*is full"):
        merge(MergeOptions((str(finished.path),), out=tmp_path / "m"), console=quiet())
    assert not list(tmp_path.iterdir()), "no model stands there without its certificate"


def test_rows_that_are_gone_are_missed_before_anything_is_written(finished: Any, tmp_path: Path) -> None:
    config = (finished.path / "config.yaml").read_text()
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("adapter", "certificate.json"):
        (copy / name).symlink_to(finished.path / name)
    (copy / "config.yaml").write_text(config.replace(str(finished.data), str(tmp_path / "gone.jsonl")))
    with pytest.raises(DataError, match=r"gone\.jsonl' does not exist"):
        merge(MergeOptions((str(copy),), out=tmp_path / "merged"), console=quiet())
    assert not (tmp_path / "merged").exists()
