"""What `model` means: the base, one adapter, or a mix; and what is no name."""

from __future__ import annotations

import pytest

from lorakeet.errors import ConfigError
from lorakeet.serve.model_names import UnknownModel, check_name, parse_model

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
    assert parse_model(model, base=BASE, known=KNOWN) == meant


@pytest.mark.parametrize("model", ["", "x", "other:a", "a:b.1", "a*0.5+x*0.5", "+", "smol:x", "smol:" * 3000 + "a"])
def test_unknown(model: str) -> None:
    with pytest.raises(UnknownModel):
        parse_model(model, base=BASE, known=KNOWN)


@pytest.mark.parametrize("weight", ["", "inf", "nan", "1/2"])
def test_bad_weights(weight: str) -> None:
    with pytest.raises(ConfigError, match="is no number"):
        parse_model(f"a*{weight}", base=BASE, known=KNOWN)


def test_weights_have_a_bound() -> None:
    for model in ("a*1e308+a*1e308", "a*9e29+a*9e29", "a*-1e31"):
        with pytest.raises(ConfigError, match=r"The weight .* of 'a' in .* is too large; at most 1e\+30 is taken"):
            parse_model(model, base=BASE, known=KNOWN)


def test_what_is_longer_than_any_name_is_not_compared() -> None:
    """Which would take seconds, and the server waits."""
    for model in ("x" * 4_000_000, "a+" * 2_000_000 + "a"):
        with pytest.raises(ConfigError, match="characters; at most 16,384 are read"):
            parse_model(model, base=BASE, known=KNOWN)
    with pytest.raises(UnknownModel):
        parse_model("a" * 10_000, base=BASE, known=KNOWN)


def test_names() -> None:
    for name in ("a", "llama-3.1_x", "A" * 100):
        check_name(name)
    for name in ("A" * 101, "../x", "x/y", "a b", "é", "a\n"):
        with pytest.raises(ConfigError):
            check_name(name)
    with pytest.raises(ConfigError, match="since the base is"):
        check_name("smol", "smol")
