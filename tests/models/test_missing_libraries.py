"""What of other libraries is missing is reported."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from lorakeet.kernels import proof
from lorakeet.models.missing_libraries import missing_libraries
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.quant.spec import QuantSpec
from tiny.simulated_card import simulated_card


@pytest.mark.parametrize(("version", "words"), [("", "is not installed"), ("0.1", "is 0.1; expected")])
def test_a_library_that_is_missing_or_of_another_version_is_said_on_a_gpu(
    version: str, words: str, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each, with the command; never a silent slow path."""

    known = metadata.version

    def installed(name: str) -> str:
        if name not in ("liger-kernel", "bitsandbytes"):
            return known(name)
        if not version:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(proof.metadata, "version", installed)
    proof.missing_package.cache_clear()
    nf4, cuda = QuantSpec(method="nf4"), torch.device("cuda", 0)
    try:
        norms, weights = missing_libraries(cuda, nf4)
        assert norms.startswith(f"liger-kernel {words}") and "Install it with: pip install 'liger-kernel<0.9,>=0.8.5'." in norms
        assert weights.startswith(f"bitsandbytes {words}") and weights.endswith("by torch's operations, which is slower.")
        assert [*missing_libraries(cuda, QuantSpec())] == [norms] and not [*missing_libraries(torch.device("cpu"), nf4)]
        said: list[str] = []
        with simulated_card():
            load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="bfloat16", device="cuda"), say=said.append)
        assert said.count(norms) == 1
    finally:
        proof.missing_package.cache_clear()


def test_nothing_is_missing_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("lorakeet.models.missing_libraries.why_no_launcher", lambda: "")
    pytest.importorskip("liger_kernel")
    assert not [*missing_libraries(torch.device("cuda", 0), QuantSpec(method="nf4"))]
