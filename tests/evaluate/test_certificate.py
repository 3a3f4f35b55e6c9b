from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lorakeet.errors import DataError, EnvironmentProblem, VerificationFailed
from lorakeet.evaluate.certificate import (
    Certificate,
    Check,
    ServedModules,
    read_certificate,
    tolerance_check,
    worst_layer,
)
from lorakeet.evaluate.intervals import proportion


def check(*, kl: float = 1e-9, agreement: float = 1.0) -> Check:
    return tolerance_check(
        "merged model",
        {"mean_kl": kl, "top1_agreement": agreement},
        tolerance={"mean_kl": 1e-6, "top1_agreement": 0.99},
        between=("adapter", "merged"),
        floors=("top1_agreement",),
        n=500,
        detail="The worst layer is q.",
    )


def test_floors_and_ceilings() -> None:
    assert check().passed
    assert check(kl=1e-5).exceeded() == ("mean_kl",)
    assert check(agreement=0.98).exceeded() == ("top1_agreement",)
    assert check(kl=math.nan).exceeded() == ("mean_kl",)


def test_round_trip_and_a_verdict_for_machines(tmp_path: Path) -> None:
    good = replace(check(), estimates={"top1_agreement": proportion(500, 500)})
    certificate = Certificate("merged/", (good, check(kl=math.inf)), {"precision": "fp32"})
    certificate.write(tmp_path / "certificate.json")
    assert json.loads((tmp_path / "certificate.json").read_text())["passed"] is False
    assert read_certificate(tmp_path / "certificate.json") == certificate


def test_failure_names_measure_limit_and_layer() -> None:
    Certificate("merged/", (check(),)).raise_if_failed()
    with pytest.raises(VerificationFailed) as caught:
        Certificate("merged/", (check(), check(kl=0.5))).raise_if_failed()
    message = str(caught.value)
    assert "mean kl 0.5 (at most 1e-06)" in message and "The worst layer is q." in message and message.count("FAIL") == 1
    assert caught.value.exit_code == 3


def test_no_check_is_no_pass() -> None:
    with pytest.raises(VerificationFailed, match="it has no check"):
        Certificate("merged/", ()).raise_if_failed()


def test_what_became_of_an_adapter_is_distinguished_from_the_adapter_itself() -> None:
    own, other = check(), replace(check(kl=1.0), name="C: /run-merged/: logits")
    assert (own.artefact, other.artefact) == ("", "C: /run-merged/")
    both = Certificate("run", (own, other))
    assert both.own == (own,) and both.passed and both.artefacts == {"C: /run-merged/": "failed"}
    assert both.verdict == "The own checks passed; C: /run-merged/ failed"
    both.raise_if_failed()
    alone = Certificate("model.gguf", (other,))
    assert not alone.passed and alone.verdict == "Failed" and alone.failed_artefacts == ("C: /run-merged/",)
    assert Certificate("run", (own, replace(own, name="x: logits"))).verdict == "Passed"
    with pytest.raises(VerificationFailed, match="logits"):
        alone.raise_if_failed()
    assert Certificate("model.gguf", (other,)).own == (other,), "what lies beside a file is judged by what it says of the file"


def test_an_edited_or_missing_certificate_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    Certificate("merged/", (check(kl=1.0),)).write(path)
    path.write_text(path.read_text().replace('"passed": false', '"passed": true', 1))
    with pytest.raises(DataError, match='says "passed": True'):
        read_certificate(path)
    with pytest.raises(DataError, match=r"none\.json"):
        read_certificate(tmp_path / "none.json")


def test_worst_layer_prefers_nan() -> None:
    assert "is b: it differs by 0.5 (of 2 layers)" in worst_layer({"a": 0.1, "b": 0.5})
    assert "is c" in worst_layer({"a": 9.0, "c": math.nan, "d": 1.0})
    assert worst_layer({}) == ""


def test_what_an_older_certificate_says_of_all_checks_is_still_read(tmp_path: Path) -> None:
    """"passed" spoke of the artefacts too, so that one failed export made the whole run "passed": false."""
    path = tmp_path / "certificate.json"
    both = Certificate("run", (check(), replace(check(kl=1.0), name="run-merged/: logits")))
    both.write(path)
    written = json.loads(path.read_text())
    assert written["passed"] is True and written["artefacts"] == {"run-merged/": "failed"} and read_certificate(path) == both
    older = {key: value for key, value in written.items() if key not in ("artefacts", "unchecked", "sha256")}
    for entry in older["checks"]:
        del entry["made"], entry["against"]
    path.write_text(json.dumps({**older, "passed": False}))
    found = read_certificate(path)
    assert found == both and found.passed and found.artefacts == {"run-merged/": "failed"}
    del written["sha256"]
    path.write_text(json.dumps({**written, "artefacts": {"run-merged/": "proved"}}))
    with pytest.raises(DataError, match=r'says "artefacts": .*Verify the artefacts again'):
        read_certificate(path)
    path.write_text(json.dumps({**written, "passed": False}))
    with pytest.raises(DataError, match='says "passed": False'):
        read_certificate(path)


