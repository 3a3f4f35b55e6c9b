"""Several adapters through `lorakeet merge`: into one adapter and into the base, from the command line to the certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.cli.main import main
from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.formats.peft import peft
from lorakeet.merging.combine import METHODS, Combination
from lorakeet.verbs.merge import merge
from lorakeet.verbs.merges import into_model as workflow
from lorakeet.verbs.options import MergeOptions
from tiny.adapters import random_adapter
from tiny.dense import change
from tiny.peft_oracle import into_peft
from tiny.runs import quiet

IDS = torch.tensor([[5, 9, 70, 33, 12, 40]])
WEIGHTS = (0.7, 0.3)


@pytest.fixture(scope="module")
def adapters(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters on disk that differ in rank, alpha, scale rule and targets."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    folder = tmp_path_factory.mktemp("adapters")
    one = random_adapter(model)
    other = random_adapter(model, "q_proj", "down_proj", seed=4, rank=6, alpha=5.0, scale_rule="alpha/sqrt(rank)")
    for name, adapter in (("one", one), ("other", other)):
        peft.write(replace(adapter, base=str(tiny_llama_folder)), folder / name)
    return [str(folder / "one"), str(folder / "other")]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def summed_by_hand(base: Path, adapters: list[str]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, weight in zip(adapters, WEIGHTS, strict=True):
            for path, pair in peft.read(Path(name)).pairs.items():
                model.get_submodule(path).weight += weight * change(pair)
    return logits(model)


def test_the_sum_goes_into_one_adapter_that_peft_loads(
    adapters: list[str], tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    assert main(["merge", *adapters, "--weights", "0.7,0.3", "--out", str(out), "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["passed"] and found["error"] == 0.0 and set(found["errors"]) == set(peft.read(Path(adapters[0])).pairs)
    assert "other changes 4 of the 14 matrices" in output.err and "14 matrices combined exactly" in output.err
    assert read_certificate(out / "certificate.json").checks[0].measured["error_beyond_stated"] < 1e-6
    loaded = into_peft(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder), out)
    torch.testing.assert_close(logits(loaded), summed_by_hand(tiny_llama_folder, adapters), atol=1e-5, rtol=0)
    assert main(["merge", *adapters, "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_sum_goes_into_the_base(adapters: list[str], tiny_llama_folder: Path, tmp_path: Path) -> None:
    merged = merge(MergeOptions(adapters, out=tmp_path / "model", to="model", weights=WEIGHTS), console=quiet())
    assert merged.certificate.passed and merged.result is not None and merged.result.changed == 14
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(model), summed_by_hand(tiny_llama_folder, adapters), atol=1e-5, rtol=0)


def test_one_adapter_is_compressed(adapters: list[str], tmp_path: Path) -> None:
    merged = merge(MergeOptions(adapters[:1], out=tmp_path / "small", to="adapter", rank=2), console=quiet())
    written = peft.read(tmp_path / "small")
    assert {pair.rank for pair in written.pairs.values()} == {2} and merged.certificate.passed
    assert merged.combined is not None and 0.1 < merged.combined.error < 0.9


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.exact])
def test_a_pruned_sum_is_folded_whole_and_certified(method: Any, adapters: list[str], tmp_path: Path) -> None:
    merged = merge(MergeOptions(adapters, out=tmp_path / "model", to="model", method=method, seed=3), console=quiet())
    assert [check.passed for check in merged.certificate.checks] == [True, True]
    assert merged.certificate.checks[0].measured["effect"] < 1e-6
    low = merge(MergeOptions(adapters, out=tmp_path / "adapter", method=method, rank=3, seed=3), console=quiet())
    assert low.certificate.passed and low.combined is not None and low.combined.error > 0.05


def test_a_pruned_sum_on_a_shared_embedding_and_with_a_whole_norm(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    names = []
    for seed in (1, 2):
        adapter = random_adapter(model, "embed_tokens", "q_proj", seed=seed)
        whole = {"model.norm.weight": torch.full((32,), 1.5)}
        peft.write(replace(adapter, extras=whole, base=str(tiny_llama_folder)), tmp_path / str(seed))
        names.append(str(tmp_path / str(seed)))
    merged = merge(MergeOptions(names, out=tmp_path / "model", to="model", method="ties"), console=quiet())
    assert merged.certificate.passed and "written separately" in merged.notes[0]


def damaged(written: Adapter) -> Adapter:
    path = "model.layers.1.mlp.down_proj"
    return replace(written, pairs={**written.pairs, path: replace(written.pairs[path], alpha=1.0)})


def test_a_combined_adapter_that_went_wrong_is_named(
    adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = peft.write
    monkeypatch.setattr(peft, "write", lambda adapter, folder: real(damaged(adapter), folder))
    with pytest.raises(VerificationFailed, match=r"worst layer is model\.layers\.1\.mlp\.down_proj"):
        merge(MergeOptions(adapters, out=tmp_path / "both"), console=quiet())
    assert not read_certificate(tmp_path / "both" / "certificate.json").passed


def one_forgotten(plan: Combination, path: str, expert: int = 0, real: Callable[..., Any] = Combination.change) -> torch.Tensor:
    found = real(plan, path, expert)
    return found * 0 if path.endswith("layers.1.mlp.down_proj") else found


def test_a_folded_sum_that_went_wrong_is_named(
    adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workflow.merge_into

    def wrong(*given: Any, **more: Any) -> Any:
        plan = more["change"].__self__
        return real(*given, **{**more, "change": lambda path, expert: one_forgotten(plan, path, expert)})

    monkeypatch.setattr(workflow, "merge_into", wrong)
    with pytest.raises(VerificationFailed, match=r"worst layer is model\.layers\.1\.mlp\.down_proj\.weight"):
        merge(MergeOptions(adapters, out=tmp_path / "model", to="model", method="ties"), console=quiet())


def test_what_does_not_go_together_is_refused_before_anything_is_written(
    adapters: list[str], finished_elsewhere: str, tmp_path: Path
) -> None:
    for given, more, message in (
        ([adapters[0], finished_elsewhere], {}, r"were trained on different bases: .*name it with --base"),
        ([adapters[0], adapters[0]], {}, "is named more than once"),
        (adapters, {"memory": "2GiB"}, r"--memory is 2GiB, but adapters are combined in .*without any model.*Leave it out"),
        (adapters, {"weights": (1.0,)}, "There are 1 weights for 2 adapters"),
        (adapters, {"into": "dequantised", "to": "model"}, "was not quantised"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge(MergeOptions(given, out=tmp_path / "out", **more), console=quiet())  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def finished_elsewhere(adapters: list[str], tmp_path: Path) -> str:
    peft.write(replace(peft.read(Path(adapters[0])), base="another/model"), tmp_path / "elsewhere")
    return str(tmp_path / "elsewhere")
