"""What is said of a library that is not here, and of a comparison that does not run."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from packaging.specifiers import SpecifierSet

from lorakeet.kernels.proof import difference_found, missing_package


def failing(error: Exception) -> str:
    def compare() -> str:
        raise error

    return difference_found(compare, of_any_kind=True)


def test_a_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing_package.cache_clear()
    assert missing_package("no-such-kernels", SpecifierSet(">=1")).startswith("no-such-kernels is not installed. Install it with")
    monkeypatch.setattr(metadata, "version", lambda _: "0.9")
    missing_package.cache_clear()
    assert "some-kernels is 0.9; expected >=1" in missing_package("some-kernels", SpecifierSet(">=1"))
    assert not missing_package("other-kernels", SpecifierSet(">=0.9"))
    missing_package.cache_clear()


def test_a_comparison_runs_without_gradients_and_its_word_is_kept() -> None:
    assert difference_found(lambda: "" if torch.is_grad_enabled() else "differs") == "differs"
    with torch.inference_mode():
        assert not difference_found(lambda: str(torch.is_inference_mode_enabled() or ""))


def test_a_kernel_that_does_not_run_differs_and_memory_that_is_short_says_nothing() -> None:
    assert failing(RuntimeError("no  kernel\nimage.")) == "does not run: RuntimeError no kernel image"
    assert failing(KeyError("x" * 300)) == f"does not run: KeyError '{'x' * 159}"
    with pytest.raises(torch.OutOfMemoryError):
        failing(torch.OutOfMemoryError("full"))


def test_errors_of_other_kinds_are_raised_where_only_torchs_kernels_are_compared() -> None:
    def compare() -> str:
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        difference_found(compare)
