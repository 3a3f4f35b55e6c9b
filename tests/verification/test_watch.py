"""`lorakeet verify --watch`: rounds, the metric file, the exit codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verification.watch import metric_text, parse_duration, watch_server
from tiny.exports import loud_run, write_model
from tiny.servers import serving

URL = "http://127.0.0.1:9#a"


def certificate(kl: float, incomplete: str = "") -> Certificate:
    check = tolerance_check(f"{URL}: log-probabilities", {"mean_kl": kl}, tolerance={"mean_kl": 0.1}, between=("live", URL))
    return Certificate("a", (check,), incomplete={URL: incomplete} if incomplete else {})


def rounds_of(*results: Certificate | EnvironmentProblem) -> Callable[[], Certificate]:
    left = iter(results)

    def compare() -> Certificate:
        found = next(left)
        if isinstance(found, EnvironmentProblem):
            raise found
        return found

    return compare


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h", 3600), ("1.5d", 129600)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "0s", "-1h", "infs", "nanh", "1w"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--every is"):
        parse_duration(text)


def watched(
    *results: Certificate | EnvironmentProblem, rounds: int = 0, metrics: Path | None = None
) -> tuple[Any, list[str], int]:
    """What was raised or returned, what was said, and how often it waited."""
    said, pauses = list[str](), list[float]()
    try:
        found: Any = watch_server(
            rounds_of(*results), URL, 60.0, rounds=rounds, metrics=metrics, say=said.append, pause=pauses.append
        )
    except (VerificationFailed, EnvironmentProblem) as error:
        found = error
    assert set(pauses) <= {60.0}
    return found, said, len(pauses)


def test_it_goes_on_until_the_server_differs(tmp_path: Path) -> None:
    metrics = tmp_path / "lorakeet.prom"
    found, said, pauses = watched(certificate(0.01), certificate(0.02), certificate(0.5), metrics=metrics)
    assert isinstance(found, VerificationFailed) and found.exit_code == 3 and pauses == 2 and len(said) == 2
    lines = metrics.read_text().splitlines()
    assert f'lorakeet_watched_certified{{target="{URL}"}} 0' in lines and f'lorakeet_watched_up{{target="{URL}"}} 1' in lines
    assert f'lorakeet_watched_mean_kl{{target="{URL}"}} 0.5' in lines


def test_a_server_that_does_not_answer_is_compared_in_the_next_round(tmp_path: Path) -> None:
    metrics = tmp_path / "lorakeet.prom"
    away = EnvironmentProblem("nothing answers")
    found, said, pauses = watched(certificate(0.01), away, rounds=2, metrics=metrics)
    assert found is away and found.exit_code == 2 and pauses == 1 and said[1] == "Round 2: nothing answers"
    lines = metrics.read_text().splitlines()
    assert f'lorakeet_watched_up{{target="{URL}"}} 0' in lines, "and what was known before stays"
    assert f'lorakeet_watched_certified{{target="{URL}"}} 1' in lines
    found, said, _ = watched(away, certificate(0.01, "it went away"), certificate(0.01), rounds=3)
    assert isinstance(found, Certificate) and said[0].endswith("nothing answers") and said[1].endswith("it went away")


def test_a_file_of_another_program_in_the_place_of_the_metrics_is_read_over(tmp_path: Path) -> None:
    metrics = tmp_path / "lorakeet.prom"
    metrics.write_bytes(b"\xffword\n\n# a line\n")
    watched(EnvironmentProblem("nothing answers"), rounds=1, metrics=metrics)
    assert metrics.read_text().splitlines()[-1] == f'lorakeet_watched_up{{target="{URL}"}} 0'


def test_a_failed_check_of_an_incomplete_round_counts() -> None:
    found, _, _ = watched(certificate(0.5, "it went away"), rounds=1)
    assert isinstance(found, VerificationFailed)


def test_names_of_targets_are_quoted() -> None:
    assert '{target="http://h#a\\"b"} 1' in metric_text('http://h#a"b', certificate(0.0), now=5.0)


@pytest.mark.slow
def test_the_command(finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A right server ends it with 0, the base with 3, none with 2; the run's certificate stays as it was."""
    run = loud_run(finished.path, tmp_path / "run")
    before = (run / "certificate.json").read_bytes()
    tokenizer, metrics = load_tokenizer(finished.model), tmp_path / "m.prom"
    right = write_model(finished.model, open_adapter(run).adapter, tmp_path / "right.gguf")
    base = write_model(finished.model, None, tmp_path / "base.gguf")
    shared = ["verify", str(run), "--every", "1s", "--rows", "1", "--precision", "float32", "--metrics", str(metrics)]
    with serving(right, tokenizer, "vLLM") as url:
        assert main([*shared, "--watch", url, "--rounds", "1"]) == 0
    assert f'lorakeet_watched_certified{{target="{url}"}} 1' in metrics.read_text()
    assert main([*shared, "--watch", url, "--rounds", "1"]) == 2
    with serving(base, tokenizer, "vLLM") as wrong:
        assert main([*shared, "--watch", wrong]) == 3
    assert f'lorakeet_watched_certified{{target="{wrong}"}} 0' in metrics.read_text()
    assert (run / "certificate.json").read_bytes() == before
    assert main([*shared, "--watch", "here"]) == 2 and "expected the address of a server" in capsys.readouterr().err
    assert main([*shared, "--watch", url, "--against", url]) == 2
    shutil.rmtree(run)
