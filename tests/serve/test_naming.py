"""What `model` means: the base, one adapter, or a mix; and what is no name."""

from __future__ import annotations

import pytest

from lorakeet.errors import ConfigError
from lorakeet.serve.naming import UnknownModel, check_name, wanted

KNOWN, BASE = ("a", "b.1", "c+d"), ("smol", "org/smol")


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("smol", {}),
        ("org/smol", {}),
        ("smol:latest", {}),
        ("a", {"a": 1.0}),
        ("a:latest", {"a": 1.0}),
        ("smol:a", {"a": 1.0}),
        ("c+d", {"c+d": 1.0}),
        ("a*0.7+b.1*0.3", {"a": 0.7, "b.1": 0.3}),
        ("a + b.1*-1", {"a": 1.0, "b.1": -1.0}),
        ("a*0.5+a*0.25", {"a": 0.75}),
    ],
)
def test_meanings(model: str, meant: dict[str, float]) -> None:
    assert wanted(model, base=BASE, known=KNOWN) == meant


@pytest.mark.parametrize("model", ["", "x", "other:a", "a:b.1", "a*0.5+x*0.5", "+", "smol:x"])
def test_unknown(model: str) -> None:
    with pytest.raises(UnknownModel):
        wanted(model, base=BASE, known=KNOWN)


@pytest.mark.parametrize("weight", ["", "inf", "nan", "1/2"])
def test_bad_weights(weight: str) -> None:
    with pytest.raises(ConfigError, match="is no number"):
        wanted(f"a*{weight}", base=BASE, known=KNOWN)


def test_names() -> None:
    for name in ("a", "llama-3.1_x", "A" * 100):
        check_name(name)
    for name in ("A" * 101, "../x", "x/y", "a b", "é", "a\n"):
        with pytest.raises(ConfigError):
            check_name(name)
