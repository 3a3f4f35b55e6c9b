"""A check within a memory budget is the check without one, number by number, and finds the same mistakes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.store import StoreWriter
from lorakeet.merging.merged_folder import MergeResult, merge_into
from lorakeet.planning.check import ModelCheck
from lorakeet.runs.residency import MemoryPlan, Way
from lorakeet.verbs.export import export
from lorakeet.verbs.merge import merge
from lorakeet.verbs.merges import into_model as workflow
from lorakeet.verbs.options import ExportOptions, MergeOptions, VerifyOptions
from lorakeet.verbs.verify import verify
from tiny.models import save_tiny_llama
from tiny.peft_oracle import by_peft
from tiny.runs import chats, quiet, run, write_rows

pytestmark = pytest.mark.slow  # they share what takes seconds to make

WIDE = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 1024}
CHANGES = {"train.steps": "2", "evaluate.drift_texts": "0"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a model of which two in fp32 are far more than two of its blocks."""
    folder = tmp_path_factory.mktemp("wide")
    model = save_tiny_llama(folder / "model", **WIDE)
    run(model, write_rows(folder / "rows.jsonl", chats(40)), folder / "run", CHANGES)
    return folder / "run"


@contextmanager
def forecasts() -> Iterator[dict[bool, int]]:
    """The last forecasts within the context, by whether the models are streamed."""
    found: dict[bool, int] = {}
    before = ModelCheck.plan

    def noted(check: ModelCheck, way: Way) -> MemoryPlan:
        plan = before(check, way)
        found[way.streamed] = plan.peak
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCheck, "plan", noted)
        yield found


def middling(verb: Callable[..., Any]) -> str:
    """A budget between what the check takes streamed and with its models in memory, found by asking for too little."""
    with forecasts() as found, pytest.raises(ConfigError, match=r"takes at least .* with blocks streamed from disk"):
        verb(memory="1MiB")
    assert found[True] < found[False]
    return f"{(found[True] + found[False]) // 2000}KB"


def streamed(verb: Callable[..., Any]) -> Any:
    """What `verb` finds within a middling budget, having streamed."""
    with forecasts() as found:
        result = verb(memory=middling(verb))
    assert found.keys() == {True, False}
    return result


def merging(path: Path, out: Path, **more: Any) -> Callable[..., Any]:
    return lambda memory=None: merge(MergeOptions((str(path),), out=out / "merged", memory=memory, **more), console=quiet())


def same(one: Certificate, other: Certificate) -> None:
    assert one.checks == other.checks and dict(one.facts) == dict(other.facts)


def test_a_merge_is_certified_alike_and_leaves_nothing_behind(wide: Path, tmp_path: Path) -> None:
    whole = merging(wide, tmp_path / "whole")().certificate
    found = streamed(merging(wide, tmp_path / "streamed"))
    same(found.certificate, whole)
    assert whole.passed and whole.checks[0].n > 400 and whole.checks[1].n == 8 * 9 + 3
    assert [path.name for path in (tmp_path / "streamed").iterdir()] == ["merged"]
    same(read_certificate(tmp_path / "streamed" / "merged" / "certificate.json"), whole)


def without_one_layer(adapter: Adapter) -> Adapter:
    return replace(adapter, pairs={p: pair for p, pair in adapter.pairs.items() if p != "model.layers.7.mlp.down_proj"})


def half_scale(adapter: Adapter) -> Adapter:
    return replace(adapter, pairs={path: replace(pair, alpha=pair.alpha / 2) for path, pair in adapter.pairs.items()})


@pytest.mark.parametrize(("mend", "named"), [(without_one_layer, r"layers\.7\.mlp\.down_proj"), (half_scale, r"layers\.\d+\.")])
def test_a_wrong_merge_fails_streamed_too(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mend: Callable[[Adapter], Adapter], named: str
) -> None:
    def wrong(source: Path, adapter: Adapter, out: Path, **more: Any) -> MergeResult:
        return merge_into(source, mend(adapter), out, **more)

    monkeypatch.setattr(workflow, "merge_into", wrong)
    with pytest.raises(VerificationFailed, match=rf"The worst layer is model\.{named}"):
        streamed(merging(wide, tmp_path))
    certificate = read_certificate(tmp_path / "merged" / "certificate.json")
    assert [check.passed for check in certificate.checks] == [False, False]


