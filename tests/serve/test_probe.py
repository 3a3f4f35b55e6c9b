"""Probes: equal for equal functions, different for others, and a record that survives its certificate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorakeet.errors import DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, judge
from lorakeet.formats import peft
from lorakeet.models.active import LiveModel
from lorakeet.serve.probe import FACT, Probe, Prober, compare_record, extend_certificate, find_certificate, read_record


def test_probes_tell_functions_apart(live: LiveModel, saved: Callable[..., Path]) -> None:
    prober = Prober(live.text, live.selection)
    for seed, name in enumerate(("a", "b")):
        live.attach(name, peft.read(saved(name, seed=seed)))
    live.attach("nothing", peft.read(saved("zero", "q_proj")))
    for pair in (layer.adapters["nothing"] for layer in live._held["nothing"]):
        pair.B.zero_()
    first, again, other, nothing = (prober.probe(name) for name in ("a", "a", "b", "nothing"))
    assert first.difference(again) == 0.0 and (first.difference(other) or 0.0) > 0.1
    assert first.effect > 0.1 and nothing.effect < prober.tolerance
    assert len(first.logprobs) == 64 and live.selection.active is None
    read = Probe.from_text(first.to_text(), "here")
    assert compare_record("a", first, read, prober.tolerance, "the record")
    with pytest.raises(VerificationFailed, match="'b' does not compute what the record says"):
        compare_record("b", other, read, prober.tolerance, "the record")
    elsewhere = Probe("another base", read.precision, read.logprobs)
    assert not compare_record("b", other, elsewhere, prober.tolerance, "the record"), "nothing to compare with"


def test_certificates_are_found_held_to_and_extended(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    assert find_certificate(folder) is None
    path = tmp_path / "run" / "certificate.json"
    good = judge("run", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    Certificate("The run", (good,)).write(path)
    assert find_certificate(folder) == path and read_record(path) is None
    probe = Probe("base", "float32", (0.5, -1.0), 0.2)
    assert extend_certificate(path, "a", probe, 1e-3).passed
    assert read_record(path) == probe
    apart = extend_certificate(path, "a", Probe("base", "float32", (0.5, -3.0), 0.2), 1e-3)
    assert not apart.passed and [check.name for check in apart.checks] == ["run", "served"]
    with pytest.raises(DataError, match="its checks failed"):
        read_record(path)
    Certificate("The run", (good,), {FACT: "{"}).write(path)
    with pytest.raises(DataError, match=r"The probe in .* is broken"):
        read_record(path)
