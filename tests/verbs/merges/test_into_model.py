"""`verbs.merges.into_model`: a wrong merge fails with its worst layer, in whatever dtype it is stored."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorakeet.cli.main import main
from lorakeet.core.adapter import Adapter
from lorakeet.errors import VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.merging.merged_folder import MergeResult, merge_into
from lorakeet.verbs.merge import merge
from lorakeet.verbs.merges import into_model as workflow
from lorakeet.verbs.options import MergeOptions
from tiny.runs import quiet

Mend = Callable[[Adapter], Adapter]


def half_scale(adapter: Adapter) -> Adapter:
    return replace(adapter, pairs={path: replace(pair, alpha=pair.alpha / 2) for path, pair in adapter.pairs.items()})


def without_one_layer(adapter: Adapter) -> Adapter:
    return replace(adapter, pairs={p: pair for p, pair in adapter.pairs.items() if p != "model.layers.1.mlp.down_proj"})


def with_two_layers_swapped(adapter: Adapter) -> Adapter:
    one, other = (f"model.layers.{number}.self_attn.o_proj" for number in (0, 1))
    return replace(adapter, pairs={**adapter.pairs, one: adapter.pairs[other], other: adapter.pairs[one]})


@pytest.mark.parametrize(
    ("mend", "named"),
    [
        (half_scale, r"model\.layers\.[01]\..*_proj\.weight"),
        (without_one_layer, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (with_two_layers_swapped, r"model\.layers\.[01]\.self_attn\.o_proj\.weight"),
    ],
)
def test_a_wrong_merge_is_exit_code_3_and_names_the_worst_layer(
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mend: Mend,
    named: str,
) -> None:
    """The mistakes that merges make: a forgotten scale, a layer that was not found, layers that were mixed up."""

    def wrong(source: Path, adapter: Adapter, out: Path, **more: Any) -> MergeResult:
        return merge_into(source, mend(adapter), out, **more)

    monkeypatch.setattr(workflow, "merge_into", wrong)
    out = tmp_path / "merged"
    assert main(["merge", str(finished.path), "--out", str(out)]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"Error: The merged model {out} does not compute what it should:")
    assert re.search(rf"The worst layer is {named}: it differs by", said)
    certificate = read_certificate(out / "certificate.json")
    assert not certificate.passed and [check.passed for check in certificate.checks] == [False, False]
    capsys.readouterr()
    assert main(["merge", str(finished.path), "--out", str(tmp_path / "json"), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "verification-failed"


def test_bf16_does_not_hide_a_missed_layer(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a small pair is not seen in the logits, but the weights tell; and a faithful bf16 merge passes."""

    def in_bf16(source: Path, adapter: Adapter, out: Path, **more: Any) -> MergeResult:
        return merge_into(source, adapter, out, **{**more, "dtype": "bfloat16"})

    def one_missed(source: Path, adapter: Adapter, out: Path, **more: Any) -> MergeResult:
        return in_bf16(source, without_one_layer(adapter), out, **more)

    monkeypatch.setattr(workflow, "merge_into", in_bf16)
    good = merge(MergeOptions((str(finished.path),), out=tmp_path / "good"), console=quiet())
    assert good.certificate.passed and good.certificate.facts["stored as"] == "bfloat16"
    monkeypatch.setattr(workflow, "merge_into", one_missed)
    with pytest.raises(VerificationFailed, match=r"worst layer is model\.layers\.1\.mlp\.down_proj\.weight"):
        merge(MergeOptions((str(finished.path),), out=tmp_path / "bad"), console=quiet())


def test_one_changed_file_is_found(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of which no pair knows anything are compared too."""

    def damaged(source: Path, adapter: Adapter, out: Path, **more: Any) -> MergeResult:
        result = merge_into(source, adapter, out, **more)
        tensors = load_file(out / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return result

    monkeypatch.setattr(workflow, "merge_into", damaged)
    with pytest.raises(VerificationFailed, match=r"worst layer is model\.norm\.weight: it differs by 0\.01"):
        merge(MergeOptions((str(finished.path),), out=tmp_path / "merged"), console=quiet())