def test_an_incomplete_artefact_did_not_pass_and_is_no_failure() -> None:
    """What was checked passed: it could not be compared to the end, which is another exit code than a difference."""
    limit = {"different": 0.0}
    check = tolerance_check("http://h#a: prompt ids", limit, tolerance=limit, between=("live", "http://h#a"))
    whole = Certificate("run", (check,))
    ended = replace(whole, incomplete={"http://h#a": "it went away."})
    assert whole.passed and whole.artefacts == {"http://h#a": "not proved"}
    assert not ended.passed and ended.artefacts == {"http://h#a": "failed"} and ended.failed_artefacts == ("http://h#a",)
    with pytest.raises(EnvironmentProblem, match=r"it went away. 1 checks of http://h#a passed until then; they are incomplete"):
        ended.raise_if_failed()
    own = replace(ended, checks=(replace(check, name="frozen weights"), check))
    assert own.passed, "a run is not worse for a server that went away"


def test_modules_of_a_server_are_kept(tmp_path: Path) -> None:
    check = tolerance_check("u: modules", {"missing_modules": 1.0}, tolerance={"missing_modules": 0.0}, between=("live", "u"))
    modules = ServedModules("u", ("a", "b"), ("c",), {"d": "it changes nothing"})
    path = tmp_path / "certificate.json"
    Certificate("run", (check,), modules=(modules,)).write(path)
    assert read_certificate(path).modules == (modules,)


SERVER = "http://h#a"
SHOWN = ServedModules(SERVER, ("x.0.q",), (), {"x.0.v": "rounding"}, ("all modules", "x.0", "q", "v"), {}, {"x.0.v": 1e-5}, 0.999)


@pytest.mark.parametrize(
    ("modules", "verdict"),
    [
        ((), "not proved"),
        ((SHOWN,), "proved"),
        ((replace(SHOWN, seen=("all modules",), unseen={"q": "rounding"}),), "not proved"),
        ((replace(SHOWN, seen=()),), "not proved"),
    ],
)
def test_a_server_is_proved_only_by_what_would_have_been_seen(
    modules: tuple[ServedModules, ...], verdict: str, tmp_path: Path
) -> None:
    """That nothing failed is not enough; and the written certificate says the same."""
    limit = {"different": 0.0}
    check = tolerance_check(f"{SERVER}: prompt ids", limit, tolerance=limit, between=("live", SERVER))
    found = Certificate("run", (check,), modules=modules)
    assert found.passed and found.artefacts == {SERVER: verdict}
    assert found.unproved_artefacts == (() if verdict == "proved" else (SERVER,)) and not found.failed_artefacts
    assert (found.verdict == "Passed") is (verdict == "proved")
    found.write(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["artefacts"] == {SERVER: verdict}
    assert read_certificate(tmp_path / "c.json") == found
    older = {**json.loads((tmp_path / "c.json").read_text()), "artefacts": {SERVER: True}}
    del older["sha256"]
    (tmp_path / "c.json").write_text(json.dumps(older))
    assert read_certificate(tmp_path / "c.json").artefacts == {SERVER: verdict}, "an older file said passed or not"


def test_what_is_not_distinguished_is_named_with_its_effect_and_not_counted() -> None:
    assert SHOWN.counts == "active 1 of 2, 1 not distinguished" and SHOWN.counts in str(SHOWN)
    assert "x.0.v (1e-05 nats)" in str(SHOWN)
    assert not replace(SHOWN, missing=("x.0.v",), unclear={}).proved


@pytest.mark.parametrize("lost", ["measured", "tolerance"])
def test_a_check_with_a_measure_but_no_tolerance_is_refused(lost: str, tmp_path: Path) -> None:
    file, limit = tmp_path / "c.json", {"different": 0.0}
    Certificate("run", (tolerance_check("logits", limit, tolerance=limit, between=("saved", "live")),)).write(file)
    data = json.loads(file.read_text())
    data["checks"][0][lost]["ifferent"] = data["checks"][0][lost].pop("different")
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"checks\[0\] cannot be used: 'different' is in only one of measured and tolerance"):
        read_certificate(file)
