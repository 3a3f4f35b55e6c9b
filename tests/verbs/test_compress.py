"""`lorakeet compress`: the curve, the folder that it leaves, and what is refused."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.config import dump_yaml, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.peft import peft
from lorakeet.kinds.text import rank_curve as curves
from lorakeet.kinds.text.rank_curve import CHOSEN_HERE
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs import compress as compressing
from lorakeet.verbs.compress import compress
from lorakeet.verbs.evaluate import evaluate
from lorakeet.verbs.options import CompressOptions, EvaluateOptions
from tiny.exports import certified_anew
from tiny.runs import quiet, reviews, run, tree, write_rows

pytestmark = pytest.mark.slow  # they share what takes seconds to make

WIDE: dict[str, Any] = {"tolerance": "40%", "metric_tolerance": "40%"}  # forty rows show no more than that


@pytest.fixture(scope="module")
def trained(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of rank 8 that has learnt something, with enough held-out rows."""
    folder = tmp_path_factory.mktemp("trained")
    data, test = write_rows(folder / "rows.jsonl", reviews(200)), write_rows(folder / "test.jsonl", reviews(30, seed=5))
    changes = {"lora.rank": 8, "lora.alpha": 24, "train.steps": 12, "data.held_out_fraction": 0.2, "data.test": test}
    run(tiny_llama_folder, data, folder / "run", {**changes, "evaluate.baselines": "false"})
    keep_rank(folder / "run" / "adapter", 5)
    certified_anew(folder / "run")
    return folder / "run"


def keep_rank(folder: Path, rank: int) -> None:
    """Rewrites the adapter so that only `rank` components of each pair count: what is cut beyond them is not missed."""
    adapter = peft.read(folder)
    pairs = {}
    for path, pair in adapter.pairs.items():
        U, S, Vh = torch.linalg.svd(pair.B @ pair.A, full_matrices=False)
        S = S[: pair.rank].clone()
        S[rank:] *= 1e-5
        pairs[path] = replace(pair, A=S.sqrt()[:, None] * Vh[: pair.rank], B=U[:, : pair.rank] * S.sqrt())
    peft.write(replace(adapter, pairs=pairs), folder)


def parameters(adapter: Adapter) -> int:
    return sum(pair.A.numel() + pair.B.numel() for pair in adapter.pairs.values())


@pytest.fixture(scope="module")
def said() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


@pytest.fixture(scope="module")
def compressed(trained: Path, tmp_path_factory: pytest.TempPathFactory, said: Console) -> Any:
    before = tree(trained)

    @contextmanager
    def to_the_end(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        console.print(f"{what} ({sum(done)} of {total} done)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "counted", to_the_end)
        result = compress(CompressOptions(str(trained), out=tmp_path_factory.mktemp("cut") / "cut", **WIDE), console=said)
    assert tree(trained) == before
    return result


def test_each_size_is_named_before_it_is_measured(compressed: Any, said: Console) -> None:
    lines, names = said.export_text(clear=False).splitlines(), [point.name for point in compressed.curve.points]
    sizes = [line for line in lines if line.startswith("Size ")]
    assert sizes == [f"Size {number} of {len(names)}: {'the ' * (number == 1)}{name}." for number, name in enumerate(names, 1)]
    weighed = next(number for number, line in enumerate(lines) if line.startswith("The pairs are weighed by "))
    [done] = [line for line in lines if line.startswith("training rows weigh the pairs (")]
    assert re.search(r"\((\d+) of \1 done", done), "a line for what took minutes in silence"
    curve = next(number for number, line in enumerate(lines) if line.startswith("The rank curve"))
    assert weighed < lines.index(sizes[0]) < lines.index(sizes[-1]) < curve


def test_a_too_small_budget_is_refused_before_anything_is_loaded(trained: Path, tmp_path: Path) -> None:
    words = r"is 50MiB, but compressing this adapter takes at least \d+ MiB.* Give that with --memory"
    with pytest.raises(ConfigError, match=words):
        compress(CompressOptions(str(trained), out=tmp_path / "cut", memory="50MiB", **WIDE), console=quiet())
    assert not (tmp_path / "cut").exists()


def test_the_smallest_size_within_the_tolerance_is_written(compressed: Any, trained: Path) -> None:
    curve, full = compressed.curve, peft.read(trained / "adapter")
    sizes = [point.parameters for point in curve.points]
    assert curve.points[0].name == "uncut adapter" and sizes[0] == parameters(full) and sizes == sorted(sizes, reverse=True)
    good = [point.name for point in itertools.takewhile(lambda point: not point.why_not, curve.points[1:])]
    assert curve.marked == good[-1] and 1 <= len(good) < len(curve.points) - 1
    assert [found.metric for found in curve.points[1].against_full] == ["accuracy", "log_loss"]
    marked = next(point for point in curve.points if point.name == curve.marked)
    assert parameters(peft.read(compressed.out / "adapter")) == marked.parameters < sizes[0]
    assert compressed.to_mapping()["parameters"] == marked.parameters


def test_what_it_leaves_is_a_run_that_other_verbs_open(compressed: Any, trained: Path) -> None:
    out = compressed.out
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "split.json", "adapter", "report.json", "report.html", "certificate.json"
    }  # fmt: skip
    assert (out / "split.json").read_bytes() == (trained / "split.json").read_bytes()
    assert read_certificate(out / "certificate.json").passed
    opened = open_adapter(out)
    config = read_run(out / "config.yaml")
    assert {path: pair.rank for path, pair in opened.adapter.pairs.items()} == {
        path: config.lora.rank_pattern.get(path, config.lora.rank) for path in opened.adapter.pairs
    }
    assert all(pair.scale == pytest.approx(3.0) for pair in opened.adapter.pairs.values())
    again = evaluate(EvaluateOptions(str(out)), console=quiet()).report
    assert again.systems[0].metrics == compressed.report.systems[0].metrics


def test_the_report_has_the_curve_with_intervals_and_what_the_test_rows_say(compressed: Any) -> None:
    report = read_report(compressed.out / "report.json")
    assert report.rank_curve == compressed.curve and report.rows_of == 30
    assert "Against the uncut adapter, on test rows" in report.facts
    assert [system.name for system in report.systems][:3] == ["adapter", "uncut adapter", "base"]
    assert report.comparisons[0].right == "uncut adapter" and report.comparisons[0].difference.n == 30
    assert report.verdict is not None and "the uncut adapter" in report.verdict.sentence
    page = (compressed.out / "report.html").read_text()
    assert "The rank curve" in page and f"Marked: {compressed.curve.marked}" in page


def test_a_size_that_is_measured_on_the_rows_that_chose_it_is_said_to_be(compressed: Any, trained: Path, tmp_path: Path) -> None:
    before = read_run(trained / "config.yaml")
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(replace(before, data=replace(before.data, test=None))))
    options = CompressOptions(str(trained / "adapter"), out=tmp_path / "cut", config=config, **WIDE)
    found = compress(options, console=quiet())
    assert found.report.part == "held-out" and CHOSEN_HERE in found.report.warnings
    assert CHOSEN_HERE not in compressed.report.warnings, "there are test rows"