def test_changes_that_are_no_pairs_are_folded_on_the_way_into_a_store(wide: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"adapter-{rank}") for rank in (4, 8)]
    for path, rank in zip(paths, (4, 8), strict=True):
        plain = transformers.AutoModelForCausalLM.from_pretrained(wide.parent / "model")
        by_peft(Path(path), plain, target_modules=["q_proj", "up_proj"], r=rank)

    def ties(out: Path) -> Callable[..., Any]:
        options = MergeOptions(paths, out=out / "merged", to="model", method="ties")
        return lambda memory=None: merge(replace(options, memory=memory), console=quiet())

    whole = ties(tmp_path / "whole")().certificate
    same(streamed(ties(tmp_path / "streamed")).certificate, whole)
    assert whole.passed


def test_a_disk_that_gets_full_and_one_that_is(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = middling(merging(wide, tmp_path))

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", full)
        with pytest.raises(EnvironmentProblem, match="its disk is full"):
            merging(wide, tmp_path)(memory=budget)
    assert not list(tmp_path.iterdir()), "no model stands there unchecked"
    monkeypatch.setattr("lorakeet.planning.fit.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(EnvironmentProblem, match=r"needs .* in .*\.merged\.blocks .*on disk, where 1 MiB are free"):
        merging(wide, tmp_path / "other")(memory=budget)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_verify_and_export_stream_the_live_side_and_a_folder(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("lorakeet.verification.probes.GREEDY", 1)
    if kind == "gguf":
        out = tmp_path / "model.gguf"
        found = streamed(
            lambda memory: export(ExportOptions(str(wide), out=out, quant="f32", memory=memory), console=quiet())
        ).certificate
    else:
        out = tmp_path / "merged"
        merge(MergeOptions((str(wide),), out=out), console=quiet())
        against = (str(out),)
        found = streamed(
            lambda memory: verify(VerifyOptions(str(wide), against=against, rows=2, memory=memory), console=quiet())
        ).certificate
    assert found.passed and not list(tmp_path.glob(".*")) and not list(wide.parent.glob(".*"))
    rows = 8 if kind == "gguf" else 2
    again = verify(VerifyOptions(str(wide), against=(str(out),), rows=rows), console=quiet()).certificate  # type: ignore[union-attr]
    assert [check.measured for check in found.checks] == [check.measured for check in again.checks]


def test_longer_rows_are_compared_as_far_as_memory_allows(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is made to take 8 MiB of llama.cpp's memory."""
    monkeypatch.setattr("lorakeet.verification.probes.GREEDY", 1)
    monkeypatch.setattr("lorakeet.planning.check.FEWEST_TOKENS", 16)
    monkeypatch.setattr("lorakeet.planning.check.context_bytes", lambda config, context: context << 23)

    def exported(memory: str) -> Any:
        return export(ExportOptions(str(wide), out=tmp_path / "model.gguf", quant="f32", memory=memory), console=quiet())

    with pytest.raises(ConfigError, match="takes at least") as caught:
        exported("1MiB")
    assert not list(tmp_path.iterdir())
    least = int(str(caught.value).partition("at least ")[2].partition(" MiB")[0])
    found = exported(f"{least + 40}MiB").certificate
    assert found.passed and found.facts["rows"] == "4 held-out, their first 16 tokens"
    logits = next(check for check in found.checks if check.name.endswith(": logits"))
    assert logits.n == 4 * 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.README.md", "model.certificate.json", "model.gguf"]


def test_a_large_budget_streams_nothing(wide: Path, tmp_path: Path) -> None:
    with forecasts() as found:
        assert merging(wide, tmp_path)(memory="64GiB").certificate.passed
    assert found.keys() == {False} and found[False] > resident_bytes() // 2
