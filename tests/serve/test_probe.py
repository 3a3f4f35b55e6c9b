"""Probes: equal for equal functions, different for others, and a record that survives its certificate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.formats.identity import find_certificate
from lorakeet.formats.peft import peft
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.quant.spec import QuantSpec
from lorakeet.serve.probe import FACT, Probe, Prober, compare_record, extend_certificate, read_record, record


def test_probes_tell_functions_apart(live: ServingModel, saved: Callable[..., Path]) -> None:
    prober = Prober(live.text, live.selection)
    for seed, name in enumerate(("a", "b")):
        live.attach(name, peft.read(saved(name, seed=seed)))
    live.attach("nothing", peft.read(saved("zero", "q_proj")))
    for pair in (slot.pairs["nothing"] for slot in live._adapters["nothing"].slots):
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
    broken = Probe(read.base, read.precision, (*read.logprobs[:-1], float("nan")))
    with pytest.raises(VerificationFailed, match="differ by nan"):
        compare_record("a", first, broken, prober.tolerance, "the record")


def test_a_probe_that_fails_leaves_no_adapter_active(
    live: ServingModel, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prober = Prober(live.text, live.selection)
    live.attach("a", peft.read(saved("a")))
    monkeypatch.setattr(type(live.text), "hidden", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        prober.probe("a")
    assert live.selection.active is None and live.selection.shares is None


def test_the_record_of_training_is_what_a_server_finds(tiny_llama_folder: Path, saved: Callable[..., Path]) -> None:
    folder = saved("a", seed=1)
    found: dict[str, tuple[Probe, Probe, Probe, float]] = {}
    for method, dtype in (("none", "float32"), ("nf4", "float32"), ("none", "bfloat16")):
        spec = ModelSpec(path=str(tiny_llama_folder), dtype=dtype, products="float32", quantize=QuantSpec(method=method))  # type: ignore[arg-type]
        trained, served = (load_text_model(spec, say=lambda _: None) for _ in range(2))
        add_adapter(trained, peft.read(folder), "default")
        live = ServingModel(served)
        prober = Prober(served, live.selection)
        live.attach("a@1", peft.read(folder))
        known, theirs = record(trained, "default"), prober.probe("a@1")
        assert (known.difference(theirs) or 0.0) <= theirs.apart + 1e-5 < prober.tolerance, (method, dtype)
        assert known.effect > 0.1
        found[f"{method} {dtype}"] = known, theirs, Probe.from_text(known.to_text(), "here"), prober.tolerance
    plain, packed, half = found.values()
    assert packed[0].base == f"{plain[0].base}, nf4 block_size=64 double_quant=True" and packed[0].difference(plain[0]) is None
    assert (half[0].precision, half[3]) == ("float32 over bfloat16", 0.5), "activations are rounded as the weights are"


def test_what_rounding_explains_grows_with_the_effect_in_16_bits_only(tiny_llama_folder: Path, live: ServingModel) -> None:
    spec = ModelSpec(path=str(tiny_llama_folder), dtype="bfloat16", products="bfloat16")
    half = ServingModel(load_text_model(spec, say=lambda _: None))
    exact, coarse = (Prober(one.text, one.selection) for one in (live, half))
    assert [prober.allowed(effect) for prober in (exact, coarse) for effect in (0.5, 8.0)] == [2e-3, 2e-3, 0.5, 0.8]


def test_certificates_are_found_held_to_and_extended(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    assert find_certificate(folder) is None
    path = tmp_path / "run" / "certificate.json"
    good = tolerance_check("run", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    Certificate("The run", (good,)).write(path)
    assert find_certificate(folder) == path and read_record(path) is None
    probe = Probe("base", "float32", (0.5, -1.0), 0.2)
    assert extend_certificate(path, "a", probe, 1e-3).passed
    assert read_record(path) == probe
    with pytest.raises(ConfigError, match="written for base in float32; this server runs base in bfloat16"):
        extend_certificate(path, "a", Probe("base", "bfloat16", (0.5, -1.0), 0.2), 1e-3)
    apart = extend_certificate(path, "a", Probe("base", "float32", (0.5, -3.0), 0.2), 1e-3)
    assert not apart.passed and [check.name for check in apart.checks] == ["run", "served"]
    with pytest.raises(DataError, match="its checks failed"):
        read_record(path)
    Certificate("The run", ()).write(path)
    with pytest.raises(DataError, match="nothing was checked"):
        read_record(path)
    Certificate("The run", (good,), {FACT: "{"}).write(path)
    with pytest.raises(DataError, match=r"The probe in .* is broken"):
        read_record(path)


def test_a_wrong_file_elsewhere_does_not_keep_an_adapter_from_being_served(tmp_path: Path) -> None:
    path, probe = tmp_path / "certificate.json", Probe("base", "float32", (0.5, -1.0), 0.2)
    good = tolerance_check("adapter on disk", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    wrong = tolerance_check("other.gguf: logits", {"x": 9.0}, tolerance={"x": 1.0}, between=("a", "b"))
    Certificate("The run", (good, wrong), {FACT: probe.to_text()}).write(path)
    assert read_record(path) == probe
    assert [check.passed for check in extend_certificate(path, "a", probe, 1e-3).checks] == [True, False, True]
    Certificate("The file", (wrong,), {FACT: probe.to_text()}).write(path)
    with pytest.raises(DataError, match=r"its checks failed \(other\.gguf: logits\)"):
        read_record(path)
