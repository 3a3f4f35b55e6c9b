"""`lorakeet merge --into packed`: the written model is quantised as before, holds the adapter, and says how much survived."""

from __future__ import annotations

import errno
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.cli.main import main
from lorakeet.config import dump_yaml, read_run
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.peft import peft
from lorakeet.models.text.packed_layout import read_layout
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs.merge import merge
from lorakeet.verbs.merges import into_packed as packing
from lorakeet.verbs.merges.packing_steps import FEEDBACK, FINISHED, NEAREST, WRITTEN
from lorakeet.verbs.options import MergeOptions, QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.adapters import random_adapter
from tiny.dense import folded
from tiny.gguf_file import write_tiny_gguf
from tiny.models import tiny_model
from tiny.runs import chats, quiet, reviews, run, write_rows

pytestmark = pytest.mark.slow  # they share what takes seconds to make

STEPS = {"train.steps": 16}


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(60))


@pytest.fixture(scope="module")
def on_gptq(tiny_llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a GPTQ folder."""
    folder = tmp_path_factory.mktemp("gptq")
    quantize(
        QuantizeOptions(str(tiny_llama_folder), method="gptq", out=folder / "gptq", group_size=16, calibration=str(data)),
        console=quiet(),
    )
    run(folder / "gptq", data, folder / "run", STEPS)
    return folder / "run"


def test_a_gptq_run_stays_gptq(on_gptq: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "merged", on_gptq.parent / "gptq"
    merged = merge(MergeOptions((str(on_gptq),), out=out, into="packed", keep=0.5, memory="8GiB"), console=quiet())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after == before and after["quantization_config"]["quant_method"] == "gptq"
    certificate = read_certificate(out / "certificate.json")
    check = certificate.checks[0]
    assert certificate.passed and check.tolerance == {"surviving_share": 0.5} and check.n == 6
    share = merged.surviving[WRITTEN]
    assert check.measured["surviving_share"] == share.value == pytest.approx(merged.surviving[FEEDBACK].value, abs=1e-4)
    assert share.low <= share.value <= share.high and set(merged.surviving) == {NEAREST, FEEDBACK, WRITTEN}
    adapter, old, new = open_adapter(on_gptq).adapter, read_layout(str(source), silent), read_layout(str(out), silent)
    for path, pair in adapter.pairs.items():
        wanted = folded(old.layers[path]().dense(), pair).float()
        assert float((new.layers[path]().dense() - wanted).norm()) < 0.2 * float(wanted.norm())
    assert merged.to_mapping()["surviving_share"][WRITTEN]["value"] == share.value


def test_too_few_calibration_tokens_are_refused_before_any_model_is_loaded(
    on_gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"text": f"{number}", "label": "yn"[number % 2]} for number in range(40)]
    short = {"model": str(on_gptq.parent / "gptq"), "data.train": str(write_rows(tmp_path / "short.jsonl", records))}
    peft.write(random_adapter(tiny_model("llama"), "q_proj"), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(read_run(None, {**short, "data.chat_template": "off"})))

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lorakeet.runs.open_adapter.load_text_model", loaded)
    with pytest.raises(DataError, match=r"The calibration rows have \d+ tokens, but the widest layer has 48 inputs"):
        run_folder = str(tmp_path / "run")
        options = MergeOptions((run_folder,), out=tmp_path / "merged", into="packed", calibration_rows=4, uncertified=True)
        merge(options, console=quiet())
    assert not (tmp_path / "merged").exists()


def test_a_dense_run_goes_into_the_layout_that_is_named_and_is_finished(
    finished: Any, data: Path, tmp_path: Path
) -> None:
    """The finish trains through the quantiser; both forms are reported, and what was written is one of them."""
    run(finished.model, data, tmp_path / "run", STEPS)
    quantize(QuantizeOptions(str(finished.model), method="nf4", out=tmp_path / "nf4"), console=quiet())
    words = ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--into", "packed", "--like", str(tmp_path / "nf4")]
    assert main([*words, "--finish-steps", "4", "--keep", "0.3"]) == 0
    facts = read_certificate(tmp_path / "out" / "certificate.json").facts
    shares = {way: facts[f"share, {way}"] for way in (NEAREST, FEEDBACK, FINISHED, WRITTEN)}
    assert shares[WRITTEN] in (shares[FEEDBACK], shares[FINISHED])


@pytest.mark.parametrize("kind", ["Q4_K"])
def test_a_gguf_run_stays_one_file(kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    width = 256 if kind == "Q4_K" else 64
    write_tiny_gguf(tmp_path / "tiny.gguf", kind, hidden_size=width, intermediate_size=width)
    settings = {**STEPS, "model.quantize": "gguf"}
    run(tmp_path / "tiny.gguf", data, tmp_path / "run", settings)
    out = tmp_path / "merged.gguf"
    merged = merge(MergeOptions((str(tmp_path / "run"),), out=out, into="packed", keep=0.5, memory="8GiB"), console=quiet())
    assert read_certificate(tmp_path / "merged.certificate.json") == merged.certificate and merged.certificate.passed
    assert "outputs moved by" in merged.certificate.facts[f"14 layers in {kind}"]
    assert out.stat().st_size == (tmp_path / "tiny.gguf").stat().st_size
    old, new = read_layout(str(tmp_path / "tiny.gguf"), silent), read_layout(str(out), silent)
    for path, pair in open_adapter(tmp_path / "run").adapter.pairs.items():
        assert new.layers[path]().settings == old.layers[path]().settings
        wanted = folded(old.layers[path]().dense(), pair).float()
        assert float((new.layers[path]().dense() - wanted).norm()) < 0.2 * float(wanted.norm())


def test_a_run_on_gptq_prints_a_merge_that_works(on_gptq: Path) -> None:
    commands = [item.command for item in read_report(on_gptq / "report.json").next_commands]
    assert commands[0] == f"lorakeet merge {on_gptq} --into packed --out {on_gptq}-merged"
    assert not any("export" in command for command in commands), "an export folds into the unquantised base, and there is none"
    assert main([*shlex.split(commands[0])[1:], "--keep", "0.5"]) == 0


def test_less_than_was_asked_for_is_a_failure_that_says_what_survived(on_gptq: Path, tmp_path: Path) -> None:
    """A file whose own form has lost the adapter, as when none of it reaches the codes."""
    from lorakeet.verbs.merges import into_packed as workflow

    real = workflow.write_repacked

    def base_alone(layout: Any, bases: Any, out: Path, **more: Any) -> int:
        return real(layout, {path: read() for path, read in layout.layers.items()}, out, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "write_repacked", base_alone)
        with pytest.raises(VerificationFailed, match=r"surviving share .*\(at least 0\.95\).*rounding to the nearest would keep"):
            merge(MergeOptions((str(on_gptq),), out=tmp_path / "out", into="packed"), console=quiet())
    certificate = read_certificate(tmp_path / "out" / "certificate.json")
    assert not certificate.passed and abs(certificate.checks[0].measured["surviving_share"]) < 1e-3


def test_a_disk_that_is_full_after_the_model_is_said_in_words(
    on_gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Certificate, "write", full)
    with pytest.raises(EnvironmentProblem, match=r"merged model .*/m could not be written: .*is full"):
        merge(MergeOptions((str(on_gptq),), out=tmp_path / "m", into="packed", keep=0.5), console=quiet())
    assert not list(tmp_path.iterdir()), "no model stands there without its certificate"


def test_rows_without_labels_are_evaluated_by_their_loss(on_gptq: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", chats(50))
    run(on_gptq.parent / "gptq", rows, tmp_path / "run", STEPS)
    merged = merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "out", into="packed", keep=0.3), console=quiet())
    assert merged.certificate.passed and merged.surviving[WRITTEN].n == 5


def test_what_cannot_be_merged_so_is_said_before_anything_is_written(
    on_gptq: Path, finished: Any, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for words, match in (
        ({"like": str(finished.model)}, "is not quantised; expected a model in gptq, nf4, gguf"),
        ({"calibration_rows": 0}, "--calibration-rows is at least 1"),
        ({"keep": 1.5}, "--keep a share above 0"),
        ({"dtype": "float16"}, "takes one run as it is"),
    ):
        with pytest.raises(ConfigError, match=match):
            merge(MergeOptions((str(on_gptq),), out=out, into="packed", **words), console=quiet())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give it a name without"):
        merge(MergeOptions((str(on_gptq),), out=tmp_path / "out.gguf", into="packed"), console=quiet())
    with pytest.raises(ConfigError, match="go with --into packed"):
        merge(MergeOptions((str(finished.path),), out=out, finish_steps=3), console=quiet())
    with pytest.raises(ConfigError, match="needs a run: its training rows calibrate"):
        merge(
            MergeOptions((str(on_gptq / "adapter"),), out=out, into="packed", base=str(on_gptq.parent / "gptq")), console=quiet()
        )
    assert not out.exists()


@pytest.mark.parametrize(("steps", "said"), [(3, True), (0, False)])
def test_a_finish_says_that_a_gpu_is_not_used(
    steps: int, said: bool, on_gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains; to pack alone needs no GPU."""
    monkeypatch.setattr(packing, "why_not_cuda", lambda _: "Training runs on the CPU. Install another torch.")
    console = Console(record=True, file=io.StringIO())
    options = MergeOptions((str(on_gptq),), out=tmp_path / "out", into="packed", finish_steps=steps, calibration_rows=0)
    with pytest.raises(ConfigError, match="--calibration-rows is at least 1"):
        merge(options, console=console)
    assert ("Training runs on the CPU. Install another torch." in console.export_text()) == said


def test_a_pair_on_a_layer_that_is_not_packed_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")  # rows of 48 numbers, down_proj's, are no whole blocks
    run(tmp_path / "tiny.gguf", data, tmp_path / "run", {"model.quantize": "gguf", "train.steps": 2})
    with pytest.raises(ConfigError) as caught:
        merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "out", into="packed"), console=quiet())
    said = str(caught.value)
    assert "not packed there: model.layers.0.mlp.down_proj" in said and "ends in .gguf" in said


def test_a_gguf_run_is_merged_densely_into_the_numbers_of_its_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--into auto and original of a run with model.quantize gguf: W is what the file's blocks mean, to the bit."""
    from safetensors.torch import load_file

    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q4_0")
    run(tmp_path / "tiny.gguf", data, tmp_path / "run", {"model.quantize": "gguf", "train.steps": 2})
    merged = merge(MergeOptions((str(tmp_path / "run"),), out=tmp_path / "out"), console=quiet())
    assert merged.certificate.passed and merged.certificate.checks[0].measured["mean_kl"] < 1e-9
    assert any("the weights that gguf stands for" in note for note in merged.notes)
    assert any("No unquantised original of" in note for note in merged.notes)
    written, layout = load_file(tmp_path / "out" / "model.safetensors"), read_layout(str(tmp_path / "tiny.gguf"), silent)
    pairs = open_adapter(tmp_path / "run").adapter.pairs
    for path, read in layout.layers.items():
        torch.testing.assert_close(written[f"{path}.weight"].double(), folded(read().dense(), pairs[path]), atol=1e-6, rtol=0)
