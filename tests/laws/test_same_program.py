"""Small runs end in the recorded bytes. Everything else that is recorded: python tests/golden/same_program.py compare."""

from __future__ import annotations

import sys

import pytest

from golden import same_program


@pytest.mark.slow
def test_adapters_have_the_recorded_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the recorded machine only: another one rounds sums in another way."""
    monkeypatch.setattr(sys, "argv", ["same_program.py", "compare", "--quick"])
    code = same_program.main()
    said = capsys.readouterr().out
    if code == 2:
        pytest.skip(said.strip())
    assert code == 0, said
