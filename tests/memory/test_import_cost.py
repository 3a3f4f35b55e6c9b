"""What is left out of a process is not in it, and what is needed is: a card, the interpreter, or the package by itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tiny.one_import import answers

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is there for Linux alone")

BEGIN = """
import sys
import torch
from lorakeet.memory.import_cost import without_triton
"""


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def answer(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], env=without_interpreter(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(torch.accelerator.is_available(), reason="Triton has something to compile for here")
def test_a_command_holds_no_triton_which_can_be_imported_by_itself() -> None:
    code = """
        import contextlib, io, sys
        from lorakeet.cli.main import main
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(["evaluate", "."]) == 2
        assert "torch._dynamo" in sys.modules and "transformers.modeling_utils" in sys.modules
        assert "triton" not in sys.modules and "scipy.stats" not in sys.modules
        import triton, torch
        assert triton.__version__
        print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item())
    """
    assert answer("\n".join(line[8:] for line in code.splitlines())) == "1.0"


@pytest.mark.slow
@needs_triton
def test_triton_stays_where_a_gpu_or_its_interpreter_is_there() -> None:
    card = "torch.accelerator.is_available = lambda: True\n"
    inside = "with without_triton(): print(sys.modules.get('triton', 'absent'))"
    cases = [card, "os.environ['TRITON_INTERPRET'] = '1'\n", "import triton\n"]
    with_card, interpreted, imported = answers(BEGIN, [f"{case}{inside}" for case in cases], without_interpreter())
    assert (with_card, interpreted) == ("absent", "absent") and imported.startswith("<module 'triton'")


@pytest.mark.slow
@needs_triton
def test_triton_is_hidden_within_and_back_after_an_error() -> None:
    code = """
        torch.accelerator.is_available = lambda: False
        try:
            with without_triton():
                with without_triton():
                    print(sys.modules["triton"])
                print(sys.modules["triton"])
                import triton
        except ModuleNotFoundError:
            print("triton" in sys.modules)
    """
    assert answer(BEGIN + "\n".join(line[8:] for line in code.splitlines())).split() == ["None", "None", "False"]
