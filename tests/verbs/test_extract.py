"""`verbs.extract`: what is written brings the base to the tuned model, is measured on tokens, and loads in PEFT."""

from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.merging.extract import Extracted
from lorakeet.verbs import extract as workflow
from lorakeet.verbs.extract import extract
from lorakeet.verbs.options import ExtractOptions
from tiny.peft_oracle import into_peft
from tiny.runs import quiet, reviews, write_rows

IDS = torch.tensor([[5, 9, 70, 33, 12, 40]])


@pytest.fixture(scope="module")
def tuned(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with random full-rank changes in every linear layer and its last norm."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(tiny_llama_folder, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.add_(torch.randn_like(parameter), alpha=float(parameter.std()) * 0.5)
        model.model.norm.weight.mul_(1.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_small_rank_brings_the_base_nearer_and_a_full_one_all_the_way(
    tuned: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    said = io.StringIO()
    results = [
        extract(
            ExtractOptions(str(tuned), str(tiny_llama_folder), out=tmp_path / str(rank), rank=rank),
            console=Console(file=said, width=200),
        )
        for rank in (4, 16, 64)
    ]
    kl = [result.certificate.checks[0].measured["mean_kl"] for result in results]
    energy = [result.found.energy for result in results]
    assert kl[0] > kl[1] > 10 * kl[2] and kl[2] < 1e-8
    assert energy[0] < energy[1] < energy[2] and energy[2] > 1 - 1e-9
    assert "Kept whole: model.norm.weight" in said.getvalue() and "% of the energy" in said.getvalue()
    assert read_certificate(tmp_path / "4" / "certificate.json") == results[0].certificate
    mine = into_peft(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path / "64")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    with torch.no_grad():
        torch.testing.assert_close(mine(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=0)


def test_on_rows_of_a_file_from_the_command_line(
    tuned: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reviews(12))
    typed = ["extract", str(tuned), str(tiny_llama_folder), "--out", str(tmp_path / "a"), "--rank", "8", "--whole", "none"]
    assert main([*typed, "--data", str(data), "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["left_out"] == ["model.norm.weight"] and found["whole"] == [] and len(found["errors"]) == 14
    assert found["certificate"]["facts"]["rows"] == str(data)
    assert "Left out, though changed: model.norm.weight" in output.err
    assert main(typed) == 2 and "exists already" in capsys.readouterr().err


def test_an_adapter_that_brings_nothing_is_exit_code_3(
    tuned: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workflow.extract_adapter

    def turned_round(*given: Any, **more: Any) -> Extracted:
        found = real(*given, **more)
        for pair in found.adapter.pairs.values():
            pair.B.neg_()
        return found

    monkeypatch.setattr(workflow, "extract_adapter", turned_round)
    with pytest.raises(VerificationFailed, match="the adapter brings it no nearer"):
        extract(ExtractOptions(str(tuned), str(tiny_llama_folder), out=tmp_path / "a", rank=16), console=quiet())
    assert not read_certificate(tmp_path / "a" / "certificate.json").passed


def test_a_disk_that_is_full_after_the_adapter_is_said_in_words(
    tuned: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Certificate, "write", full)
    with pytest.raises(EnvironmentProblem, match=r"adapter .*/a could not be written: .*is full"):
        extract(ExtractOptions(str(tuned), str(tiny_llama_folder), out=tmp_path / "a", rank=4), console=quiet())
    assert not list(tmp_path.iterdir()), "no adapter stands there without its certificate"


def test_nothing_is_written_where_something_is_wrong(tuned: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = str(tiny_llama_folder)
    gone = str(tmp_path / "no.jsonl")
    for data, kind, message in ((None, ConfigError, "are equal in all"), (gone, DataError, "does not exist")):
        with pytest.raises(kind, match=message):
            extract(ExtractOptions(base, base, out=tmp_path / "a", data=data), console=quiet())
    with pytest.raises(ConfigError, match="rank is 0"):
        extract(ExtractOptions(str(tuned), base, out=tmp_path / "a", rank=0), console=quiet())
    assert list(tmp_path.iterdir()) == []