def test_the_requested_size_is_what_is_written(trained: Path, tmp_path: Path) -> None:
    by_rank = compress(
        CompressOptions(str(trained), out=tmp_path / "rank", to="rank 2", rows=20, weighting="activation"), console=quiet()
    )
    assert {pair.rank for pair in peft.read(tmp_path / "rank" / "adapter").pairs.values()} == {2}
    assert "rank 2" in [point.name for point in by_rank.curve.points][-1] or len(by_rank.curve.points) > 2
    compress(CompressOptions(str(trained), out=tmp_path / "count", to="2k", rows=20, weighting="none"), console=quiet())
    assert 1900 < parameters(peft.read(tmp_path / "count" / "adapter")) <= 2000


def test_a_bare_adapter_needs_a_run_file(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no rows.*--config"):
        compress(CompressOptions(str(trained / "adapter"), out=tmp_path / "cut"), console=quiet())
    config = trained / "config.yaml"
    found = compress(
        CompressOptions(str(trained / "adapter"), out=tmp_path / "cut", to="rank 2", rows=5, config=config), console=quiet()
    )
    assert (found.out / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"to": "lots"}, r"--to is 'lots'; expected a number of parameters such as"),
        ({"to": "rank 8"}, r"--to is 'rank 8'; expected parameters such as 0\.5M, or 'rank N' with N from 1 to 7"),
        ({"to": "100"}, r"budget of 100 parameters is below rank 1 for each of the 14 targets"),
        ({"to": "9M"}, r"above that of the highest measured rank|above the full rank"),
        ({"tolerance": "much"}, r"--tolerance is 'much'; expected a share"),
        ({"metric_tolerance": "-1"}, r"--metric-tolerance is '-1'; expected a share"),
        ({"tolerance": "150%"}, r"--tolerance is '150%'"),
        ({"rows": 0, "metric_tolerance": "40%"}, r"--rows is 0"),
    ],
)
def test_sizes_that_cannot_be(trained: Path, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compress(CompressOptions(str(trained), out=tmp_path / "cut", **given), console=quiet())
    assert not (tmp_path / "cut").exists()


def test_where_every_cut_loses_too_much_nothing_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "fewest_rows", lambda *_: 1)
    words = r"No cut .* is shown to be as good .* within 0\.0000 nats a row more loss \(0\.00 % .*nothing was written.*--to"
    with pytest.raises(VerificationFailed, match=words):
        compress(CompressOptions(str(trained), out=tmp_path / "cut", tolerance="0"), console=quiet())
    assert not (tmp_path / "cut").exists()


def test_rows_too_few_to_show_anything_are_said_before_anything_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 held-out rows were measured with eight sizes, of which none could have passed."""
    monkeypatch.setattr(compressing, "model_to_measure", lambda *_: pytest.fail("it went on"))
    few = r"2 points of accuracy less, and \d+ held-out rows cannot show .* it takes 189\. Allow more \(--metric-tolerance \d+%"
    for share, words in (("2%", few), ("0", "no number of rows shows")):
        with pytest.raises(ConfigError, match=words):
            compress(CompressOptions(str(trained), out=tmp_path / "cut", metric_tolerance=share), console=quiet())


def test_what_there_is_to_lose(finished: Any, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        compress(CompressOptions(str(trained), out=tmp_path / "full"), console=quiet())
    no_rows = tmp_path / "config.yaml"
    no_rows.write_text((trained / "config.yaml").read_text().replace("held_out_fraction: 0.2", "held_out_fraction: 0.0"))
    with pytest.raises(DataError, match=r"has no held-out rows|no cut can be evaluated"):
        compress(CompressOptions(str(trained / "adapter"), out=tmp_path / "cut", config=no_rows), console=quiet())
